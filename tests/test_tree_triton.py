"""The CUDA kernels, run by Triton's interpreter on the CPU, against float64.

The interpreter must be chosen before Triton is imported, so this file runs itself in a second process.
"""

import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from tamzoo.attention import TAM

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
SHAPES = [(2, 2, 3, 5), (4, 1, 20, 15), (64, 2, 5, 7), (512, 1, 3, 6), (2048, 1, 1, 3)]  # c, n, h, w


def version(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(name).split(".")[:2])


def by_layers(x: Tensor, parameters: Tensor, grad: Tensor) -> list[Tensor]:
    """The product and its gradients by torch's own layers."""
    tree = TAM(x.shape[1], dtype=x.dtype).tree
    vector_to_parameters(parameters.detach(), tree.parameters())
    x = x.detach().requires_grad_()
    out = x * torch.sigmoid(tree(x))
    grad_x, *others = torch.autograd.grad(out, [x, *tree.parameters()], grad)
    return [out, grad_x, torch.cat([other.flatten() for other in others])]


def far_from_zero(x: Tensor) -> Tensor:
    """A shortcut for x that keeps the sum from ReLU's kink, where rounding would choose a side."""
    return 4 * torch.randn_like(x).sign()


def end_by_layers(given: list[Tensor], grad: Tensor) -> list[Tensor]:
    """What leaves a block and its gradients by torch's own layers, from what `block_end` is given."""
    tree = TAM(given[0].shape[1], dtype=grad.dtype).tree
    vector_to_parameters(given[-1].detach(), tree.parameters())
    x, *parts, shortcut = given = [tensor.detach().requires_grad_() for tensor in given[:-1]]
    mean, rstd, weight, bias = (part[:, None, None] for part in parts)
    h = (x - mean) * rstd * weight + bias
    out = torch.relu(h * torch.sigmoid(tree(h)) + shortcut)
    found = torch.autograd.grad(out, [*given, *tree.parameters()], grad)
    return [out, *found[:6], torch.cat([other.flatten() for other in found[6:]])]


def end_given(channels: int, n: int, h: int, w: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Noise that `block_end` takes, and a gradient of its result."""
    torch.manual_seed(channels)
    x, grad = (torch.randn(n, channels, h, w).to(dtype) for _ in range(2))
    shortcut = far_from_zero(x)
    mean, bias = torch.randn(channels), torch.randn(channels)
    rstd, weight = torch.rand(channels) + 0.5, torch.rand(channels) + 0.5
    x = x.contiguous(memory_format=torch.channels_last)
    return [x, mean, rstd, weight, bias, shortcut, 0.7 * torch.randn(4 * channels - 5)], grad


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted process")
@pytest.mark.skipif(
    version("triton") < (3, 7) and version("numpy") >= (2, 4),
    reason="this Triton's interpreter takes int() of arrays, which this NumPy refuses",
)
def test_kernels_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-W", "ignore:Conversion of an array:DeprecationWarning"]  # the same, in older NumPys
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted process")
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("channels", [2, 256])
def test_kernels_compile_for_a_gpu_that_is_not_here(channels, end):
    """What the interpreter does not see; for a Hopper GPU, as torch.compile's bfloat16 step launches them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tamzoo import tree_triton

    rounded = {"x", "grad", "out", "shortcut", "grad_x", "grad_shortcut"}
    forward, backward = tree_triton._forward_shape(channels), tree_triton._backward_shape(channels)
    for kernel, (rows, warps, *_) in (
        (tree_triton.forward_kernel, forward),
        (tree_triton.backward_kernel, backward),
    ):
        fixed = {"rows": rows, "channels": channels, "end": end}
        kinds = {name: "*bf16" if name in rounded else "*fp32" for name in kernel.arg_names}
        kinds |= dict.fromkeys(("count", "programs"), "i32") | dict.fromkeys(fixed, "constexpr")
        source = ASTSource(kernel, {name: kinds[name] for name in kernel.arg_names}, fixed)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.asm["cubin"]


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("channels", "n", "h", "w"), SHAPES)
def test_product_and_gradients_are_close_to_float64(channels, n, h, w, dtype, tolerance):
    from tamzoo import tree_triton

    torch.manual_seed(channels)
    x, grad = (torch.randn(n, channels, h, w).to(dtype) for _ in range(2))
    x, parameters = x.contiguous(memory_format=torch.channels_last), 0.7 * torch.randn(4 * channels - 5)
    found = tree_triton.forward(x, parameters), *tree_triton.backward(grad, x, parameters)
    wanted = by_layers(x.double(), parameters.double(), grad.double())
    for one, other in zip(found, wanted, strict=True):
        # bfloat16: one rounding of each result; parameters' gradients are never rounded to it
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32]
    assert found[0].stride() == found[1].stride() == x.stride()


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("channels", "n", "h", "w"), SHAPES)
def test_end_and_gradients_are_close_to_float64(channels, n, h, w, dtype, tolerance):
    from tamzoo import tree_triton

    given, grad = end_given(channels, n, h, w, dtype)
    x, mean, rstd, weight, bias, _, parameters = given
    out = tree_triton.end_forward(*given)
    backward = tree_triton.end_backward(grad, out, x, mean, rstd, weight, bias, parameters)
    grad_x, grad_scale, grad_shift, grad_shortcut, others = backward
    wanted = end_by_layers([tensor.double() for tensor in given], grad.double())
    wanted_out, wanted_x, _, _, wanted_weight, wanted_bias, wanted_shortcut, wanted_others = wanted
    # the scale is rstd * weight, the shift bias - mean * scale
    of_weight = (grad_scale.double() - mean * grad_shift.double()) * rstd
    pairs = [(out, wanted_out), (grad_x, wanted_x), (of_weight, wanted_weight), (grad_shift, wanted_bias)]
    for one, other in [*pairs, (grad_shortcut, wanted_shortcut), (others, wanted_others)]:
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()
    found = [out, *backward]
    wanted_types = [dtype, dtype, torch.float32, torch.float32, dtype, torch.float32]
    assert [tensor.dtype for tensor in found] == wanted_types
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == len(found)
    assert out.stride() == grad_x.stride() == grad_shortcut.stride() == x.stride()


@interpreted
def test_end_keeps_numbers_that_are_not_finite():
    from tamzoo import tree_triton

    x, ones = torch.full((1, 2, 1, 1), float("nan")), torch.ones(2)
    out = tree_triton.end_forward(x, ones, ones, ones, ones, torch.ones_like(x), torch.ones(3))
    assert out.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [2, 64, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gpu_is_close_to_float64(channels, dtype, tolerance):
    from tamzoo import tree

    torch.manual_seed(channels)
    x, grad = (torch.randn(3, channels, 7, 9).to(dtype) for _ in range(2))
    parameters = 0.7 * torch.randn(4 * channels - 5)
    here = x.cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
    there = parameters.cuda().requires_grad_()
    out = tree.gate_product(here, there)
    found = [out, *torch.autograd.grad(out, [here, there], grad.cuda())]
    for one, other in zip(found, by_layers(x.double(), parameters.double(), grad.double()), strict=True):
        assert (one.cpu().double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gpu_end_is_close_to_float64(channels, dtype, tolerance):
    from tamzoo.block_end import block_end

    given, grad = end_given(channels, 3, 7, 9, dtype)
    wanted = end_by_layers([tensor.double() for tensor in given], grad.double())
    here = [tensor.cuda().requires_grad_() for tensor in given]
    out = block_end(*here)
    for one, other in zip([out, *torch.autograd.grad(out, here, grad.cuda())], wanted, strict=True):
        assert (one.cpu().double() - other).abs().max() <= tolerance * other.abs().max()
