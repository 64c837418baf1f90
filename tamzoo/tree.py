"""x * sigmoid(tree(x)) that reads x once and writes once, for trees of group size 2.

The plain tree writes and reads twice the size of x per level's operator and keeps all of it for the
backward pass. Here the tree is climbed tile by tile, so that everything between x and the product stays
in the cache, and the backward pass climbs it again: only x and the parameters are kept.
"""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import prelu

BLOCK = 16  # channels of one dense block of a level: small wastes less, large multiplies faster
TILE = 1 << 17  # elements of x per thread and tile; x, gradient and tree together stay in a 1-2 MB cache


def gated(x: Tensor, tree: nn.Sequential) -> Tensor:
    """The product x * sigmoid(tree(x)), by the fastest way that gives it.

    Args:
        x: (n, c, h, w).
        tree: Point-wise convolutions and PReLUs as TAM stacks them, to one channel.
    Returns:
        (n, c, h, w), in the memory format of x.
    """
    if not _fits(x, tree):
        return x * torch.sigmoid(tree(x))
    # one vector: weights, biases, slopes of the first level, then of the next
    return gate_product(x, torch.cat([parameter.flatten() for parameter in tree.parameters()]))


def _fits(x: Tensor, tree: nn.Sequential) -> bool:
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing():
        return False  # what leaves torch is made of standard operators
    if x.dim() != 4 or x.numel() == 0 or not _halves(tree, x.shape[1]):
        return False
    if x.is_cuda:
        dense = x.is_contiguous(memory_format=torch.channels_last)
        return dense and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and _has_triton()
    return x.device.type == "cpu" and x.is_floating_point()


def _halves(tree: nn.Sequential, channels: int) -> bool:
    """Whether every level of the tree has half the channels of the level before, down to one."""
    count = sum(parameter.numel() for parameter in tree.parameters())
    levels = (len(tree) + 1) // 2
    return levels > 0 and channels == 2**levels and count == 4 * channels - 5


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class Level(NamedTuple):
    """One level of the tree, from `width` channels to half as many, as dense blocks of neighbours."""

    weight: Tensor  # (width / b, b / 2, b), zero where a node does not look
    bias: Tensor  # (width / b, b / 2, 1)
    slope: Tensor | None  # (width / 2,); none after the last level


def _levels(parameters: Tensor, channels: int) -> list[Level]:
    levels, width = [], channels
    while width > 1:
        half, block = width // 2, min(width, BLOCK)
        weight, bias, slope, parameters = parameters.tensor_split((width, width + half, 2 * width))
        eye = torch.eye(block // 2, dtype=weight.dtype).unsqueeze(-1)
        weight = (weight.view(-1, block // 2, 1, 2) * eye).flatten(2)  # (., b/2, 1, 2) -> (., b/2, b)
        levels.append(Level(weight, bias.view(-1, block // 2, 1), slope if half > 1 else None))
        width = half
    return levels


def _climb(planes: Tensor, levels: list[Level]) -> tuple[list[Tensor], list[Tensor]]:
    """What enters each level, and what its convolution makes of it: (width, r), (width / 2, r)."""
    entering, leaving = [], []
    for weight, bias, slope in levels:
        entering.append(planes)
        blocks = planes.view(weight.shape[0], weight.shape[2], -1)
        planes = torch.baddbmm(bias, weight, blocks).view(1, planes.shape[0] // 2, -1)
        leaving.append(planes[0])
        if slope is not None:
            planes = prelu(planes, slope)[0]
    return entering, leaving


def _tiles(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts into whole images, or rows of one image, of at most TILE elements a thread where possible."""
    n, c, h, w = x.shape
    size = TILE * torch.get_num_threads()
    images = max(1, size // (c * h * w))
    rows = h if images > 1 else min(h, max(1, size // (c * w)))
    for image in range(0, n, images):
        for row in range(0, h, rows):
            yield slice(image, image + images), slice(None), slice(row, row + rows)


def _planes(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, c, h, w) -> (c, n * h * w); a view where memory and dtype allow."""
    return tile.transpose(0, 1).reshape(tile.shape[1], -1).to(dtype)


def _computing(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@torch.library.custom_op("tamzoo::gate_product", mutates_args=(), device_types="cpu")
def gate_product(x: Tensor, parameters: Tensor) -> Tensor:
    """x * sigmoid(tree(x)) of the tree with these parameters.

    Args:
        x: (n, c, h, w) with c a power of two.
        parameters: (4c - 5,), level by level: weights, biases, slopes.
    """
    out, dtype = torch.empty_like(x), _computing(x.dtype)
    with torch.autocast("cpu", enabled=False):
        levels = _levels(parameters.to(dtype), x.shape[1])
        for tile in _tiles(x):
            _, leaving = _climb(_planes(x[tile], dtype), levels)
            gate = leaving[-1].sigmoid_().to(x.dtype)
            n, _, h, w = x[tile].shape
            torch.mul(x[tile], gate.view(n, 1, h, w), out=out[tile])
    return out


@torch.library.custom_op("tamzoo::gate_product_backward", mutates_args=(), device_types="cpu")
def gate_product_backward(grad: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_product` with respect to x and parameters, given that of its result."""
    grad_x, dtype = torch.empty_like(x), _computing(x.dtype)
    with torch.autocast("cpu", enabled=False):
        levels = _levels(parameters.to(dtype), x.shape[1])
        sums = [Level(*(None if part is None else torch.zeros_like(part) for part in level)) for level in levels]
        for tile in _tiles(x):
            planes, grad_planes = _planes(x[tile], dtype), _planes(grad[tile], dtype)
            entering, leaving = _climb(planes, levels)
            gate = leaving[-1].sigmoid_()
            below = grad_planes * gate
            above = (grad_planes * planes).sum(0, keepdim=True) * gate * (1 - gate)
            _descend(above, below, entering, leaving, levels, sums)
            n, c, h, w = x[tile].shape
            grad_x[tile].copy_(below.view(c, n, h, w).transpose(0, 1))
    return grad_x, _flat(sums).to(parameters.dtype)


def _descend(
    above: Tensor,
    below: Tensor,
    entering: list[Tensor],
    leaving: list[Tensor],
    levels: list[Level],
    sums: list[Level],
) -> None:
    """Takes the gradient at the root, (1, r), to the leaves; adds it to `below`, (c, r), and to `sums`."""
    for level in reversed(range(len(levels))):
        weight, _, slope = levels[level]
        blocks, half, width = weight.shape
        if slope is not None:
            y, total = leaving[level], sums[level].slope
            assert total is not None
            total += (above * y.clamp(max=0)).sum(1)
            positive = torch.ops.aten.threshold_backward(above, y, 0)  # above where y > 0, else 0
            above = torch.lerp(positive, above, slope.unsqueeze(-1))
        above = above.view(blocks, half, -1)
        sums[level].weight.baddbmm_(above, entering[level].view(blocks, width, -1).transpose(1, 2))
        sums[level].bias.add_(above.sum(2, keepdim=True))
        if level == 0:
            below.view(blocks, width, -1).baddbmm_(weight.transpose(1, 2), above)
        else:
            above = torch.bmm(weight.transpose(1, 2), above).view(blocks * width, -1)


def _flat(levels: list[Level]) -> Tensor:
    """The inverse of `_levels`: (4c - 5,)."""
    parts = []
    for weight, bias, slope in levels:
        pairs = weight.unflatten(2, (-1, 2)).diagonal(dim1=1, dim2=2)  # (., b/2, b/2, 2) -> (., 2, b/2)
        parts += [pairs.transpose(1, 2).flatten(), bias.flatten()]
        if slope is not None:
            parts.append(slope)
    return torch.cat(parts)


@gate_product.register_fake
def _(x: Tensor, parameters: Tensor) -> Tensor:
    return torch.empty_like(x)


@gate_product_backward.register_fake
def _(grad: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(parameters)


def _remember(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return gate_product_backward(grad, *ctx.saved_tensors)


gate_product.register_autograd(_differentiate, setup_context=_remember)
