"""Bounds of gates by interval arithmetic: through a tree, and from the picture through the whole network.

A value is known by the ends of an interval in which it lies, in float64; every step widens it by what float32
can round there, added up in any order.
"""

import operator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv2d
from torch.nn.modules.batchnorm import _BatchNorm  # of several processes too

from tamzoo.attention import TAM

HALF_ULP = 2.0**-24  # relative rounding error of one float32 operation
LARGEST = torch.finfo(torch.float32).max
RISING = (nn.ReLU, nn.Identity, nn.Dropout, nn.MaxPool2d)  # they take the ends of an interval to its ends
Interval = tuple[Tensor, Tensor]


@torch.no_grad()
def gate_bounds(gate: TAM, low: Tensor, high: Tensor) -> tuple[float, float]:
    """Bounds of a gate whose input channels lie in [low, high], by interval arithmetic through the tree.

    Args:
        low: (c,), smallest value of each channel.
        high: (c,), largest.
    Returns:
        Lower and upper bound in [0, 1], widened by what float32 rounding can add in the tree; 0 and 1 where
        it may overflow there.
    """
    try:
        return _through_tree(gate, low.double(), high.double())
    except _Unknown:
        return 0.0, 1.0


def _through_tree(gate: TAM, low: Tensor, high: Tensor) -> tuple[float, float]:
    for layer in gate.tree:
        terms = 1
        if isinstance(layer, nn.Conv2d):
            groups, terms = layer.groups, layer.in_channels // layer.groups
            weight = layer.weight.double().view(groups, -1, terms)  # (groups, outputs, inputs)
            low, high = low.view(groups, 1, terms), high.view(groups, 1, terms)
            ends = weight * low, weight * high
            size = torch.maximum(ends[0].abs(), ends[1].abs()).sum(2).flatten()
            low = torch.minimum(*ends).sum(2).flatten()
            high = torch.maximum(*ends).sum(2).flatten()
            if layer.bias is not None:
                bias = layer.bias.double()
                low, high, size = low + bias, high + bias, size + bias.abs()
        else:
            assert isinstance(layer, nn.PReLU)
            ends = [torch.where(end < 0, layer.weight.double() * end, end) for end in (low, high)]
            touches_zero = (low < 0) & (high > 0)
            ends.append(torch.where(touches_zero, torch.zeros_like(low), ends[0]))
            low, high = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
            size = torch.maximum(low.abs(), high.abs())
        low, high = _step(low, high, size, terms + 1)
    # a float32 sigmoid is off by a few units in the last place, and 0 below the smallest normal number
    least = torch.sigmoid(low).item() * (1 - 8 * HALF_ULP) - torch.finfo(torch.float32).tiny
    return max(0.0, least), min(1.0, torch.sigmoid(high).item() * (1 + 8 * HALF_ULP))


@torch.no_grad()
def bound_gates(model: nn.Module, low: Tensor, high: Tensor) -> dict[str, tuple[float, float]]:
    """Bounds of every TAM gate for all inputs between two; the black and the white picture: for all pictures.

    Where the bounds of a gate are one number up to rounding, the gate is proven to be a constant: no picture
    of that size, seen or not, moves it.

    Args:
        model: One of ours, in eval mode and float32, of which the rounding is, or float64, which rounds less.
        low: (1, c, h, w), normalised as the model wants it, nowhere above `high`.
        high: As low.
    Returns:
        Gate name -> lower and upper bound in [0, 1]: 0 and 1 where the features may leave float32's range, or
        come from a layer of which no rule is known.
    Raises:
        ValueError: training mode, or a coarser precision.
    """
    if model.training:
        raise ValueError("bounding gates needs a model in eval mode; call model.eval() first")
    if (dtype := next(model.parameters()).dtype) not in (torch.float32, torch.float64):
        raise ValueError(f"bounds are of float32 and its rounding, the model's weights are {dtype}")
    intervals = _Intervals(fx.GraphModule(model, _Tracer().trace(model)))
    with suppress(_Unknown):
        intervals.run(_step(low.double(), high.double()))
    names = (name for name, module in model.named_modules() if isinstance(module, TAM))
    return {name: intervals.gates.get(name, (0.0, 1.0)) for name in names}


class _Unknown(Exception):
    """There is no rule for a layer, or float32 may overflow in it."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (TAM, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


class _Intervals(fx.Interpreter):
    """A traced network on intervals, from its input to its last gate."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.gates: dict[str, tuple[float, float]] = {}
        self._most = sum(isinstance(module, TAM) for module in traced.modules())

    def run_node(self, n: fx.Node) -> Any:
        return super().run_node(n) if len(self.gates) < self._most else None

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
        module, (low, high) = self.fetch_attr(target), args[0]
        if isinstance(module, TAM):
            least, most = _through_tree(module, low.amin((0, 2, 3)), high.amax((0, 2, 3)))
            self.gates[target] = least, most
            low = torch.where(low < 0, low * most, low * least)
            return _step(low, torch.where(high < 0, high * least, high * most))
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            return _convolution(module, low, high)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            return _batch_norm(module, low, high)
        if isinstance(module, RISING):
            return module(low.clone()), module(high.clone())
        raise _Unknown(target)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
        if target not in (operator.add, operator.iadd):
            raise _Unknown(target)
        (low, high), (other_low, other_high) = args
        return _step(low + other_low, high + other_high)


def _stays_finite(size: Tensor) -> bool:
    return size.max().item() < LARGEST  # and NaN is not


def _widened(low: Tensor, high: Tensor, size: Tensor, terms: int) -> Interval:
    """By twice what float32 can round in a sum of so many terms whose absolute values come to `size`."""
    rounding = 2 * HALF_ULP * terms * size
    return low - rounding, high + rounding


def _step(low: Tensor, high: Tensor, size: Tensor | None = None, terms: int = 2) -> Interval:
    """The result of a layer; `size` is by default the result's."""
    size = torch.maximum(low.abs(), high.abs()) if size is None else size
    if not _stays_finite(size):
        raise _Unknown
    return _widened(low, high, size, terms)


def _convolution(layer: nn.Conv2d, low: Tensor, high: Tensor) -> Interval:
    """By centre and radius, each a convolution."""
    centre, radius, weight = (low + high) / 2, (high - low) / 2, layer.weight.double()
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if layer.bias is None else layer.bias.double()
    how: Any = layer.stride, layer.padding, layer.dilation, layer.groups
    middle, reach = conv2d(centre, weight, bias, *how), conv2d(radius, weight.abs(), None, *how)
    size = conv2d(centre.abs() + radius, weight.abs(), bias.abs(), *how)
    return _step(middle - reach, middle + reach, size, weight[0].numel() + 1)


def _batch_norm(layer: _BatchNorm, low: Tensor, high: Tensor) -> Interval:
    assert layer.running_mean is not None and layer.running_var is not None
    mean, scale = layer.running_mean.double(), torch.rsqrt(layer.running_var.double() + layer.eps)
    scale = layer.weight.double() * scale if layer.affine else scale
    bias = layer.bias.double() if layer.affine else torch.zeros_like(scale)
    mean, scale, bias = (value[:, None, None] for value in (mean, scale, bias))
    ends = (low - mean) * scale + bias, (high - mean) * scale + bias
    size = (torch.maximum(low.abs(), high.abs()) + mean.abs()) * scale.abs() + bias.abs()
    return _step(torch.minimum(*ends), torch.maximum(*ends), size, 8)
