"""Gates that move, made constants: afterwards the model is static by construction and folds whole."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from tamzoo.attention import GATE_TOLERANCE
from tamzoo.gates import gates_of, remember_gates
from tamzoo.records import GateStats


@torch.no_grad()
def freeze_gates(
    model: nn.Module, gates: Iterable[GateStats], tolerance: float = GATE_TOLERANCE
) -> dict[str, float]:
    """Turns every gate that moves into the number that it is on average, in place.

    The last convolution of its tree loses its weights and gets the bias whose sigmoid is the mean: the
    layers stay, and the weights load wherever they did. Static gates are left alone.

    Args:
        gates: From `measure_gates` on this model.
        tolerance: Largest width (maximum - minimum) of a gate that counts as static.
    Returns:
        Gate name -> its constant, of the gates that were frozen; they need to be measured again.
    Raises:
        ValueError: a gate that the model does not have, or a mean of 0 or 1, which no bias gives.
    """
    remember_gates(model, gates := list(gates))
    frozen = {gate.name: gate.mean for gate in gates if not gate.width <= tolerance}
    for name, mean in frozen.items():
        if not 0 < mean < 1:
            raise ValueError(f"gate {name} is {mean} on average; expected a number between 0 and 1")
    for name, mean in frozen.items():
        gate = gates_of(model)[name]
        last = gate.tree[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        last.weight.zero_()
        last.bias.fill_(math.log(mean / (1 - mean)))
        gate.forget_gate()
    return frozen
