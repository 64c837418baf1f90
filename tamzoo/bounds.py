"""Bounds of gates: through a tree, and from the picture through the whole network.

A feature is known by the ends of an interval in which it lies, and a position by a ball in which its channels
lie together: in deep networks the ends part far faster than the ball grows. All of it is in float64, and
every step widens it by what float32 can round there, added up in any order. Convolutions that transform whole
tiles (Winograd, FFT), as cuDNN and NNPACK may choose, round otherwise, which the bounds leave out.
"""

import operator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv2d
from torch.nn.modules.batchnorm import _BatchNorm  # of several processes too

from tamzoo.attention import TAM
from tamzoo.distributed import GlobalBatchNorm
from tamzoo.tree import is_plain, ordinary

HALF_ULP = 2.0**-24  # relative rounding error of one float32 operation
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
FAINT = SMALLEST / HALF_ULP  # what underflows to 0 is less than the rounding of this
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, GlobalBatchNorm)
RISING = (nn.ReLU, nn.Identity, nn.Dropout, nn.MaxPool2d)  # they take the ends of an interval to its ends


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


@torch.no_grad()
def bound_gates(model: nn.Module, low: Tensor, high: Tensor) -> dict[str, tuple[float, float]]:
    """Bounds of every TAM gate for all inputs between `low` and `high`: from black to white, all pictures.

    Where the bounds of a gate are one number up to rounding, the gate is proven to be a constant: no picture
    of that size, seen or not, moves it.

    Args:
        model: One of ours, in eval mode and float32, of which the rounding is, or float64, which rounds less.
        low: (1, c, h, w), normalised as the model wants it, nowhere above `high`.
        high: As low.
    Returns:
        Gate name -> lower and upper bound in [0, 1]: 0 and 1 where the features may leave float32's range, or
        come from a layer of which no rule is known, which is in training mode, or which a hook or a subclass
        may have changed.
    Raises:
        ValueError: training mode, or a coarser precision.
    """
    if model.training:
        raise ValueError("bounding gates needs a model in eval mode; call model.eval() first")
    if (dtype := next(model.parameters()).dtype) not in (torch.float32, torch.float64):
        raise ValueError(f"bounds are of float32 and its rounding, the model's weights are {dtype}")
    found = {name: (0.0, 1.0) for name, module in model.named_modules() if isinstance(module, TAM)}
    low, high = low.double(), high.double()
    if found:
        with suppress(_Unknown):
            _Regions(_traced(model), found).run(_region(low, high, (low + high) / 2))
    return found


class _Unknown(Exception):
    """There is no rule for a layer, or float32 may overflow in it."""


def _traced(model: nn.Module) -> fx.GraphModule:
    if model._forward_pre_hooks or "forward" in vars(model):  # which a trace leaves out
        raise _Unknown
    try:
        return fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:  # of any kind: it runs whatever layers users put there
        raise _Unknown from error


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """With the head, which may be anybody's, and behind all gates."""
        head = module_qualified_name.rpartition(".")[2] in ("global_pool", "fc")
        return head or isinstance(m, (TAM, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True, kw_only=True)
class _Region:
    """Where the features between two layers can be.

    Attributes:
        low: (1, c, h, w), the lower end of each one's interval; high, the upper.
        centre: (1, c, h, w), what the input midway between the two gives, were nothing rounded and every
            gate midway between its bounds.
        radius: (1, 1, h, w), the longest Euclidean distance of a position's c features from the centre's,
            each divided by its channel's `scale`.
        scale: (1, c, 1, 1), above 0.
    """

    low: Tensor
    high: Tensor
    centre: Tensor
    radius: Tensor
    scale: Tensor


def _region(
    low: Tensor,
    high: Tensor,
    centre: Tensor,
    radius: Tensor | None = None,
    scale: Tensor | None = None,
    size: Tensor | None = None,
    terms: int = 2,
) -> _Region:
    """The result of a layer, widened by what it rounds, each of box and ball cut to the other.

    Args:
        radius: None where nothing is known beyond the ends.
        scale: By default 1 everywhere.
        size: As of `_rounding`; by default the result's.
    """
    scale = torch.ones_like(low[:, :, :1, :1]) if scale is None else scale
    rounding = _rounding(torch.maximum(low.abs(), high.abs()) if size is None else size, terms)
    low, high = low - rounding, high + rounding
    farthest = _length(torch.maximum(high - centre, centre - low) / scale)
    radius = farthest if radius is None else torch.minimum(radius + _length(rounding / scale), farthest)
    low, high = torch.maximum(low, centre - radius * scale), torch.minimum(high, centre + radius * scale)
    return _Region(low=low, high=high, centre=centre, radius=radius, scale=scale)


def _length(x: Tensor) -> Tensor:
    """Of each position's channels: (1, c, h, w) -> (1, 1, h, w)."""
    return x.norm(dim=1, keepdim=True)


class _Regions(fx.Interpreter):
    """A traced network on regions, from its input to its last gate, of which it writes the bounds.

    Raises:
        _Unknown: a gate is called twice: what is found for the first call need not hold for the other. Or a
            layer writes over what another still reads.
    """

    def __init__(self, traced: fx.GraphModule, gates: dict[str, tuple[float, float]]) -> None:
        called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
        if any(called.count(name) > 1 for name in gates):
            raise _Unknown
        if any(_overwrites(node, traced) for node in traced.graph.nodes):
            raise _Unknown
        _join_convolutions(traced)
        super().__init__(traced)
        self._gates, self._left = gates, sum(name in gates for name in called)
        self._convolution: nn.Conv2d | None = None  # that the BatchNorm which runs has taken in

    def run_node(self, n: fx.Node) -> Any:
        self._convolution = n.meta.get("convolution")
        return super().run_node(n) if self._left else None

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Region:
        if kwargs:
            raise _Unknown(target)
        module, x = self.fetch_attr(target), args[0]
        if _plain(module, TAM):
            self._gates[target] = _through_tree(module, x.low.amin((0, 2, 3)), x.high.amax((0, 2, 3)))
            self._left -= 1
            return _product(x, *self._gates[target])
        if _plain(module, nn.Conv2d) and module.padding_mode == "zeros":
            return _affine(x, module, None)
        if _plain(module, *NORMS) and module.running_mean is not None:
            return _affine(x, self._convolution, module)
        if _plain(module, *RISING):
            low, high, centre = (module(end.clone()) for end in (x.low, x.high, x.centre))
            pools = isinstance(module, nn.MaxPool2d)  # a position's channels come from several
            return _region(low, high, centre, None if pools else x.radius, x.scale, terms=0)
        raise _Unknown(target)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Region:
        raise _Unknown(target)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Region:
        sums = target in (operator.add, operator.iadd)
        if not (sums and all(isinstance(arg, _Region) for arg in args)):
            raise _Unknown(target)
        x, y = args
        radius = x.radius * x.scale.max() + y.radius * y.scale.max()
        return _region(x.low + y.low, x.high + y.high, x.centre + y.centre, radius)


def _plain(module: Any, *types: type[nn.Module]) -> bool:
    """As `is_plain`, in eval mode."""
    return is_plain(module, *types) and not (module.training and isinstance(module, (*NORMS, nn.Dropout)))


def _overwrites(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether it works in place on features that something else reads, too."""

    def layer(node: fx.Node) -> nn.Module | None:
        return traced.get_submodule(str(node.target)) if node.op == "call_module" else None

    if not (node.target is operator.iadd or getattr(layer(node), "inplace", False)):
        return False
    source: Any = node.args[0]
    while len(source.users) == 1 and isinstance(layer(source), (nn.Identity, nn.Dropout)):
        source = source.args[0]  # they give what they get
    return len(source.users) > 1


def _join_convolutions(traced: fx.GraphModule) -> None:
    """Has each BatchNorm do the work of the convolution before it, too, where nothing else wants its result.

    One step keeps the ball smaller than two: the axis along which it grows most may be the one that shrinks.
    """
    called = (node for node in traced.graph.nodes if node.op == "call_module")
    modules = {node: traced.get_submodule(node.target) for node in called}
    for norm in [node for node, module in modules.items() if _plain(module, *NORMS)]:
        before: Any = norm.args[0]
        layer: Any = modules.get(before)
        if _plain(layer, nn.Conv2d) and layer.padding_mode == "zeros" and len(before.users) == 1:
            norm.args, norm.meta["convolution"] = before.args, layer
            traced.graph.erase_node(before)


def _rounding(size: Tensor, terms: int) -> Tensor:
    """Twice what float32 can round in sums of so many terms whose absolute values come to `size`."""
    _check_range(size)
    return 2 * HALF_ULP * terms * (size + FAINT)


def _check_range(size: Tensor) -> None:
    if not size.max().item() < LARGEST:  # nor NaN
        raise _Unknown


def _through_tree(gate: TAM, low: Tensor, high: Tensor) -> tuple[float, float]:
    if not ordinary(gate.tree):
        raise _Unknown
    x = _region(*(end.view(1, -1, 1, 1) for end in (low, high, (low + high) / 2)), terms=0)
    for layer in gate.tree:
        x = _affine(x, layer, None) if isinstance(layer, nn.Conv2d) else _prelu(x, layer)
    # a float32 sigmoid is off by a few units in the last place, and 0 below the smallest normal number
    least = torch.sigmoid(x.low.min()).item() * (1 - 8 * HALF_ULP) - SMALLEST
    return max(0.0, least), min(1.0, torch.sigmoid(x.high.max()).item() * (1 + 8 * HALF_ULP))


def _prelu(x: _Region, layer: nn.Module) -> _Region:
    assert isinstance(layer, nn.PReLU)
    slope = layer.weight.double().view(1, -1, 1, 1)
    low, high, centre = (torch.where(value < 0, slope * value, value) for value in (x.low, x.high, x.centre))
    # a falling slope turns the interval round, with 0 at its lower end where it holds that
    ends = torch.stack([low, high, torch.where((x.low < 0) & (x.high > 0), 0, low)])
    steepest = torch.maximum(slope.abs() * (x.low < 0), 1.0 * (x.high > 0)).amax((2, 3), keepdim=True)
    scale = x.scale * steepest.clamp(min=SMALLEST)
    size = ends.abs().amax(0) + FAINT * torch.maximum(x.low.abs(), x.high.abs())
    return _region(ends.amin(0), ends.amax(0), centre, x.radius, scale, size)


def _product(x: _Region, least: float, most: float) -> _Region:
    """With a gate between `least` and `most`."""
    low = torch.where(x.low < 0, x.low * most, x.low * least)
    high = torch.where(x.high < 0, x.high * least, x.high * most)
    radius = most * x.radius + (most - least) / 2 * _length(x.centre / x.scale)
    return _region(low, high, x.centre * (least + most) / 2, radius, x.scale)


def _affine(x: _Region, layer: nn.Conv2d | None, norm: _BatchNorm | None) -> _Region:
    """A convolution, a BatchNorm, or the one and then the other, in one step."""
    if layer is None:
        weight, how = torch.ones_like(x.centre[0, :, :1, :1, None]), (1, 0, 1, x.centre.shape[1])
    else:
        weight = layer.weight.double()
        how: Any = layer.stride, layer.padding, layer.dilation, layer.groups
    bias = torch.zeros_like(weight[:, 0, 0, 0])
    if layer is not None and layer.bias is not None:
        bias = layer.bias.double()
    middle, reach, terms = (x.low + x.high) / 2, (x.high - x.low) / 2, weight[0].numel() + 1
    size = conv2d(middle.abs() + reach + FAINT, weight.abs() + FAINT, bias.abs() + FAINT, *how)
    _check_range(size)  # before LAPACK sees a NaN
    if norm is not None:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, factor = norm.running_mean.double(), torch.rsqrt(norm.running_var.double() + norm.eps)
        factor = norm.weight.double() * factor if norm.affine else factor
        shift = norm.bias.double() if norm.affine else torch.zeros_like(factor)
        size = size + mean.abs()[:, None, None]
        _check_range(size)
        _check_range(factor.abs())
        size = size * (factor.abs() + FAINT)[:, None, None] + shift.abs()[:, None, None]
        terms += 8
        weight, bias = weight * factor[:, None, None, None], (bias - mean) * factor + shift
    middle, reach = conv2d(middle, weight, bias, *how), conv2d(reach, weight.abs(), None, *how)
    low, high, centre = middle - reach, middle + reach, conv2d(x.centre, weight, bias, *how)
    # a position is a matrix times its patch, of which the distances of its positions are known
    patch = conv2d(x.radius**2, torch.ones_like(weight[:1, :1]), None, *how[:3]).sqrt()
    matrix = weight.view(how[3], -1, *weight.shape[1:]) * x.scale.view(how[3], 1, -1, 1, 1)
    matrix = matrix.flatten(2)  # (groups, outputs, inputs)
    rows = matrix.norm(dim=2).view(1, -1, 1, 1)
    if matrix.shape[1] == 1:  # outputs that share no input
        return _region(low, high, centre, patch, rows.clamp(min=SMALLEST), size, terms)
    low, high = torch.maximum(low, centre - rows * patch), torch.minimum(high, centre + rows * patch)
    return _region(low, high, centre, _spectral_norm(matrix) * patch, None, size, terms)


def _spectral_norm(matrix: Tensor) -> Tensor:
    """By how much the matrices, (n, rows, columns), stretch at most."""
    gram = matrix @ matrix.mT if matrix.shape[1] < matrix.shape[2] else matrix.mT @ matrix
    longest = torch.linalg.eigvalsh(gram)[:, -1].max().clamp(min=0).sqrt()
    return longest * (1 + 1e-9)  # float64 rounds less than that
