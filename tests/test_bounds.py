import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import prune

from tamzoo import TAM, measure_gates
from tamzoo.bounds import bound_gates, gate_bounds
from tamzoo.catalogue import ENTRIES
from tamzoo.data import darkest_and_brightest, normalise
from tamzoo.distributed import GlobalBatchNorm
from tamzoo.gates import gates_of
from tamzoo.results import record_of

TRAINED = [entry for entry in ENTRIES.values() if entry.trained and entry.attention == "tam"]
BACKBONES = {"resnet20_tam.cifar10": 32, "wrn10_4_tam.cifar10": 32, "resnext50_32x4d_tam.cifar10": 32}
BACKBONES |= {"resnet18_tam.untrained_in1k": 64}


@pytest.mark.parametrize(("channels", "group_size"), [(16, 2), (12, 3), (7, 2)])
def test_bounds_hold_for_any_input_in_the_ranges(channels, group_size):
    module = TAM(channels, group_size).eval()
    for layer in module.tree:
        if isinstance(layer, nn.PReLU):
            nn.init.uniform_(layer.weight, -1.0, 2.0)  # falling slopes too: the interval may turn around
    low, high = -3 * torch.rand(channels), 2 * torch.rand(channels)
    least, most = gate_bounds(module, low, high)
    corners = torch.rand(20_000, channels).round()
    inside = torch.rand(20_000, channels)
    for mix in (corners, inside):
        x = low + mix * (high - low)
        values = module.gate(x.view(-1, channels, 1, 1))
        assert least <= values.min().item() and values.max().item() <= most


def test_bounds_are_tight_for_a_single_input():
    module = TAM(64).eval()
    x = torch.randn(64)
    least, most = gate_bounds(module, x, x)
    assert least <= module.gate(x.view(1, 64, 1, 1)).item() <= most
    assert most - least < 1e-4


def gate_values(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """(n, 1, h, w) a gate, by hooks in a pass of the model."""
    found: dict[str, Tensor] = {}

    def watch(name: str):
        return lambda gate, inputs: found.update({name: gate.gate(inputs[0])})

    hooks = [gate.register_forward_pre_hook(watch(name)) for name, gate in gates_of(model).items()]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("name", "size"), BACKBONES.items())
def test_no_input_between_the_ends_leaves_the_bounds(shaken, name, size):
    """Random ones, corners, and those corners to which the gradient of each gate points."""
    model = shaken(timm.create_model(name)).requires_grad_(False)
    low = torch.randn(1, 3, size, size)
    high = low + 1e-5
    bounds = bound_gates(model, low, high)
    assert list(bounds) == list(gates_of(model)) and bounds[next(iter(bounds))][1] < 1
    mix = torch.rand(6, *low.shape[1:])
    tried = [low + torch.cat([mix, mix.round()]) * (high - low)]
    x = low.clone().requires_grad_()
    for values in gate_values(model, x).values():
        (slope,) = torch.autograd.grad(values[0, 0, 1, 1], x, retain_graph=True)
        tried += [torch.where(slope > 0, high, low), torch.where(slope < 0, high, low)]
    for name, values in gate_values(model, torch.cat(tried)).items():
        least, most = bounds[name]
        assert least <= values.min() and values.max() <= most, name


def reading() -> TAM:
    """A gate of one channel that is its feature's sigmoid: its bounds tell those of the feature."""
    gate = TAM(1).eval()
    nn.init.ones_(gate.tree[0].weight)
    nn.init.zeros_(gate.tree[0].bias)
    return gate


def test_a_gate_moves_features_that_stand_still():
    """Channels of 1, which a BatchNorm has shrunk, move by what the gate does, that of one more channel."""
    norm, gate, total = nn.BatchNorm2d(4), TAM(4), nn.Conv2d(4, 1, 1, bias=False)
    nn.init.constant_(norm.weight, 0.01)
    nn.init.ones_(norm.bias)
    for layer in gate.tree:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.copy_(torch.tensor([30.0, 0.0]).view(1, 2, 1, 1))
            nn.init.constant_(layer.bias, -30.0)
        else:
            nn.init.ones_(layer.weight)
    nn.init.zeros_(gate.tree[-1].bias)  # 900 (x - 1) of the first channel x
    total.weight.data.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]).view(1, 4, 1, 1))
    model = nn.Sequential(norm, gate, total, reading()).eval().requires_grad_(False)
    low, high = (torch.tensor([end, 0.0, 0.0, 0.0]).view(1, 4, 1, 1) for end in (-1.0, 1.0))
    bounds = bound_gates(model, low, high)
    for name, values in gate_values(model, torch.cat([low, high])).items():
        least, most = bounds[name]
        assert least <= values.min() < values.max() <= most
        assert values.max() - values.min() > (0.2 if name == "3" else 0.9)


def batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(1)
    norm.weight.data.fill_(-0.7)  # falling
    norm.bias.data.fill_(0.3)
    assert norm.running_mean is not None
    norm.running_mean.fill_(0.2)
    return norm


@pytest.mark.parametrize(
    ("channels", "layer"),
    [
        (4, nn.Conv2d(4, 1, 3, stride=2, padding=1)),
        (4, nn.Sequential(nn.Conv2d(4, 2, 3, groups=2, dilation=2, bias=False), nn.Conv2d(2, 1, 1))),
        (1, batch_norm()),
        (1, nn.ReLU(inplace=True)),
        (1, nn.MaxPool2d(3, 2, 1)),
        (1, nn.Dropout()),
    ],
    ids=["convolution", "grouped", "falling", "relu", "pool", "dropout"],
)
def test_bounds_through_one_layer_are_its_extremes(channels, layer):
    """They lie at corners, since a layer rises or falls with each number that it is given."""
    model = nn.Sequential(layer, reading()).eval().requires_grad_(False)
    low = torch.randn(1, channels, 7, 7) - 0.5
    high = low + torch.rand_like(low)
    x = low.clone().requires_grad_()
    least, most = [], []
    for value in layer(x + 0).flatten():
        (slope,) = torch.autograd.grad(value, x, retain_graph=True)
        least.append(torch.where(slope < 0, high, low))
        most.append(torch.where(slope < 0, low, high))
    found = layer(torch.cat([*least, *most])).sigmoid()
    assert bound_gates(model, low, high) == {
        "1": (pytest.approx(found.min().item(), abs=1e-5), pytest.approx(found.max().item(), abs=1e-5))
    }


HADAMARD = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def turning(weight: Tensor, kernel: int = 1, **how) -> nn.Conv2d:
    """A convolution without bias, of the same matrix at each place of its kernel."""
    layer = nn.Conv2d(*weight.shape[::-1], kernel, bias=False, **how)
    layer.weight.data = weight[:, :, None, None].expand_as(layer.weight).clone()
    return layer


def scaling(scale: list[float]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(scale), eps=1e-12)
    norm.weight.data = torch.tensor(scale)
    return norm


ROW = torch.tensor([[1.0, 1, 1, -1]]) / 2  # of what HADAMARD made of x, it makes halves of x again
SCALE = [8.0, 0.25, 2.0, 0.5]


@pytest.mark.parametrize(
    ("layers", "largest"),
    [
        # the first layer turns the box of all between -1 and 1, whose corners are 2 from its centre
        ([turning(HADAMARD), turning(ROW)], 2),
        ([turning(HADAMARD), nn.Identity(), turning(HADAMARD), turning(ROW @ HADAMARD)], 2),
        ([turning(HADAMARD), turning(torch.eye(4) / 3, 3, padding=1), turning(ROW)], 6),
        ([turning(HADAMARD), turning(torch.eye(4) / 3, 3, stride=2), turning(ROW)], 6),
        ([turning(HADAMARD / torch.tensor(SCALE)[:, None]), scaling(SCALE), turning(ROW)], 2),
        ([turning(HADAMARD), nn.Identity(), scaling(SCALE), turning(ROW / torch.tensor(SCALE))], 2),
        ([turning(HADAMARD), scaling([2.0] * 4), turning(ROW)], 4),
    ],
    ids=["turned", "thrice", "padded", "strided", "scaled back", "scaled, and back", "scaled"],
)
def test_channels_are_bounded_together(layers, largest):
    model = nn.Sequential(*layers, reading()).eval().requires_grad_(False)
    high = torch.ones(1, 4, 7, 7)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)[:, :, None, None].expand(-1, -1, 7, 7)
    assert model[:-1](corners).max().item() == pytest.approx(largest)
    least, most = torch.tensor(bound_gates(model, -high, high)[str(len(layers))]).logit().tolist()
    assert (least, most) == pytest.approx((-largest, largest), rel=1e-3)


class Head(nn.Module):
    """One that cannot be traced, as anybody may put behind the last gate."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.classify = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(x.flatten(1) if x.dim() != 2 else x)


@pytest.mark.parametrize("name", ["resnet20_tam", "wrn10_4_tam"])
def test_a_head_of_anybodys_changes_no_bound(shaken, name):
    model, x = shaken(timm.create_model(name)), torch.randn(1, 3, 32, 32)
    known = bound_gates(model, x, x)
    assert min(most - least for least, most in known.values()) < 0.9  # something is known
    model.fc = Head(model.num_features)
    assert bound_gates(model, x, x) == known
    assert bound_gates(nn.Sequential(Head(3 * 32 * 32), TAM(5)).eval(), x, x) == {"1": (0, 1)}


def norm_and_relu() -> nn.Module:
    return BatchNormAct2d(1)  # of timm, a subclass of BatchNorm2d


def reflecting() -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")


def pruned() -> nn.Module:
    layer = nn.Conv2d(1, 1, 1)
    prune.l1_unstructured(layer, "weight", 0)
    return layer


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("made", [norm_and_relu, reflecting, pruned, parametrized])
def test_behind_what_is_more_than_its_type_nothing_is_known(made):
    zeros = torch.zeros(1, 1, 4, 4)
    for layers in ([made()], [nn.Conv2d(1, 1, 1), made()], [made(), batch_norm()]):
        model = nn.Sequential(*layers, reading()).eval()
        assert bound_gates(model, zeros, zeros) == {str(len(layers)): (0, 1)}


def wide() -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1)


@pytest.mark.parametrize("made", [norm_and_relu, pruned, parametrized, wide])
def test_nor_within_a_tree(made):
    gate = TAM(1).eval()
    gate.tree[0] = made()
    assert gate_bounds(gate, torch.zeros(1), torch.zeros(1)) == (0, 1)


def test_nor_of_a_tree_with_a_hook():
    gate = reading()
    gate.tree.register_forward_hook(lambda tree, given, z: z + 5)
    assert gate_bounds(gate, torch.zeros(1), torch.zeros(1)) == (0, 1)


def hooked(model: nn.Module) -> None:
    model.register_forward_pre_hook(lambda _, given: (given[0] + 3,))


def training(model: nn.Module) -> None:
    model[0].train()


def replaced(model: nn.Module) -> None:
    model[0].forward = lambda x: x + 5


@pytest.mark.parametrize("change", [hooked, training, replaced])
def test_of_a_model_that_a_trace_misses_something_of_nothing_is_known(change):
    model, zeros = nn.Sequential(nn.Dropout(), reading()).eval(), torch.zeros(1, 1, 4, 4)
    assert bound_gates(model, zeros, zeros) != {"1": (0, 1)}
    change(model)
    assert bound_gates(model, zeros, zeros) == {"1": (0, 1)}


class Kept(nn.Module):
    """What enters is read again behind the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.same, self.layer, self.gate = nn.Conv2d(1, 1, 1), nn.Identity(), layer, reading()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.gate(self.layer(self.same(x)) + x)


def test_what_is_written_over_while_it_is_wanted_is_unknown():
    x = torch.full((1, 1, 1, 1), -2.0)
    assert bound_gates(Kept(nn.ReLU()).eval(), x, x) != {"gate": (0, 1)}
    assert bound_gates(Kept(nn.ReLU(inplace=True)).eval(), x, x) == {"gate": (0, 1)}


class Method(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[index] for index in range(len(x))])


class Making(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.ones(x.shape[1], 1, 1)


class Compiled(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.compile(backend="eager")


@pytest.mark.parametrize("layer", [Method(), Constant(), Named(), Asking(), Making(), Compiled()])
def test_behind_operations_without_a_rule_nothing_is_known(layer):
    zeros = torch.zeros(1, 1, 4, 4)
    assert bound_gates(nn.Sequential(layer, reading()).eval(), zeros, zeros) == {"1": (0, 1)}


def test_a_convolution_whose_result_is_wanted_twice_is_not_joined():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.gate = nn.Conv2d(1, 1, 1), batch_norm(), reading()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.gate(self.norm(x) + x)

    model, x = Twice().eval(), torch.randn(1, 1, 1, 1)
    value = torch.sigmoid(model.norm(model.conv(x)) + model.conv(x)).item()
    assert bound_gates(model, x, x)["gate"] == (pytest.approx(value, abs=1e-5),) * 2


def test_a_gate_that_is_called_twice_is_unknown():
    gate, x = reading(), torch.ones(1, 1, 2, 2)
    model = nn.Sequential(gate, nn.Conv2d(1, 1, 1), gate).eval()
    assert bound_gates(model, x, x) == {"0": (0, 1)}


def faint() -> nn.Module:
    weights = (1e-30, 1e-30, 1e30, 1e30)  # 1, but for float32, in which it is 0
    return nn.Sequential(*(layer for weight in weights for layer in (constant(weight), nn.ReLU())))


def steep() -> nn.Module:
    norm = nn.BatchNorm2d(1)
    norm.running_var.fill_(0)
    norm.weight.data.fill_(1e38)  # over the root of eps, it overflows
    return nn.Sequential(constant(1e-41), norm)


def far() -> nn.Module:
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(1e6)  # of which float32 leaves a sixteenth
    norm.bias.data.fill_(1e6)
    return nn.Sequential(constant(0.3), norm)


def constant(weight: float) -> nn.Conv2d:
    layer = nn.Conv2d(1, 1, 1, bias=False)
    layer.weight.data.fill_(weight)
    return layer


@pytest.mark.parametrize("made", [faint, steep, far])
def test_what_float32_loses_is_within_the_bounds(made):
    model, x = nn.Sequential(made(), reading()).eval().requires_grad_(False), torch.ones(1, 1, 1, 1)
    least, most = bound_gates(model, x, x)["1"]
    assert least <= model[1].gate(model[0](x)).nan_to_num(0).item() <= most


def test_bounds_through_a_sum_take_both_for_independent():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate = batch_norm(), reading()

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            y += x
            return self.gate(x + y)

    low, high = torch.full((1, 1, 2, 2), -1.0), torch.full((1, 1, 2, 2), 2.0)
    ends = [2 * -1.0 - 0.7 * (2.0 - 0.2) + 0.3, 2 * 2.0 - 0.7 * (-1.0 - 0.2) + 0.3]
    expected = torch.tensor(ends).sigmoid().tolist()
    assert bound_gates(Sum().eval(), low, high)["gate"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("low", "high"), [(-2, 3), (1, 3), (-3, -1)])
def test_bounds_through_a_gate_are_of_a_product(low, high):
    model = nn.Sequential(reading(), reading()).eval()
    ends = torch.tensor([low, high]).double()
    products = torch.outer(ends, ends.sigmoid())
    expected = products.min().sigmoid().item(), products.max().sigmoid().item()
    box = torch.full((1, 1, 2, 2), float(low)), torch.full((1, 1, 2, 2), float(high))
    assert bound_gates(model, *box)["1"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("entry", TRAINED, ids=lambda entry: entry.name)
def test_what_records_say_of_any_picture_is_so(entry):
    model = timm.create_model(entry.name, pretrained=True).eval()
    bounds = bound_gates(model, *darkest_and_brightest(entry.dataset))
    for gate in record_of(entry).gates:
        assert bounds[gate.name] == pytest.approx((gate.proven_min, gate.proven_max), abs=1e-6), gate.name
        assert bounds[gate.name][0] <= gate.min <= gate.max <= bounds[gate.name][1]


def test_every_picture_lies_between_the_darkest_and_the_brightest():
    dataset = ENTRIES["resnet20_tam.cifar10"].dataset
    low, high = darkest_and_brightest(dataset)
    pictures = normalise(torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8), dataset)
    assert (low <= pictures).all() and (pictures <= high).all() and low.shape == (1, 3, 32, 32)


def test_measuring_tells_of_any_input_where_asked(shaken):
    model, x = shaken(timm.create_model("resnet20_tam.cifar10")), torch.randn(2, 3, 32, 32)
    nn.init.zeros_(model.layer3[2].se.tree[-1].weight)  # whatever comes, this gate is one number
    *_, last = measure_gates(model, x)
    assert (last.proven_min, last.proven_width, last.on_any_picture(1e-4)) == (None, 1, "within 1e+00")
    first, *_, last = measure_gates(model, x, ends=(x[:1] - 9, x[:1] + 9))
    assert last.on_any_picture(1e-4) == "proven" and last.proven_min is not None
    assert last.proven_min <= last.min <= last.max <= last.proven_min + last.proven_width
    assert first.on_any_picture(1e-4) != "proven"


@pytest.mark.parametrize(("of_convolution", "of_norm"), [(1, 1e38), (1e38, 1e-38)])
def test_features_beyond_float32_leave_a_gate_unknown(shaken, of_convolution, of_norm):
    model = shaken(timm.create_model("resnet20_tam.cifar10"))
    for gate in gates_of(model).values():
        nn.init.zeros_(gate.tree[-1].weight)
    model.layer2[0].conv2.weight.data *= of_convolution
    model.layer2[0].bn2.weight.data *= of_norm
    low, high = darkest_and_brightest(ENTRIES["resnet20_tam.cifar10"].dataset)
    widths = [most - least for least, most in bound_gates(model, low, high).values()]
    assert max(widths[:3]) < 1e-5 and widths[3:] == [1] * 6


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["wrn10_4_tam.cifar10", "resnet20_tam.cifar10"])
def test_behind_weights_that_are_no_numbers_nothing_is_known(shaken, name, wrong):
    model = shaken(timm.create_model(name))
    model.layer2[0].conv2.weight.data[0, 0, 0, 0] = wrong
    low, high = darkest_and_brightest(ENTRIES[name].dataset)
    bounds = bound_gates(model, low, high)
    assert {bounds[name] for name in bounds if name >= "layer2"} == {(0, 1)}


def test_behind_a_gate_that_overflows_nothing_is_known(shaken):
    model = shaken(timm.create_model("resnet20_tam.cifar10"))
    for gate in gates_of(model).values():
        nn.init.zeros_(gate.tree[-1].weight)
    nn.init.constant_(model.layer2[0].se.tree[0].weight, 1e38)
    low, high = darkest_and_brightest(ENTRIES["resnet20_tam.cifar10"].dataset)
    widths = [most - least for least, most in bound_gates(model, low, high).values()]
    assert max(widths[:3]) < 1e-5 and widths[3:] == [1] * 6


def test_a_shut_gate_is_bounded_by_zero():
    gate, x = TAM(4), torch.zeros(4)
    nn.init.zeros_(gate.tree[-1].weight)
    nn.init.constant_(gate.tree[-1].bias, -95)  # a sigmoid of 5e-42
    least, most = gate_bounds(gate, x, x)
    assert least == 0 < most < 1e-37


def spread(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm
    return model


@pytest.mark.parametrize("convert", [spread, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_bounds_of_a_model_that_several_processes_trained(shaken, convert):
    model, x = shaken(timm.create_model("resnet20_tam")), torch.randn(1, 3, 32, 32)
    known = bound_gates(model, x, x)
    assert min(most - least for least, most in known.values()) < 0.9  # something is known
    assert bound_gates(convert(model), x, x) == known


def test_bounds_of_float64_are_those_of_the_same_float32(shaken):
    model, x = shaken(timm.create_model("resnet20_tam")), torch.randn(1, 3, 32, 32)
    assert bound_gates(model, x, x) == bound_gates(model.double(), x, x)


def test_behind_layers_without_a_rule_nothing_is_known(shaken):
    model, x = shaken(timm.create_model("resnet20_tam")), torch.randn(1, 3, 32, 32)
    known = bound_gates(model, x, x)
    model.layer2[0].act1 = nn.GELU()  # it falls and rises
    before = ["layer1.0.se", "layer1.1.se", "layer1.2.se"]
    assert bound_gates(model, x, x) == dict.fromkeys(known, (0, 1)) | {name: known[name] for name in before}


def test_what_cannot_be_bounded_is_refused():
    x = torch.randn(1, 3, 32, 32)
    assert bound_gates(timm.create_model("resnet20_plain").eval(), x, x) == {}
    with pytest.raises(ValueError, match="call model.eval"):
        bound_gates(timm.create_model("resnet20_tam"), x, x)
    with pytest.raises(ValueError, match="the model's weights are torch.float16"):
        bound_gates(timm.create_model("resnet20_tam").eval().half(), x, x)
