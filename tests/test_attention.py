import math

import pytest
import torch
from torch import nn

from tamzoo import CBAM, SE, TAM
from tamzoo.attention import ATTENTIONS, Scalar


def gate_by_loops(module: TAM, pixel: list[float]) -> float:
    """Eq. 1-2 for one position, channel by channel, in Python floats."""
    values = pixel
    for layer in module.tree:
        weight = layer.weight.flatten(1).tolist() if isinstance(layer, nn.Conv2d) else layer.weight.tolist()
        if isinstance(layer, nn.PReLU):
            values = [v if v >= 0 else slope * v for v, slope in zip(values, weight, strict=True)]
        else:
            seen = len(weight[0])
            bias = layer.bias.tolist()
            values = [
                sum(w * v for w, v in zip(row, values[index * seen : (index + 1) * seen], strict=True))
                + bias[index]
                for index, row in enumerate(weight)
            ]
    assert len(values) == 1
    return 1 / (1 + math.exp(-values[0]))


@pytest.mark.parametrize(
    ("channels", "group_size"),
    [(1, 2), (2, 2), (7, 2), (48, 4), (64, 2), (6, 2), (27, 3), (64, 64), (5, 64), (12, 5)],
)
def test_the_gate_equals_a_loop_written_from_the_equations(channels, group_size):
    module = TAM(channels, group_size).double().eval()
    for layer in module.tree:
        if isinstance(layer, nn.PReLU):
            nn.init.uniform_(layer.weight, -0.5, 1.5)
    x = torch.randn(2, channels, 2, 3, dtype=torch.float64)
    gate = module.gate(x)
    assert gate.shape == (2, 1, 2, 3)
    for n in range(2):
        for h in range(2):
            for w in range(3):
                expected = gate_by_loops(module, x[n, :, h, w].tolist())
                assert abs(gate[n, 0, h, w].item() - expected) <= 1e-12
    torch.testing.assert_close(module(x), x * gate, rtol=0, atol=1e-12)  # sums in another order


@pytest.mark.parametrize(("channels", "group_size"), [(8, 2), (12, 3), (7, 2)])
def test_gradients_are_right(channels, group_size):
    module = TAM(channels, group_size).double()
    for layer in module.tree:
        if isinstance(layer, nn.PReLU):
            nn.init.constant_(layer.weight, 0.3)
    x = torch.randn(2, channels, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *(p.detach().requires_grad_() for p in module.parameters())))


@pytest.mark.parametrize("channels", [2, 16, 64, 2048])
def test_a_power_of_two_has_the_parameters_of_equation_2(channels):
    assert sum(p.numel() for p in TAM(channels).parameters()) == 4 * channels - 5


def test_slopes_start_as_relu_and_convolutions_he_normal():
    module = TAM(4096)
    assert all((layer.weight == 0).all() for layer in module.tree if isinstance(layer, nn.PReLU))
    first = module.tree[0]
    expected = math.sqrt(2 / 2048)  # fan-out of a 1x1 convolution: its output channels
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    assert abs(first.weight.std().item() / expected - 1) < 0.05


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, None, "64"])
def test_senseless_channels_are_refused(wrong):
    with pytest.raises(ValueError, match="channels must be an integer of at least 1"):
        TAM(wrong)


@pytest.mark.parametrize("wrong", [1, 0, -2, 2.0, True, None])
def test_senseless_group_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="group_size must be an integer of at least 2"):
        TAM(64, wrong)


@pytest.mark.parametrize("attention", [SE, CBAM, TAM, Scalar])
def test_every_attention_keeps_the_shape(attention):
    x = torch.randn(2, 64, 5, 3)
    assert attention(64)(x).shape == x.shape


def test_a_forward_pass_in_training_forgets_the_measured_gate():
    module = TAM(8).eval()
    module.measured_gate.copy_(torch.tensor([0.4, 0.39, 0.41]))
    module(torch.randn(1, 8, 2, 2))
    assert module.measured_gate[1] > 0, "evaluation keeps it"
    module.train()(torch.randn(1, 8, 2, 2))
    assert module.measured_gate.tolist() == [0.0, 0.0, 0.0]


def test_weights_that_know_nothing_of_gates_load_strictly():
    module = TAM(8)
    module.measured_gate.copy_(torch.tensor([0.4, 0.39, 0.41]))
    state = {name: value for name, value in module.state_dict().items() if name != "measured_gate"}
    module.load_state_dict(state)
    assert module.measured_gate.tolist() == [0.0, 0.0, 0.0]


def test_weights_of_other_layers_leave_the_gate_as_measured():
    model = nn.Sequential(TAM(8), nn.Linear(2, 2))
    model[0].measured_gate.copy_(torch.tensor([0.4, 0.39, 0.41]))
    model.load_state_dict({"1.bias": torch.zeros(2)}, strict=False)
    assert model[0].measured_gate[0] > 0


def test_a_model_without_memory_takes_weights_that_know_nothing_of_gates():
    state = {name: value for name, value in TAM(8).state_dict().items() if name != "measured_gate"}
    module = TAM(8, device="meta")
    module.load_state_dict(state, assign=True)
    assert module.measured_gate.tolist() == [0.0, 0.0, 0.0]


def test_autocast_gates_stay_close():
    module = TAM(64).eval()
    x = torch.randn(2, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    torch.testing.assert_close(found.float(), module(x), rtol=0.05, atol=0.05)  # bfloat16 has 8 bits


@pytest.mark.parametrize("attention", [made for made in ATTENTIONS.values() if made])
def test_what_autocast_made_half_as_wide_stays_so(attention):
    x = torch.randn(2, 16, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(16)(x).dtype == torch.bfloat16
