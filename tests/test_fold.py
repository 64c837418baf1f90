import copy
from dataclasses import replace
from functools import partial
from math import nan

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, StdConv2d
from torch.nn.utils import parametrizations, prune

import tamzoo
from tamzoo.fold import FoldReport
from tamzoo.gates import gates_of, measure_gates, remember_gates

FAMILIES = ("resnet18", "resnet50", "resnext50_32x4d", "wrn10_4", "resnet20")


def make_static(model):
    """Gates whose last convolution has no weights are one number, another one each."""
    for index, gate in enumerate(gates_of(model).values()):
        gate.tree[-1].weight.data.zero_()
        gate.tree[-1].bias.data.fill_(0.3 * index - 1)
    return model


@pytest.mark.parametrize("backbone", FAMILIES)
def test_folding_static_gates_keeps_the_logits_and_leaves_the_plain_backbone(backbone, shaken):
    model = make_static(shaken(timm.create_model(f"{backbone}_tam.cifar10")))
    x = torch.randn(4, 3, 32, 32)
    expected = model(x)
    before = copy.deepcopy(model.state_dict())
    folded = tamzoo.reparameterize_model(model, measure_gates(model, x))
    assert folded.fold_report.kept == {} and len(folded.fold_report.folded) == len(gates_of(model))
    # float32: the scale moves from after the affine layer into it
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)

    plain = timm.create_model(f"{backbone}_plain.cifar10").eval()
    plain.load_state_dict(folded.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), folded(x), rtol=0, atol=0)
    names = [(name, type(module)) for name, module in folded.named_modules()]
    assert names == [(name, type(module)) for name, module in plain.named_modules()]

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "a copy was folded"
    )


def test_gates_that_move_stay_and_the_report_says_why(shaken):
    model = shaken(timm.create_model("resnet20_tam.cifar10"))
    torch.nn.init.zeros_(model.layer2[1].se.tree[-1].weight)
    x = torch.randn(4, 3, 32, 32)
    folded = tamzoo.reparameterize_model(model, measure_gates(model, x), tolerance=0.0)
    report = folded.fold_report
    assert "layer2.1.se" in report.folded
    assert all("exceeds the tolerance 0" in reason for reason in report.kept.values())
    assert list(gates_of(folded)) == list(report.kept)
    assert f"{len(report.folded)} of 9 gates folded" in str(report) and "layer1.0.se: kept, width" in str(
        report
    )
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gate_that_moves_stays_in_half_precision_too(shaken, dtype):
    model = make_static(shaken(timm.create_model("resnet20_tam.cifar10")))
    gates = measure_gates(model, torch.randn(4, 3, 32, 32))
    moving = [replace(gate, min=gate.mean - 1.5e-4, max=gate.mean + 1.5e-4) for gate in gates]
    half = model.to(dtype)
    assert half.layer1[0].se.measured_gate.dtype == torch.float32
    report = tamzoo.reparameterize_model(half, moving).fold_report
    assert report.folded == {} and "width 0.0003 exceeds" in report.kept["layer1.0.se"]
    assert len(tamzoo.reparameterize_model(half, gates).fold_report.folded) == 9


def test_a_gate_whose_mean_is_no_number_stays(shaken):
    model = make_static(shaken(timm.create_model("resnet20_tam.cifar10")))
    gates = [replace(gate, mean=nan) for gate in measure_gates(model, torch.randn(4, 3, 32, 32))]
    report = tamzoo.reparameterize_model(model, gates).fold_report
    assert report.folded == {} and all("measured as nan" in reason for reason in report.kept.values())


def test_unmeasured_gates_stay(shaken):
    model = make_static(shaken(timm.create_model("resnet20_tam.cifar10")))
    report = tamzoo.reparameterize_model(model).fold_report
    assert report.folded == {} and set(report.kept.values()) == {
        "not measured since its weights last changed"
    }


def test_a_checkpoint_folds_without_data_until_it_is_trained(shaken):
    model = make_static(shaken(timm.create_model("resnet20_tam.cifar10")))
    x = torch.randn(4, 3, 32, 32)
    remember_gates(model, measure_gates(model, x))
    again = timm.create_model("resnet20_tam.cifar10").eval()
    again.load_state_dict(model.state_dict())
    assert len(tamzoo.reparameterize_model(again).fold_report.folded) == 9
    again.train()(x).sum().backward()
    assert len(tamzoo.reparameterize_model(again.eval()).fold_report.kept) == 9


def test_a_tree_that_changed_in_eval_mode_since_it_was_measured_stays(shaken):
    model = make_static(shaken(timm.create_model("resnet20_tam.cifar10")))
    x = torch.randn(4, 3, 32, 32)
    remember_gates(model, measure_gates(model, x))
    with torch.no_grad():
        model.layer2[1].se.tree[-1].bias += 0.01
    folded = tamzoo.reparameterize_model(model)
    ((name, reason),) = folded.fold_report.kept.items()
    assert name == "layer2.1.se" and "for an input of zeros: its weights changed since" in reason
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_timms_own_reparameterize_model_folds_measured_gates(backbone, shaken):
    model = make_static(shaken(timm.create_model(f"{backbone}_tam.cifar10")))
    x = torch.randn(2, 3, 32, 32)
    remember_gates(model, measure_gates(model, x))
    folded = timm.utils.reparameterize_model(model)
    assert not gates_of(folded) and gates_of(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="call model.eval"):
        timm.utils.reparameterize_model(model.train())


def test_a_scalar_folds_without_being_measured(shaken):
    model = shaken(timm.create_model("wrn10_4_scalar.cifar10"))
    for index, block in enumerate((model.layer1[0], model.layer2[0], model.layer3[0])):
        torch.nn.init.constant_(block.se.logit, index - 1.0)
    x = torch.randn(2, 3, 32, 32)
    folded = tamzoo.reparameterize_model(model)
    assert list(folded.fold_report.folded.values()) == pytest.approx([0.268941, 0.5, 0.731059], abs=1e-6)
    timm.create_model("wrn10_4_plain.cifar10").load_state_dict(folded.state_dict(), strict=True)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_in_place_changes_the_model_itself(shaken):
    model = make_static(shaken(timm.create_model("resnet20_tam.cifar10")))
    gates = measure_gates(model, torch.randn(2, 3, 32, 32))
    assert tamzoo.reparameterize_model(model, gates, inplace=True) is model
    assert not gates_of(model)


def test_other_attentions_stay():
    model = timm.create_model("resnet20_se.cifar10").eval()
    report = tamzoo.reparameterize_model(model).fold_report
    assert len(report.kept) == 9 and set(report.kept.values()) == {"SEModule depends on its input by design"}


def test_a_norm_without_affine_cannot_take_a_gate(shaken):
    norm = torch.nn.BatchNorm2d
    model = timm.create_model(
        "resnet20_tam.cifar10", norm_layer=lambda c, **kw: norm(c, affine=False, **kw)
    ).eval()
    gates = measure_gates(make_static(model), torch.randn(2, 3, 32, 32))
    reasons = tamzoo.reparameterize_model(model, gates).fold_report.kept.values()
    assert set(reasons) == {"bn2 (BatchNorm2d) has no weights of its own to fold into"}


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: prune.random_unstructured(norm, "weight", amount=0.3),
        lambda norm: prune.random_unstructured(norm, "bias", amount=0.3),
        lambda norm: parametrizations.weight_norm(norm, dim=None),
    ],
)
def test_a_layer_whose_weights_are_made_from_others_cannot_take_a_gate(shaken, change):
    model = make_static(shaken(timm.create_model("resnet20_tam.cifar10")))
    change(model.layer1[1].bn2)
    x = torch.randn(2, 3, 32, 32)
    folded = tamzoo.reparameterize_model(model, measure_gates(model, x))
    assert len(folded.fold_report.folded) == 8
    assert "has no weights of its own to fold into" in folded.fold_report.kept["layer1.1.se"]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("act", "folds"), [(torch.nn.GELU, 0), (torch.nn.SiLU, 0), (torch.nn.ReLU, 9), (torch.nn.Identity, 9)]
)
def test_a_gate_folds_into_a_norm_only_where_a_factor_passes_its_activation(act, folds, shaken):
    norm = partial(BatchNormAct2d, act_layer=act)
    model = make_static(shaken(timm.create_model("resnet20_tam.cifar10", norm_layer=norm)))
    x = torch.randn(2, 3, 32, 32)
    folded = tamzoo.reparameterize_model(model, measure_gates(model, x))
    assert len(folded.fold_report.folded) == folds
    assert all("may do more than scale and shift" in why for why in folded.fold_report.kept.values())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_gate_behind_a_hook_stays(shaken):
    model, x = make_static(shaken(timm.create_model("resnet20_tam.cifar10"))), torch.randn(2, 3, 32, 32)
    model.layer1[0].bn2.register_forward_hook(lambda layer, given, x: x.clamp(max=0.5))
    folded = tamzoo.reparameterize_model(model, measure_gates(model, x))
    assert list(folded.fold_report.kept) == ["layer1.0.se"]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def clamping(model: torch.nn.Module) -> None:
    bn = model.layer2[1].bn2
    bn.forward = lambda x, plain=bn.forward: plain(x).clamp(max=0.5)


class Clamped(torch.nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(max=0.5)


def of_a_subclass(model: torch.nn.Module) -> None:
    model.layer2[1].bn2 = Clamped(32).eval()


def standardising(model: torch.nn.Module) -> None:
    model.layer2[1].bn2 = StdConv2d(32, 32, 3, padding=1).eval()


def sharing_a_layer(model: torch.nn.Module) -> None:
    model.layer2[2].bn2 = model.layer2[1].bn2


def sharing_weights(model: torch.nn.Module) -> None:
    model.layer2[1].bn2.weight = model.layer2[2].bn1.weight


@pytest.mark.parametrize("change", [clamping, of_a_subclass, standardising, sharing_a_layer, sharing_weights])
def test_a_gate_stays_where_a_factor_would_change_more_or_less_than_the_block(change, shaken):
    model, x = make_static(shaken(timm.create_model("resnet20_tam.cifar10"))), torch.randn(2, 3, 32, 32)
    change(model)
    folded = tamzoo.reparameterize_model(model, measure_gates(model, x))
    assert "layer2.1.se" in folded.fold_report.kept and len(folded.fold_report.folded) >= 7
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


class HalvedTAM(tamzoo.TAM):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def hooked(gate: torch.nn.Module) -> None:
    gate.register_forward_hook(lambda module, inputs, output: output * 2)


def hooked_before(gate: torch.nn.Module) -> None:
    gate.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def with_another_forward(gate: torch.nn.Module) -> None:
    gate.forward = lambda x: x + 1


def subclassed(gate: torch.nn.Module) -> None:
    gate.__class__ = HalvedTAM


@pytest.mark.parametrize("change", [hooked, hooked_before, with_another_forward, subclassed])
def test_an_attention_that_does_more_than_its_gate_stays(change, shaken):
    model, x = make_static(shaken(timm.create_model("resnet20_tam.cifar10"))), torch.randn(2, 3, 32, 32)
    gates = measure_gates(model, x)
    change(model.layer2[1].se)
    folded = tamzoo.reparameterize_model(model, gates)
    assert "may do more than multiply" in folded.fold_report.kept["layer2.1.se"]
    assert len(folded.fold_report.folded) == 8
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_report_tells_which_gates_are_proven():
    report = FoldReport(folded={"a": 0.5, "b": 0.25}, kept={}, tolerance=1e-4, proven=("b",))
    assert str(report).splitlines()[1:] == ["  a: folded as 0.500000", "  b: folded as 0.250000, proven"]


def test_a_pruned_model_that_has_not_run_says_what_to_do(shaken):
    model, x = make_static(shaken(timm.create_model("resnet20_tam.cifar10"))), torch.randn(2, 3, 32, 32)
    prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.3)
    remember_gates(model, measure_gates(model, x))
    prune.l1_unstructured(model.layer1[1].conv1, "weight", 0.3)
    with pytest.raises(ValueError, match="where layers are pruned, run it once under torch.no_grad"):
        tamzoo.reparameterize_model(model)
    with torch.no_grad():
        model(x)
    assert len(tamzoo.reparameterize_model(model).fold_report.folded) == 9


def test_what_cannot_be_folded_is_refused():
    model = timm.create_model("resnet20_tam.cifar10")
    with pytest.raises(ValueError, match="call model.eval"):
        tamzoo.reparameterize_model(model)
    with pytest.raises(ValueError, match="tolerance is a width"):
        tamzoo.reparameterize_model(model.eval(), tolerance=-1)
    with pytest.raises(ValueError, match="no blocks that can be folded"):
        tamzoo.reparameterize_model(torch.nn.Linear(2, 2).eval())
