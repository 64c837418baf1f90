"""x * sigmoid(tree(x)), reading x once and writing once, for trees of group size 2.

The plain tree moves several times the memory of x at every level, and keeps it for the backward pass.
Here the tree is climbed tile by tile, so that everything between x and the product stays in the cache,
and the backward pass climbs it again: only x and the parameters are kept.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import prelu

HAS_TRITON = find_spec("triton") is not None
BLOCKS = (
    16,
    8,
)  # neighbours of one dense block, first level and others: small wastes less, large runs faster
TILE = 1 << 18  # elements of x per thread and tile: larger leaves the cache, smaller is all overhead


def gated(x: Tensor, tree: nn.Sequential) -> Tensor:
    """The product x * sigmoid(tree(x)), by the fastest way that gives it.

    Args:
        x: (n, c, h, w).
        tree: Point-wise convolutions with PReLUs between them, to one channel.
    Returns:
        (n, c, h, w), in the memory format of x.
    """
    if not _fits(x, tree):
        return x * torch.sigmoid(tree(x))
    return gate_product(x, torch.cat([parameter.flatten() for parameter in tree.parameters()]))


def _fits(x: Tensor, tree: nn.Sequential) -> bool:
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing():
        return False  # what leaves torch is made of standard operators
    levels = (len(tree) + 1) // 2
    if x.dim() != 4 or x.numel() == 0 or x.shape[1] != 2**levels:  # no factor is below 2, so all are 2
        return False
    if x.is_cuda:
        dense = x.is_contiguous(memory_format=torch.channels_last)
        return HAS_TRITON and dense and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.device.type == "cpu" and x.is_floating_point()


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
        blocks = _blocks(levels)
        for tile in _tiles(x):
            gate = _climb(_planes(x[tile], dtype), levels, blocks)[-1].to(x.dtype)
            n, _, h, w = x[tile].shape
            torch.mul(x[tile], gate.view(n, 1, h, w), out=out[tile])
    return out


@torch.library.custom_op("tamzoo::gate_product_backward", mutates_args=(), device_types="cpu")
def gate_product_backward(grad: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_product` with respect to x and parameters, given that of its result."""
    grad_x, dtype = torch.empty_like(x), _computing(x.dtype)
    total = torch.zeros_like(parameters, dtype=dtype)
    with torch.autocast("cpu", enabled=False):
        levels, sums = _levels(parameters.to(dtype), x.shape[1]), _levels(total, x.shape[1])
        blocks = _blocks(levels)
        first = torch.zeros_like(blocks[0])
        for tile in _tiles(x):
            below = _planes(grad_x[tile], dtype)
            planes, grad_planes = _planes(x[tile], dtype), _planes(grad[tile], dtype)
            _descend(planes, grad_planes, below, levels, blocks, sums, first)
            if below.data_ptr() != grad_x[tile].data_ptr():  # a copy, not a view
                n, c, h, w = x[tile].shape
                grad_x[tile].copy_(below.view(c, n, h, w).transpose(0, 1))
        nodes = first.unflatten(2, (-1, 2)).diagonal(dim1=1, dim2=2)  # (., b/2, b/2, 2) -> (., 2, b/2)
        sums[0].weight.copy_(nodes.transpose(1, 2).reshape(-1, 2, 1))
    return grad_x, total.to(parameters.dtype)


class Level(NamedTuple):
    """Views of the parameters of one level of the tree, from `width` channels to half as many."""

    weight: Tensor  # (width / 2, 2, 1)
    bias: Tensor  # (width / 2, 1)
    slope: Tensor  # (width / 2, 1); empty at the root


def _levels(parameters: Tensor, channels: int) -> list[Level]:
    halves = [channels >> level for level in range(1, channels.bit_length())]
    sizes = [size for half in halves for size in (2 * half, half, half if half > 1 else 0)]
    parts = iter(parameters.split(sizes))
    return [
        Level(next(parts).view(half, 2, 1), next(parts).view(half, 1), next(parts).view(-1, 1))
        for half in halves
    ]


def _blocks(levels: list[Level]) -> list[Tensor]:
    """Each level's weights for b neighbours a time, (width / b, b / 2, b): 0 where a node does not look."""
    blocks = []
    for weight, _, _ in levels:
        half = min(len(weight), BLOCKS[bool(blocks)] // 2)
        eye = torch.eye(half, dtype=weight.dtype).unsqueeze(-1)
        blocks.append((weight.view(-1, half, 1, 2) * eye).flatten(2))  # (., b/2, b/2, 2) -> (., b/2, b)
    return blocks


def _climb(planes: Tensor, levels: list[Level], blocks: list[Tensor]) -> list[Tensor]:
    """The convolutions of all levels, (1, c / 2, r) to (1, 2, r), and the gate, (1, r)."""
    before = []
    for (_, bias, slope), block in zip(levels, blocks, strict=True):
        count, half, width = block.shape
        y = torch.baddbmm(bias.view(count, half, 1), block, planes.view(count, width, -1))
        if len(bias) > 1:
            before.append(y.view(1, len(bias), -1))
            planes = prelu(before[-1], slope.view(-1))
    return [*before, y.sigmoid_().view(1, -1)]


def _descend(
    x: Tensor,
    grad: Tensor,
    below: Tensor,
    levels: list[Level],
    blocks: list[Tensor],
    sums: list[Level],
    first: Tensor,
) -> None:
    """Climbs the tree and comes down with the gradients.

    Args:
        x: (c, r).
        grad: (c, r), the gradient of x * gate.
        below: (c, r), receives the gradient of x.
        levels: The parameters.
        blocks: Their weights, block by block.
        sums: The gradients of the parameters are added to these, but for the first level's weights,
        first: to this, block by block.
    """
    dot = (grad * x).sum(0, keepdim=True)  # first, because it brings both to the cache in order
    *before, gate = _climb(x, levels, blocks)
    torch.mul(grad, gate, out=below)
    above = torch.ops.aten.sigmoid_backward(dot, gate)
    for level, total in zip(levels[:0:-1], sums[:0:-1], strict=True):
        y, slope = before.pop(), levels[len(before)].slope
        total.bias.add_(above.sum(1, keepdim=True))
        above = above.unsqueeze(1)
        pairs = prelu(y, slope.view(-1)).view(len(above), 2, -1)
        total.weight.add_((pairs * above).sum(2, keepdim=True))
        above, y = (above * level.weight).view(len(slope), -1), y[0]
        sums[len(before)].slope.add_((above * y.clamp(max=0)).sum(1, keepdim=True))
        positive = torch.ops.aten.threshold_backward(above, y, 0)  # above where y > 0, else 0
        above = torch.lerp(positive, above, slope)
    sums[0].bias.add_(above.sum(1, keepdim=True))
    count, half, width = first.shape
    above = above.view(count, half, -1)
    first.baddbmm_(above, x.view(count, width, -1).transpose(1, 2))
    below.view(count, width, -1).baddbmm_(blocks[0].transpose(1, 2), above)


def _tiles(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts x into whole images, or into rows of one image, of about TILE elements a thread."""
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


@gate_product.register_kernel("cuda")
def _(x: Tensor, parameters: Tensor) -> Tensor:
    from tamzoo import tree_triton  # here, because Triton is not everywhere

    return tree_triton.forward(x, parameters)


@gate_product_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    from tamzoo import tree_triton

    return tree_triton.backward(grad, x, parameters)


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
