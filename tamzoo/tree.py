"""x * sigmoid(tree(x)), reading x once and writing once, for trees of group size 2.

The plain tree moves several times the memory of x at every level, and keeps it for the backward pass.
Here one kernel climbs the tree a few pixels at a time, so that everything between x and the product stays in
the cache, and the backward pass climbs it again: only x and the parameters are kept.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from tamzoo import tree_cpu

HAS_TRITON = find_spec("triton") is not None


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
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if x.is_cuda:
        return HAS_TRITON and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.device.type == "cpu" and x.dtype in tree_cpu.DTYPES and _built()


@torch.compiler.assume_constant_result
def _built() -> bool:
    return tree_cpu.library() is not None


@torch.library.custom_op("tamzoo::gate_product", mutates_args=(), device_types="cpu")
def gate_product(x: Tensor, parameters: Tensor) -> Tensor:
    """x * sigmoid(tree(x)) of the tree with these parameters.

    Args:
        x: (n, c, h, w), channels_last, with c a power of two.
        parameters: (4c - 5,), level by level: weights, biases, slopes.
    """
    return tree_cpu.forward(x, parameters)


@torch.library.custom_op("tamzoo::gate_product_backward", mutates_args=(), device_types="cpu")
def gate_product_backward(grad: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_product` with respect to x and parameters, given that of its result."""
    return tree_cpu.backward(grad, x, parameters)


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
