"""The gate's product and its gradients as one Triton kernel each, for channels_last tensors.

The same kernels do what is around it at a block's end (`end`): BatchNorm before, sum and ReLU after.

A program holds some rows (pixels) of all channels in registers. Neighbouring channels meet in a reduction
over a last axis of length 2, so every level keeps the layout of the one before, and nothing goes through
shared memory but what crosses warps. The backward kernel climbs the tree again; each program sums the
parameters' gradients over its rows into a row of its own, and those are summed at the end: no atomics,
the same result every time.
"""

# Triton's language is not Python's in types
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

import logging
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# By channels, rows and warps of a program, and backward programs a processor: of some twenty shapes each the
# quickest at a block's end on one H200 (Triton 3.6). Others take up to 29 times as long, by no rule found.
FORWARD = {64: (64, 4), 128: (64, 8), 256: (32, 16), 512: (8, 4), 1024: (8, 4), 2048: (8, 4)}
BACKWARD = {64: (16, 8, 2), 128: (8, 8, 2), 256: (8, 16, 1), 512: (2, 4, 2), 1024: (1, 4, 2), 2048: (1, 8, 1)}
FORWARD_ELEMENTS = 8192  # of x in one program, for other channels
BACKWARD_ELEMENTS = 1024  # fewer: parameters and the sums of their gradients need registers too
MOST_ROWS = 256  # of few channels, so that the grid is not too small

logger = logging.getLogger(__name__)


@triton.jit
def _load(at, width: tl.constexpr):
    """The parameters of each level from here to the root: (1, width / 2, 2) weights, then (1, width / 2)."""
    half: tl.constexpr = width // 2
    node = tl.arange(0, half)[None, :]
    weight = tl.load(at + 2 * node[:, :, None] + tl.arange(0, 2)[None, None, :])
    bias = tl.load(at + width + node)
    if width == 2:
        levels = (weight, bias)
    else:
        slope = tl.load(at + width + half + node)
        levels = (weight, bias, slope, _load(at + 2 * width, half))
    return levels


@triton.jit
def _climb(h, levels, rows: tl.constexpr, width: tl.constexpr):
    """(rows, width) -> (rows, 1), the gate."""
    y = tl.sum(tl.reshape(h, (rows, width // 2, 2)) * levels[0], axis=2) + levels[1]
    if width == 2:
        gate = tl.sigmoid(y)
    else:
        gate = _climb(tl.where(y > 0, y, y * levels[2]), levels[3], rows, width // 2)
    return gate


@triton.jit
def _zeros(rows: tl.constexpr, width: tl.constexpr):
    """As `_load`, for every row."""
    half: tl.constexpr = width // 2
    zero = tl.zeros((rows, half), tl.float32)
    if width == 2:
        sums = (tl.zeros((rows, half, 2), tl.float32), zero)
    else:
        sums = (tl.zeros((rows, half, 2), tl.float32), zero, zero, _zeros(rows, half))
    return sums


@triton.jit
def _descend(h, dot, sums, levels, rows: tl.constexpr, width: tl.constexpr):
    """Climbs and comes down again.

    Args:
        h: (rows, width), what enters this level.
        dot: (rows, 1), the gradient of the gate.
        sums: The parameters' gradients so far, row by row: rows meet only at the very end.
    Returns:
        The gradient of h; the gate; sums with this block's added.
    """
    pairs = tl.reshape(h, (rows, width // 2, 2))
    y = tl.sum(pairs * levels[0], axis=2) + levels[1]
    if width == 2:
        gate = tl.sigmoid(y)
        above = dot * gate * (1 - gate)
        sums = (sums[0] + pairs * above[:, :, None], sums[1] + above)
    else:
        after = tl.where(y > 0, y, y * levels[2])
        above, gate, upper = _descend(after, dot, sums[3], levels[3], rows, width // 2)
        slopes = sums[2] + tl.where(y > 0, 0.0, above * y)
        above = tl.where(y > 0, above, above * levels[2])
        sums = (sums[0] + pairs * above[:, :, None], sums[1] + above, slopes, upper)
    return tl.reshape(above[:, :, None] * levels[0], (rows, width)), gate, sums


@triton.jit
def _store(sums, at, width: tl.constexpr):
    """Writes the sums over the rows in the order of the parameters."""
    half: tl.constexpr = width // 2
    node = tl.arange(0, half)
    tl.store(at + 2 * node[:, None] + tl.arange(0, 2)[None, :], tl.sum(sums[0], axis=0))
    tl.store(at + width + node, tl.sum(sums[1], axis=0))
    if width > 2:
        tl.store(at + width + half + node, tl.sum(sums[2], axis=0))
        _store(sums[3], at + 2 * width, half)


@triton.jit
def _affine(mean, rstd, weight, bias):
    """Scale and shift of BatchNorm."""
    scale = tl.load(weight).to(tl.float32) * tl.load(rstd).to(tl.float32)
    return scale, tl.load(bias).to(tl.float32) - tl.load(mean).to(tl.float32) * scale


@triton.jit
def forward_kernel(
    x,
    parameters,
    mean,
    rstd,
    weight,
    bias,
    shortcut,
    out,
    count,
    rows: tl.constexpr,
    channels: tl.constexpr,
    end: tl.constexpr,
):
    levels = _load(parameters, channels)
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    column = tl.arange(0, channels)[None, :]
    at, inside = row * channels + column, row < count
    h = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if end:
        scale, shift = _affine(mean + column, rstd + column, weight + column, bias + column)
        h = h * scale + shift
    y = h * _climb(h, levels, rows, channels)
    if end:
        y += tl.load(shortcut + at, mask=inside, other=0).to(tl.float32)
        y = tl.where(y <= 0, 0.0, y)  # and not a maximum, which drops NaN
    tl.store(out + at, y, mask=inside)


@triton.jit
def backward_kernel(
    grad,
    out,
    x,
    parameters,
    mean,
    rstd,
    weight,
    bias,
    grad_x,
    grad_shortcut,
    sums,
    count,
    programs,
    rows: tl.constexpr,
    channels: tl.constexpr,
    end: tl.constexpr,
):
    program = tl.program_id(0)
    levels = _load(parameters, channels)
    total = _zeros(rows, channels)
    row = (program * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    column = tl.arange(0, channels)[None, :]
    next_x = tl.load(x + row * channels + column, mask=row < count, other=0)
    next_grad = tl.load(grad + row * channels + column, mask=row < count, other=0)
    if end:
        next_out = tl.load(out + row * channels + column, mask=row < count, other=0)
        scale, shift = _affine(mean + column, rstd + column, weight + column, bias + column)
        scales, shifts = tl.zeros((rows, channels), tl.float32), tl.zeros((rows, channels), tl.float32)
    # The next block is fetched while one is computed, by hand: Triton's own pipelining takes another layout,
    # in which every level goes through shared memory and registers spill.
    for _ in range(program, tl.cdiv(count, rows), programs):
        at, inside = row * channels + column, row < count
        h, g = next_x.to(tl.float32), next_grad.to(tl.float32)
        if end:
            g = tl.where(next_out <= 0, 0.0, g)
            tl.store(grad_shortcut + at, g, mask=inside)
            given = h
            h = h * scale + shift
        row += programs * rows
        next_x = tl.load(x + row * channels + column, mask=row < count, other=0)
        next_grad = tl.load(grad + row * channels + column, mask=row < count, other=0)
        if end:
            next_out = tl.load(out + row * channels + column, mask=row < count, other=0)
        dot = tl.sum(g * h, axis=1)[:, None]
        below, gate, total = _descend(h, dot, total, levels, rows, channels)
        below += g * gate
        if end:
            scales += below * given
            shifts += below
            below *= scale
        tl.store(grad_x + at, below, mask=inside)
    if end:
        sums += program * (6 * channels - 5)
        tl.store(sums + tl.arange(0, channels), tl.sum(scales, axis=0))
        tl.store(sums + channels + tl.arange(0, channels), tl.sum(shifts, axis=0))
        _store(total, sums + 2 * channels, channels)
    else:
        _store(total, sums + program * (4 * channels - 5), channels)


def _forward_shape(channels: int) -> tuple[int, int]:
    """Rows and warps of a program."""
    return FORWARD.get(channels) or (_rows(channels, FORWARD_ELEMENTS), _warps(channels, 8))


def _backward_shape(channels: int) -> tuple[int, int, int]:
    """Rows and warps of a program, and how many fit a processor's registers at once."""
    rows, warps = _rows(channels, BACKWARD_ELEMENTS), _warps(channels, 4)
    return BACKWARD.get(channels) or (rows, warps, 3 if channels < 64 else 1)


def _rows(channels: int, elements: int) -> int:
    return max(1, min(elements // channels, MOST_ROWS))


def _warps(channels: int, least: int) -> int:
    return min(max(least, channels // 256), 32)


@cache
def works() -> bool:
    """Whether the kernels run on the GPU here; where they do not, the log says why."""
    try:
        forward(torch.ones(1, 2, 1, 1, device="cuda"), torch.ones(3, device="cuda")).tolist()
    except Exception as error:  # Triton, its compilers and the driver share no kind
        told = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("running TAM layer by layer, which is slower: Triton fails on this GPU (%s)", told[0])
        return False
    return True


def forward(x: Tensor, parameters: Tensor) -> Tensor:
    """`tamzoo.tree.gate_product` of a channels_last x."""
    return _forward(x, parameters)


def backward(grad: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """`tamzoo.tree.gate_product_backward` of a channels_last x."""
    grad_x, sums = _backward(grad, x, parameters)
    return grad_x, sums.sum(0).to(parameters.dtype)


def end_forward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, parameters: Tensor
) -> Tensor:
    """`tamzoo.block_end.block_end` of a channels_last x."""
    return _forward(x, parameters, mean, rstd, weight, bias, _channels_last(shortcut))


def end_backward(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    parameters: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`tamzoo.block_end.block_end_backward` of a channels_last x."""
    grad_shortcut, channels = torch.empty_like(out), x.shape[1]
    grad_x, sums = _backward(grad, x, parameters, out, mean, rstd, weight, bias, grad_shortcut)
    parts = sums.split([channels, channels, len(parameters)], dim=1)  # results of operators share no memory
    grad_scale, grad_shift, others = (part.sum(0) for part in parts)
    grad_scale, grad_shift = grad_scale.to(mean.dtype), grad_shift.to(mean.dtype)
    return grad_x, grad_scale, grad_shift, grad_shortcut, others.to(parameters.dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _forward(x: Tensor, parameters: Tensor, *end: Tensor) -> Tensor:
    """Of the product; with mean, rstd, weight, bias and shortcut, of a block's end."""
    (n, channels, h, w), x = x.shape, _channels_last(x)
    out, (rows, warps) = torch.empty_like(x), _forward_shape(channels)
    with torch.cuda.device_of(x):
        forward_kernel[triton.cdiv(n * h * w, rows),](
            x,
            parameters.float(),
            *(end or (x, x, x, x, x)),
            out,
            n * h * w,
            rows,
            channels,
            bool(end),
            num_warps=warps,
            enable_fp_fusion=True,  # the default before Triton 3.10
        )
    return out


def _backward(grad: Tensor, x: Tensor, parameters: Tensor, *end: Tensor) -> tuple[Tensor, Tensor]:
    """Of the product; of an end, with its result, mean, rstd, weight, bias and where to write the shortcut's.

    Returns:
        The gradient of x; a row a program, of those of scale and shift, where there are any, and parameters.
    """
    (n, channels, h, w), x, grad = x.shape, _channels_last(x), _channels_last(grad)
    out, *parts, grad_shortcut = end or (x, x, x, x, x, x)
    grad_x, (rows, warps, at_once) = torch.empty_like(x), _backward_shape(channels)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(at_once * processors, triton.cdiv(n * h * w, rows))
    sums = torch.empty(programs, 4 * channels - 5 + 2 * channels * bool(end), device=x.device)
    with torch.cuda.device_of(x):
        backward_kernel[programs,](
            grad,
            out,
            x,
            parameters.float(),
            *parts,
            grad_x,
            grad_shortcut,
            sums,
            n * h * w,
            programs,
            rows,
            channels,
            bool(end),
            num_warps=warps,
            enable_fp_fusion=True,  # the default before Triton 3.10
        )
    return grad_x, sums
