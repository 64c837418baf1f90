"""x * sigmoid(tree(x)), reading x once and writing once, for trees of group size 2.

The plain tree moves several times the memory of x at every level, and keeps it for the backward pass.
Here one kernel climbs the tree a few pixels at a time, so that everything between x and the product stays in
the cache, and the backward pass climbs it again: only x and the parameters are kept, and of an x that a
BatchNorm has just made not even x, since it can be made again from what the BatchNorm keeps.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

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
    if isinstance(x, torch.fx.Proxy):  # traced: nothing of it is known but what is done with it
        return x * torch.sigmoid(tree(x))
    if not _fits(x, tree):
        return x * torch.sigmoid(climb(x, tree))
    with _normalising_again(x):
        return gate_product(x, flat(tree))


def flat(tree: nn.Sequential) -> Tensor:
    """The tree's parameters in one row, level by level, as `gate_product` takes them."""
    names = ("weight", "bias")  # `parameters()` has them in another order once one has been made anew
    return torch.cat(
        [getattr(layer, name).flatten() for layer in tree for name in names if hasattr(layer, name)]
    )


def climb(x: Tensor, tree: nn.Sequential) -> Tensor:
    """tree(x): (n, c, h, w) -> (n, 1, h, w), on CUDA without cuDNN, known to be slow at many tiny groups."""
    return by_levels(x, tree) if x.is_cuda and not _leaves_torch() and ordinary(tree) else tree(x)


def by_levels(x: Tensor, tree: nn.Sequential) -> Tensor:
    """tree(x), each convolution as a product and a sum over a group's channels: torch.compile fuses them."""
    h = x
    for layer in tree:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            weight, bias = layer.weight.flatten(1)[..., None, None], layer.bias[:, None, None]
            h = (h.unflatten(1, (layer.groups, -1)) * weight).sum(2) + bias
        else:
            h = layer(h)
    return h.to(x.dtype)  # autocast leaves products in float32


def _normalising_again(x: Tensor) -> AbstractContextManager:
    """Where x comes from a BatchNorm in training, saves nothing of it: the backward pass makes it again.

    It costs a BatchNorm's forward pass, and gives x to the last bit.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()  # a compiled graph chooses for itself what it keeps, and breaks at x.grad_fn
    if torch._C._autograd._top_saved_tensors_default_hooks(True):  # pyright: ignore
        return nullcontext()  # another's, and checkpointing's give a tensor only once
    node: Any = x.grad_fn  # None of a leaf
    if node is None or node.name() != "NativeBatchNormBackward0" or not node._saved_training or x._version:
        return nullcontext()  # of a version above 0, something has been done to it in place
    bias = node.next_functions[2][0]
    if not hasattr(bias, "variable"):  # one that learns nothing is not to be found
        return nullcontext()
    bias = bias.variable
    version = bias._version

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        if bias._version != version:  # torch itself looks at the versions of what it saves
            raise RuntimeError(
                "a BatchNorm's bias was changed in place between the forward and the backward pass of the TAM"
                " behind it; change it afterwards"
            )
        x, weight = node._saved_input, node._saved_weight
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, node._saved_eps)[0]

    # x alone has four dimensions; the hooks live as long as the graph, and must not hold it
    return saved_tensors_hooks(lambda kept: None if kept.dim() == 4 else kept, unpack)


def is_plain(module: Any, *types: type[nn.Module]) -> bool:
    """Whether a module is of one of these types and does what the type says: no subclass, no method in place
    of its type's, nor hooks, by which pruning makes its weights."""
    return (
        type(module) in types
        and not (module._forward_pre_hooks or module._forward_hooks)
        and "forward" not in module.__dict__
    )


def ordinary(tree: nn.Sequential) -> bool:
    """Whether a tree and its layers are as TAM makes them, with nothing added or replaced."""
    if any(module._backward_pre_hooks or module._backward_hooks for module in (tree, *tree)):
        return False
    width = 0
    for layer in tree:
        if is_plain(layer, nn.Conv2d) and layer.bias is not None and _pointwise(layer):
            width = layer.out_channels
        elif not is_plain(layer, nn.PReLU) or layer.num_parameters != width:
            return False
    return is_plain(tree, nn.Sequential)


def _pointwise(layer: Any) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)


def _fits(x: Tensor, tree: nn.Sequential) -> bool:
    if _leaves_torch() or _transformed() or not ordinary(tree):
        return False
    levels = (len(tree) + 1) // 2
    if x.dim() != 4 or x.numel() == 0 or x.shape[1] != 2**levels:  # no factor is below 2, so all are 2
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if x.is_cuda:
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and launches()
    return x.device.type == "cpu" and x.dtype in tree_cpu.DTYPES and _built()


@torch.compiler.assume_constant_result  # asked by Dynamo itself, is_exporting() is true in torch 2.11
def _leaves_torch() -> bool:
    """Whether the model is being exported: what leaves torch is made of standard operators."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which the operator has no rules for."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def launches() -> bool:
    """Whether Triton's kernels run on the GPU here; where they do not, the log says why."""
    if not HAS_TRITON:
        return False
    from tamzoo import tree_triton

    return tree_triton.works()


@torch.compiler.assume_constant_result
def _built() -> bool:
    return tree_cpu.library() is not None


@torch.library.custom_op("tamzoo::gate_product", mutates_args=(), device_types="cpu")
def gate_product(x: Tensor, parameters: Tensor) -> Tensor:
    """x * sigmoid(tree(x)) of the tree with these parameters.

    Args:
        x: (n, c, h, w), channels_last, with c a power of two.
        parameters: (4c - 5,), level by level: weights, biases, slopes.
    Raises:
        ValueError: other shapes.
    """
    _check_shapes(x, parameters)
    return tree_cpu.forward(x, parameters)


def _check_shapes(x: Tensor, parameters: Tensor) -> None:
    """The kernels would read past the end of what is too short."""
    c = x.shape[1] if x.dim() == 4 else 0
    if c < 2 or c.bit_count() != 1 or parameters.shape != (4 * c - 5,):
        raise ValueError(
            "expected x (n, c, h, w) with c a power of two, and parameters (4c - 5,), "
            f"got {tuple(x.shape)} and {tuple(parameters.shape)}"
        )


@torch.library.custom_op("tamzoo::gate_product_backward", mutates_args=(), device_types="cpu")
def gate_product_backward(grad: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_product` with respect to x and parameters, given that of its result."""
    return tree_cpu.backward(grad, x, parameters)


@gate_product.register_kernel("cuda")
def _(x: Tensor, parameters: Tensor) -> Tensor:
    from tamzoo import tree_triton  # here, because Triton is not everywhere

    _check_shapes(x, parameters)
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
