import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

import tamzoo  # noqa: F401
from tamzoo.catalogue import BACKBONES, ENTRIES
from tamzoo.datasets import DATASETS
from tamzoo.registry import MODELS, find_model

SMALL = ("resnet20", "wrn10_4")


def test_every_backbone_has_every_attention_and_tag():
    assert len(MODELS) == 11 * 5
    assert set(MODELS) <= set(timm.list_models())
    for model in MODELS:
        tags = {name.split(".")[1] for name in timm.list_models(f"{model}.*", include_tags=True)}
        assert tags == set(DATASETS)


def test_a_bare_name_takes_the_first_tag_with_weights_else_cifar100():
    for model in MODELS:
        trained = [tag for tag in DATASETS if (entry := ENTRIES.get(f"{model}.{tag}")) and entry.trained]
        assert timm.get_pretrained_cfg(model).tag == (trained[0] if trained else "cifar100")


@pytest.mark.parametrize("tag", DATASETS)
def test_the_data_configuration_is_the_data_sets(tag):
    dataset = DATASETS[tag]
    with torch.device("meta"):
        model = timm.create_model(f"resnet18_tam.{tag}")
    config = resolve_model_data_config(model)
    assert config["input_size"] == dataset.input_size
    assert (config["mean"], config["std"]) == (dataset.mean, dataset.std)
    assert config["crop_pct"] == dataset.crop_pct
    assert model.pretrained_cfg.get("label_names") == dataset.class_names
    small = tag != "untrained_in1k"
    assert model.conv1.kernel_size == ((3, 3) if small else (7, 7))
    assert isinstance(model.maxpool, torch.nn.Identity) == small


@pytest.mark.parametrize("model", MODELS)
def test_every_timm_facility_works_on_every_model(model):
    with torch.device("meta"):  # shapes without arithmetic: all 55 architectures in seconds
        x = torch.empty(2, 3, 32, 32)
        built: Any = timm.create_model(model, num_classes=7, drop_rate=0.1, drop_path_rate=0.1)
        features = built.forward_features(x)
        assert features.shape[:2] == (2, built.num_features)
        assert built.forward_head(features).shape == (2, 7)
        assert built.forward_head(features, pre_logits=True).shape == (2, built.head_hidden_size)
        assert built.get_classifier() is built.fc and built.get_classifier(name_only=True) == "fc"
        last, intermediates = built.forward_intermediates(x, indices=2)
        assert len(intermediates) == 2 and last.shape == features.shape
        maps = built.forward_intermediates(x, intermediates_only=True)
        found = [{"num_chs": m.shape[1], "reduction": 32 // m.shape[2]} for m in maps]
        assert found == [{key: info[key] for key in found[0]} for info in built.feature_info]
        built.set_grad_checkpointing()
        assert built(x).shape == (2, 7)
        built.reset_classifier(3, "max")
        assert built(x).shape == (2, 3)
        built.reset_classifier(0, "")
        assert built(x).shape == features.shape
        groups = timm.models.group_parameters(built, built.group_matcher())
        assert sum(map(len, groups.values())) == len(list(built.parameters()))

        grey = timm.create_model(model, in_chans=1, global_pool="catavgmax")
        assert grey(torch.empty(2, 1, 32, 32)).shape == (2, grey.num_classes)

        pyramid = timm.create_model(model, features_only=True)
        maps = pyramid(x)
        assert [m.shape[1] for m in maps] == pyramid.feature_info.channels()
        assert [32 // m.shape[2] for m in maps] == pyramid.feature_info.reduction()
        two = timm.create_model(model, features_only=True, out_indices=(1, 2))
        assert len(two(x)) == 2

        large = timm.create_model(f"{model}.untrained_in1k", features_only=True)
        maps = large(torch.empty(1, 3, 224, 224))
        assert [224 // m.shape[2] for m in maps] == large.feature_info.reduction()


@pytest.mark.parametrize("name", ["resnet20_tam", "resnet18_tam", "wrn10_4_tam"])
def test_every_way_to_features_gives_the_same(name):
    x, found = torch.randn(2, 3, 32, 32), {}
    for way in (None, "getter", "fx", "hook"):
        torch.manual_seed(0)  # the wrappers name the same weights in several ways
        options = {"feature_cls": way} if way else {}
        model = timm.create_model(name, features_only=True, out_indices=(1, -2), **options).eval()
        found[way] = [info["module"] for info in model.feature_info.get_dicts()], model(x)
        assert found[way][0] == found[None][0]
        torch.testing.assert_close(found[way][1], found[None][1])
    last = timm.create_model(name, features_only=True, out_indices=(-1,), feature_cls="getter")
    assert last(x)[0].shape[1] == last.feature_info.channels()[0]


@pytest.mark.parametrize("name", ["resnet18_tam", "resnet50_plain", "wrn16_8_tam"])
def test_networks_start_as_the_paper_says(name):
    """He's normal initialisation by fan-out; every BatchNorm begins as the identity."""
    for module in timm.create_model(name).modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_the_plain_imagenet_models_are_timms_own(backbone):
    ours = timm.create_model(f"{backbone}_plain.untrained_in1k").eval()
    theirs = timm.create_model(backbone).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["plain", "se", "cbam", "tam"])
@pytest.mark.parametrize("backbone", SMALL)
def test_copies_round_trips_and_memory_formats_agree(backbone, attention):
    model = timm.create_model(f"{backbone}_{attention}").eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
    other = timm.create_model(f"{backbone}_{attention}").eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)  # another order of summation
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    ("name", "asked", "side"),
    [
        ("resnet18_tam", 2, 16),
        ("resnet18_tam", 4, 8),
        ("resnet18_tam", 8, 4),
        ("resnet18_tam", 32, 4),
        ("wrn10_4_tam", 2, 16),
        ("wrn10_4_tam", 32, 8),
    ],
)
def test_output_stride_counts_from_the_picture(name, asked, side):
    model = timm.create_model(f"{name}.cifar10", output_stride=asked, features_only=True)
    assert model(torch.randn(1, 3, 32, 32))[-1].shape[-1] == side
    assert model.feature_info.reduction()[-1] == 32 // side


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pool_and_classifier_come_last(backbone):
    with torch.device("meta"):
        model = timm.create_model(f"{backbone}_tam.cifar10")
    assert [name for name, _ in model.named_children()][-2:] == ["global_pool", "fc"]
    assert [name for name, _ in model.named_parameters()][-2:] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", ["resnet18_tam", "resnet20_tam", "wrn10_4_tam"])
@pytest.mark.parametrize("prune_head", [False, True])
@pytest.mark.parametrize("last", [1, -1])
def test_only_what_follows_the_last_wanted_feature_is_pruned(name, prune_head, last):
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    classes, features = model.num_classes, model.forward_intermediates(x, [last], intermediates_only=True)
    model.prune_intermediate_layers([last], prune_head=prune_head)
    kept = last == -1 and not prune_head
    assert model(x).shape[1] == (classes if kept else features[0].shape[1])
    torch.testing.assert_close(model.forward_intermediates(x, [last], intermediates_only=True), features)


@pytest.mark.parametrize("name", ["resnet20_tam", "wrn10_4_tam"])
def test_torch_fx_traces_the_gates_layers(name):
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap's
def test_gradients_of_each_sample_in_training_are_autograds():
    model = timm.create_model("resnet20_tam.cifar10", norm_layer="layernorm2d").train()
    x, labels = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x, label):
        logits = torch.func.functional_call(model, parameters, (x[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, labels)
    torch.nn.functional.cross_entropy(model(x[:1]), labels[:1]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name][0], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_wide_resnet_groups_its_last_norm_with_its_last_block():
    model = timm.create_model("wrn10_4_tam")
    groups = timm.models.group_parameters(model, model.group_matcher())
    layer = {name: index for index, names in groups.items() for name in names}
    assert layer["bn2.weight"] == layer["layer3.0.conv2.weight"] < layer["fc.weight"]


def test_a_branch_of_a_wide_resnet_that_begins_with_zero_can_learn():
    block = timm.create_model("wrn10_4_plain", zero_init_last=True).layer1[0]
    x = torch.randn(2, 16, 8, 8)
    output = block(x)
    torch.testing.assert_close(output, block.downsample(x), rtol=0, atol=0)
    output.square().sum().backward()
    assert block.conv2.weight.grad.any()


@pytest.mark.parametrize("name", ["resnet20_tam", "wrn10_4_tam"])
def test_batchnorms_see_a_picture_once_on_the_way_to_features(name):
    model = timm.create_model(name).train()
    model.forward_intermediates(torch.randn(2, 3, 32, 32), norm=True)
    seen = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert set(seen) == {1}


@pytest.mark.parametrize("name", ["resnet20_tam", "wrn10_4_tam"])
def test_compiling_finds_one_graph(name):
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["resnet20_tam", "wrn10_4_tam"])
def test_compiling_a_training_step_finds_one_graph(name):
    model = timm.create_model(name).to(memory_format=torch.channels_last).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parameters = list(model.parameters())
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["wrn10_4_tam", "resnet20_tam"])
def test_checkpointed_gradients_equal_plain_ones(name, layout):
    model = timm.create_model(name).to(memory_format=layout)
    x = torch.randn(4, 3, 32, 32).to(memory_format=layout)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_plain_resnet_can_be_scripted():
    model = timm.create_model("resnet20_plain").eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_a_saved_model_loads_from_a_directory(tmp_path):
    model = timm.create_model("resnet20_tam.cifar10", num_classes=4).eval()
    model.layer1[0].se.measured_gate.copy_(torch.tensor([0.4, 0.39, 0.41]))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    cfg = timm.models.filter_pretrained_cfg(model.pretrained_cfg, remove_source=True) | {"num_classes": 4}
    config = {"architecture": "resnet20_tam", "num_classes": 4, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.layer1[0].se.measured_gate.tolist() == pytest.approx([0.4, 0.39, 0.41])


def test_group_size_is_an_argument_of_tam_models():
    with torch.device("meta"):
        model = timm.create_model("resnet18_tam", group_size=8)
        assert model.layer1[0].se.group_size == 8
        with pytest.raises(TypeError):
            timm.create_model("resnet18_plain", group_size=8)


def test_untrained_entries_say_so():
    with pytest.raises(
        RuntimeError,
        match=r"resnet152_tam.svhn has no trained weights yet.*\. Pass weights of your own, or pretrained=F",
    ):
        timm.create_model("resnet152_tam.svhn", pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50_tamm", r"no model 'resnet50_tamm'; nearest: resnet50_tam"),
        ("ResNet18_TAM", r"no model 'ResNet18_TAM'; nearest: resnet18_tam"),
        ("resnet50_tam.cifar11", r"no tag 'cifar11'; expected one of cifar100, cifar10"),
        ("zzz", r"no model 'zzz'. All names: tamzoo list --all"),
    ],
)
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        find_model(name)


def test_importing_costs_no_heavy_library():
    heavy = "onnx onnxruntime onnxscript pyarrow matplotlib triton typer rich".split()
    code = "import timm, sys; old = set(sys.modules); import tamzoo; print(*(set(sys.modules) - old))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "tamzoo.registry" in found
    assert not set(heavy) & set(found)
