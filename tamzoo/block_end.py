"""The end of a ResNet's block as one operation: BatchNorm, TAM, sum with the shortcut, ReLU.

A gate of its own costs a pass over memory to write what it reads, and one to read what it writes. Here the
kernel that gates also normalises, adds and rectifies: like the plain block's, it reads what the convolution
wrote and the shortcut and writes what leaves the block, and the backward pass keeps no more than these.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tamzoo.attention import TAM
from tamzoo.backbones import BasicBlock, Bottleneck
from tamzoo.tree import flat, gate_product, gate_product_backward, is_plain, launches, ordinary


class _JoinedEnd:
    """A block whose forward pass in training ends in `block_end`."""

    if TYPE_CHECKING:  # the block's
        training: bool
        last_affine: str
        downsample: nn.Module | None
        se: TAM | None
        _branch: Any

    def forward(self, x: Tensor) -> Tensor:
        norm = getattr(self, self.last_affine)
        if not (self.training and norm.training) or self.se is None:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self._branch(x)
        self.se.forget_gate()
        return block_end(x, *_statistics(x, norm), norm.weight, norm.bias, shortcut, flat(self.se.tree))


class JoinedBasicBlock(_JoinedEnd, BasicBlock):
    """BasicBlock that trains with its end as one operation."""

    def _branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        return self.conv2(self.aa(x))  # pyright: ignore[reportOptionalCall]


class JoinedBottleneck(_JoinedEnd, Bottleneck):
    """Bottleneck that trains with its end as one operation."""

    def _branch(self, x: Tensor) -> Tensor:
        x = self.conv2(self.act1(self.bn1(self.conv1(x))))
        x = self.act2(self.drop_block(self.bn2(x)))
        return self.conv3(self.aa(x))  # pyright: ignore[reportOptionalCall]


JOINED = {BasicBlock: JoinedBasicBlock, Bottleneck: JoinedBottleneck}


def join_ends(model: nn.Module) -> int:
    """Makes every block that can train with its end as one operation, in place; returns how many.

    Those are the ResNets' blocks with a TAM of group size 2 over a power of two of channels, BatchNorm2d and
    ReLU, without stochastic depth or hooks. Parameters and buffers stay what they are, as does the pass in
    eval mode, of the block or of its BatchNorm.
    On a GPU where Triton does not run there are none, and the log says why.
    """
    if any(parameter.is_cuda for parameter in model.parameters()) and not launches():
        return 0
    blocks: list[Any] = [block for block in model.modules() if type(block) in JOINED and _can_join(block)]
    for block in blocks:
        block.__class__ = JOINED[type(block)]
    return len(blocks)


def _can_join(block: Any) -> bool:
    norm, act = getattr(block, block.last_affine), getattr(block, block.last_affine.replace("bn", "act"))
    return (
        is_plain(block.se, TAM)
        and block.se.group_size == 2
        and block.se.channels.bit_count() == 1 < block.se.channels
        and ordinary(block.se.tree)
        and is_plain(norm, nn.BatchNorm2d)
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and is_plain(act, nn.ReLU)
        and block.drop_path is None
    )


def _statistics(x: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean of x and 1 / its standard deviation, (c,) each; the running ones take a step."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    variance, mean = torch.var_mean(x.to(norm.weight.dtype), (0, 2, 3), correction=0)
    with torch.no_grad():
        count = x.numel() // x.shape[1]
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return mean, torch.rsqrt(variance + norm.eps)


@torch.library.custom_op("tamzoo::block_end", mutates_args=(), device_types="cpu")
def block_end(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, parameters: Tensor
) -> Tensor:
    """relu(gate_product((x - mean) * rstd * weight + bias, parameters) + shortcut).

    It is given BatchNorm's parts and not its scale and shift: Triton 3.6 does not compile what torch.compile
    makes of statistics with these behind them.

    Args:
        x: (n, c, h, w), channels_last, with c a power of two.
        mean: (c,); rstd, weight and bias too.
        shortcut: As x.
        parameters: As of `gate_product`.
    """
    h = _scaled(x, *_affine(mean, rstd, weight, bias))
    return torch.relu_(gate_product(h, parameters) + shortcut).to(x.dtype)


@torch.library.custom_op("tamzoo::block_end_backward", mutates_args=(), device_types="cpu")
def block_end_backward(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    parameters: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `block_end` with respect to x, scale, shift, shortcut and parameters.

    Args:
        grad: That of its result `out`.
    """
    scale, shift = _affine(mean, rstd, weight, bias)
    grad = torch.where(out <= 0, 0, grad)
    below, others = gate_product_backward(grad, _scaled(x, scale, shift), parameters)
    scaled = below * scale[:, None, None]
    return scaled.to(x.dtype), (below * x).sum((0, 2, 3)), below.sum((0, 2, 3)), grad, others


def _affine(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, (c,) each, of BatchNorm."""
    scale = weight * rstd
    return scale, bias - mean * scale


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale[:, None, None] + shift[:, None, None]


@block_end.register_kernel("cuda")
def _(x: Tensor, *given: Tensor) -> Tensor:
    from tamzoo import tree_triton  # here, because Triton is not everywhere

    return tree_triton.end_forward(x, *given)


@block_end_backward.register_kernel("cuda")
def _(grad: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from tamzoo import tree_triton

    return tree_triton.end_backward(grad, *given)


@block_end.register_fake
def _(x: Tensor, *given: Tensor) -> Tensor:
    return torch.empty_like(x)


@block_end_backward.register_fake
def _(
    grad: Tensor, out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = (x, mean, rstd, out, others[-1])
    return tuple(torch.empty_like(tensor) for tensor in like)  # pyright: ignore[reportReturnType]


def _remember(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    *given, _, parameters = inputs  # the shortcut's gradient needs no shortcut
    ctx.save_for_backward(output, *given, parameters)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, ...]:
    _, _, mean, rstd, weight, _, _ = ctx.saved_tensors
    grad_x, of_scale, of_shift, grad_shortcut, others = block_end_backward(grad, *ctx.saved_tensors)
    of_scale = of_scale - mean * of_shift  # which the scale changes too
    return (
        grad_x,
        -rstd * weight * of_shift,
        of_scale * weight,
        of_scale * rstd,
        of_shift,
        grad_shortcut,
        others,
    )


block_end.register_autograd(_differentiate, setup_context=_remember)
