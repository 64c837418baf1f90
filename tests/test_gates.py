import pytest
import timm
import torch

from tamzoo import measure_gates
from tamzoo.gates import gates_of, remember_gates


@pytest.fixture
def model(shaken):
    return shaken(timm.create_model("resnet20_tam.cifar10"))


def test_statistics_equal_those_of_all_gate_values_at_once(model):
    images = torch.randn(11, 3, 32, 32)
    seen = {}
    hooks = [
        gate.register_forward_pre_hook(
            lambda gate, x, name=name: seen.update({name: gate.gate(x[0]).double()})
        )
        for name, gate in gates_of(model).items()
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    found = measure_gates(model, images, batch_size=4)
    assert [gate.name for gate in found] == list(seen)
    for gate in found:
        values = seen[gate.name]
        assert gate.n == 11
        assert gate.mean == pytest.approx(
            values.mean().item(), abs=1e-7
        )  # batches of another size round otherwise
        assert gate.std == pytest.approx(values.std(unbiased=False).item(), abs=1e-7)
        assert gate.min == pytest.approx(values.min().item(), abs=1e-6)
        assert gate.max == pytest.approx(values.max().item(), abs=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_measured_on_all_images(model, in_place):
    images, wrapped = torch.randn(10, 3, 32, 32), model
    wanted = measure_gates(model, images, batch_size=4)
    if in_place:
        model.compile(backend="eager")
    else:
        wrapped = torch.compile(model, backend="eager")
    with torch.inference_mode():
        wrapped(images[:4])
    found = measure_gates(wrapped, images, batch_size=4)
    assert found == wanted
    remember_gates(wrapped, found)
    assert all(gate.measured_gate[0] for gate in gates_of(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precisions_whose_rounding_hides_movement_are_refused(model, dtype):
    with pytest.raises(ValueError, match=rf"needs a float32 model, got {dtype}"):
        measure_gates(model.to(dtype), torch.randn(2, 3, 32, 32))


def test_autocast_does_not_round_what_is_measured(model):
    images = torch.randn(4, 3, 32, 32)
    expected = measure_gates(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert measure_gates(model, images) == expected


def test_batches_give_what_one_tensor_gives(model):
    images = torch.randn(8, 3, 32, 32)
    found = measure_gates(model, iter(images.split((3, 4, 1))))
    for several, one in zip(found, measure_gates(model, images, batch_size=8), strict=True):
        assert (several.name, several.n) == (one.name, 8)
        for field in ("mean", "std", "min", "max", "bound_min", "bound_max"):
            assert getattr(several, field) == pytest.approx(getattr(one, field), abs=1e-6), field


def test_blocks_and_stages_are_counted_from_the_stem(model):
    found = measure_gates(model, torch.randn(2, 3, 32, 32))
    assert [(gate.block, gate.stage) for gate in found] == [(i + 1, i // 3 + 1) for i in range(9)]
    model.layer1[1].se = None  # a folded block still counts as a block
    assert [gate.block for gate in measure_gates(model, torch.randn(2, 3, 32, 32))] == [
        1,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
    ]


def test_measured_gates_lie_within_the_bounds(model):
    for gate in measure_gates(model, 3 * torch.randn(8, 3, 32, 32)):
        assert 0 <= gate.bound_min <= gate.min <= gate.mean <= gate.max <= gate.bound_max <= 1


def test_remembered_gates_travel_with_the_state_dict(model):
    found = measure_gates(model, torch.randn(4, 3, 32, 32))
    remember_gates(model, found)
    other = timm.create_model("resnet20_tam.cifar10")
    other.load_state_dict(model.state_dict())
    for gate in found:
        buffer = other.get_submodule(gate.name).measured_gate
        assert buffer.tolist() == pytest.approx([gate.mean, gate.min, gate.max])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_that_a_file_rounded_are_not_measured(model, dtype):
    remember_gates(model, measure_gates(model, torch.randn(2, 3, 32, 32)))
    state = model.state_dict()
    model.load_state_dict(state)
    assert all(gate.measured_gate.any() for gate in gates_of(model).values())
    model.load_state_dict(
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    )
    assert not any(gate.measured_gate.any() for gate in gates_of(model).values())


def test_what_cannot_be_measured_is_refused(model):
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="1 images cannot show whether a gate is static"):
        measure_gates(model, images[:1])
    for batches, got in (
        (images[:0], r"torch.float32 \(0, 3, 32, 32\)"),
        (images[0], r"torch.float32 \(3, 32, 32\)"),
        (images.byte(), r"torch.uint8 \(2, 3, 32, 32\)"),
        ([(images, torch.zeros(2))], "tuple"),
    ):
        with pytest.raises(
            ValueError, match=rf"expected normalised images \(n, c, h, w\) in batches, got {got}"
        ):
            measure_gates(model, batches)
    with pytest.raises(ValueError, match="call model.eval"):
        measure_gates(model.train(), images)
    with pytest.raises(ValueError, match="ResNet has no TAM gates"):
        measure_gates(timm.create_model("resnet20_plain").eval(), images)
    with pytest.raises(ValueError, match="is not finite"):
        measure_gates(model.eval(), torch.full((2, 3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match="is not finite"):
        measure_gates(model, torch.cat([images, torch.full_like(images, torch.nan)]), batch_size=2)
    stats = measure_gates(model, images)
    with pytest.raises(ValueError, match="the model has no gate 'layer1.0.se'; it has none"):
        remember_gates(timm.create_model("resnet20_plain"), stats)
