"""The fused product equals the formulation in torch, everywhere it is used."""

import copy
import os
import platform
import shlex
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tamzoo import tree, tree_cpu
from tamzoo.attention import TAM
from tamzoo.cache import program_folder

needs_compiler = pytest.mark.skipif(tree_cpu.library() is None, reason="needs a C++ compiler")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def shaken(channels: int, dtype: torch.dtype = torch.float64, group_size: int = 2) -> TAM:
    """A TAM whose slopes and biases matter."""
    torch.manual_seed(channels)
    module = TAM(channels, group_size, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def images(*shape: int, dtype: torch.dtype = torch.float64, layout: str = "channels_last") -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape).to(dtype).to(memory_format=FORMATS[layout]).requires_grad_()  # pyright: ignore


def reference(module: TAM, x: Tensor) -> Tensor:
    return x * torch.sigmoid(module.tree(x))


def gradients(module: TAM, x: Tensor, out: Tensor) -> list[Tensor]:
    torch.manual_seed(2)
    return list(torch.autograd.grad(out, [x, *module.tree.parameters()], torch.randn_like(out)))


def differs(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value."""
    expected = expected.double()
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("pixels", [1, 16, 60, 117])  # part of a tile; one; some; some and a part
@pytest.mark.parametrize("channels", [2, 4, 64, 512])
def test_product_and_gradients_equal_the_reference(channels, pixels, layout):
    module, x = shaken(channels), images(1, channels, pixels, 1, layout=layout)
    out, expected = module(x), reference(module, x)
    assert out.stride() == x.stride()
    assert differs(out, expected) < 1e-12
    for found, wanted in zip(gradients(module, x, out), gradients(module, x, expected), strict=True):
        assert found.shape == wanted.shape
        assert differs(found, wanted) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_is_close_to_float64(dtype, tolerance):  # tolerances: a few roundings of the dtype
    module = shaken(64, torch.float32)
    x = images(4, 64, 7, 9, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = module(x)
    assert out.dtype is dtype
    exact, x64 = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    expected = reference(exact, x64)
    assert differs(out, expected) < tolerance
    torch.manual_seed(2)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *module.parameters()], grad)
    wanted = torch.autograd.grad(expected, [x64, *exact.parameters()], grad.double())
    for one, other in zip(found, wanted, strict=True):
        assert differs(one, other) < tolerance


@needs_compiler
def test_bfloat16_is_rounded_to_nearest():
    module, x = shaken(64, torch.float32), images(4, 64, 7, 9, dtype=torch.bfloat16)
    found, exact = module(x).double(), reference(module.double(), x.double())
    assert ((found - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()  # half of its last bit


def test_autocast_leaves_float32_input_in_float32():
    module, x = shaken(16, torch.float32), images(2, 16, 3, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype is reference(module, x).dtype is torch.float32
    assert differs(out, reference(module, x)) < 1e-6


def pruned(tree: nn.Sequential) -> None:
    prune.l1_unstructured(tree[0], "weight", amount=0.5)


def weight_normed(tree: nn.Sequential) -> None:
    parametrizations.weight_norm(tree[0])
    tree[0].parametrizations.weight.original0.data.mul_(3)


def rectified(tree: nn.Sequential) -> None:
    tree[1] = nn.ReLU()


def of_one_slope(tree: nn.Sequential) -> None:
    tree[1] = nn.PReLU(1, dtype=torch.float64)


def without_bias(tree: nn.Sequential) -> None:
    tree[0].bias = None


def pruned_for_good(tree: nn.Sequential) -> None:
    pruned(tree)
    prune.remove(tree[0], "weight")


def weight_normed_once(tree: nn.Sequential) -> None:
    weight_normed(tree)
    parametrize.remove_parametrizations(tree[0], "weight")


def hooked(tree: nn.Sequential) -> None:
    tree.register_forward_hook(lambda tree, given, z: z + 5)


def replaced(tree: nn.Sequential) -> None:
    tree[1].forward = torch.relu


@pytest.mark.parametrize(
    "change",
    [
        pruned,
        pruned_for_good,
        weight_normed,
        weight_normed_once,
        rectified,
        of_one_slope,
        without_bias,
        hooked,
        replaced,
    ],
)
def test_a_changed_tree_gives_what_its_layers_give(change):
    module, x = shaken(16), images(2, 16, 3, 3)
    change(module.tree)
    assert differs(module(x), reference(module, x)) < 1e-12


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("path", ["tree", "tree.0"])
def test_hooks_of_the_backward_pass_are_called(path, register):
    module, x, seen = shaken(16), images(2, 16, 3, 3), []
    getattr(module.get_submodule(path), register)(lambda *given: seen.append(given))
    module(x).sum().backward()
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own use
def test_derivatives_of_torch_func_in_channels_last():
    module, x = shaken(16).eval(), images(2, 16, 3, 3)
    direction = x.detach().flip(0)
    expected = torch.func.jvp(lambda x: reference(module, x), (x,), (direction,))[1]
    assert differs(torch.func.jvp(module, (x,), (direction,))[1], expected) < 1e-12
    wanted = torch.func.grad(lambda x: reference(module, x).square().sum())(x)
    assert differs(torch.func.grad(lambda x: module(x).square().sum())(x), wanted) < 1e-12
    with forward_ad.dual_level():
        out = module(forward_ad.make_dual(x, direction))
        assert differs(forward_ad.unpack_dual(out).tangent, expected) < 1e-12


class Normalised(nn.Module):
    """A convolution, a BatchNorm and a TAM, as at the end of a residual branch."""

    def __init__(self, norm: nn.Module, relu: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)  # pyright: ignore
        self.norm, self.relu, self.tam = norm, relu, shaken(16, torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, weakref.ref]:
        x = self.norm(self.conv(x))
        if self.relu:
            x = x.relu_()
        return self.tam(x), weakref.ref(x)


@needs_compiler
@pytest.mark.parametrize(
    ("norm", "relu", "kept"),
    [
        (nn.BatchNorm2d(16), False, False),
        (nn.BatchNorm2d(16).eval(), False, True),  # its statistics may be loaded anew meanwhile
        (nn.BatchNorm2d(16, affine=False), False, True),
        (nn.BatchNorm2d(16), True, True),
        (nn.GroupNorm(4, 16), False, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_of_a_batchnorm_is_made_again_to_the_last_bit(monkeypatch, norm, relu, kept, dtype):
    module, x = Normalised(copy.deepcopy(norm), relu), images(4, 16, 5, 6, dtype=torch.float32)

    def pass_through() -> tuple[bool, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out, held = module(x)
        assert out.dtype is dtype
        alive, buffers = held() is not None, copy.deepcopy(list(module.buffers()))
        torch.manual_seed(2)
        found = torch.autograd.grad(out, [x, *module.parameters()], torch.randn_like(out))
        assert all(torch.equal(*pair) for pair in zip(buffers, module.buffers(), strict=True))
        return alive, list(found)

    alive, found = pass_through()
    assert alive is kept
    monkeypatch.setattr(tree, "_normalising_again", lambda x: nullcontext())
    alive, expected = pass_through()
    assert alive
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_compiler
def test_what_was_changed_since_the_forward_pass_is_not_made_again_from():
    module, x = Normalised(nn.BatchNorm2d(16)), images(4, 16, 5, 6, dtype=torch.float32)
    out, _ = module(x)
    with torch.no_grad():
        module.norm.bias.add_(1)
    with pytest.raises(RuntimeError, match="a BatchNorm's bias was changed in place"):
        out.sum().backward()
    features = module.norm(module.conv(x))
    with torch.no_grad():
        features.mul_(0.5)
    weights = list(module.tam.parameters())
    found = torch.autograd.grad(module.tam(features).sum(), weights)
    expected = torch.autograd.grad(module.tam(features.detach()).sum(), weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_fake_tensors_pass_forward_and_backward():
    with FakeTensorMode():
        module = nn.Sequential(nn.BatchNorm2d(16), TAM(16))
        module(torch.empty(2, 16, 3, 3).to(memory_format=torch.channels_last)).sum().backward()  # pyright: ignore
    assert all(parameter.grad is not None for parameter in module.parameters())


@needs_compiler
def test_a_gradient_is_differentiated_again_but_in_channels_last():
    module, x = shaken(16), images(2, 16, 3, 3)
    plain = x.detach().contiguous().requires_grad_()
    (grad,) = torch.autograd.grad(module(plain).sum(), plain, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), plain)[0].abs().max() > 0
    (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.square().sum(), x)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gradients_do_not_depend_on_the_number_of_threads(threads):
    module, x = shaken(32), images(3, 32, 5, 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = gradients(module, x, module(x))
        again = gradients(module, x, module(x))
    finally:
        torch.set_num_threads(before)
    for one, other, wanted in zip(found, again, gradients(module, x, reference(module, x)), strict=True):
        assert torch.equal(one, other)  # whichever thread ends first
        assert differs(one, wanted) < 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(value, dtype):
    module, x = shaken(16, torch.float32), images(1, 16, 3, 3, dtype=dtype).detach()
    x[0, 5, 1, 1] = value
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found, expected = module(x), reference(module, x)
    assert torch.equal(found.isfinite(), expected.isfinite()) and not found.isfinite().all()


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a mode of x86 CPUs")
def test_subnormal_numbers_count_as_zero_in_the_kernels_alone():  # products of young slopes are, and slow
    module, x = shaken(8, torch.float32), images(4, 8, 64, 64, dtype=torch.float32)
    tiny = torch.full_like(x, 1e-39)
    assert not module(tiny).any()
    (grad,) = torch.autograd.grad(module(x), x, tiny)
    assert not grad.any()
    assert (tiny * 0.5).all()  # on all of torch's threads


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("no-such-compiler", "built with no-such-compiler"),
        ("c++ 'x", "No closing quotation"),
        ("", "this user has no home folder: set TAMZOO_CACHE"),
    ],
)
def test_without_a_compiler_the_tree_is_computed_plainly(tmp_path, monkeypatch, caplog, compiler, told):
    monkeypatch.setenv("TAMZOO_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.delenv("TAMZOO_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
    tree_cpu.library.cache_clear()
    try:
        module, x = shaken(8), images(2, 8, 3, 3)
        assert torch.equal(module(x), reference(module, x))
        assert torch.equal(module(x), reference(module, x))
    finally:
        tree_cpu.library.cache_clear()
    (message,) = caplog.messages  # once
    assert "layer by layer" in message and told in message
    assert not list(tmp_path.rglob("*"))


@needs_compiler
def test_a_failed_compilation_is_told_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TAMZOO_CACHE", str(tmp_path))
    broken = tmp_path / "broken.cpp"
    broken.write_text("no C++")
    monkeypatch.setattr(tree_cpu, "SOURCE", broken)
    tree_cpu.library.cache_clear()
    try:
        assert tree_cpu.library() is None
    finally:
        tree_cpu.library.cache_clear()
    assert "broken.cpp" in caplog.text and "error" in caplog.text.lower()
    assert not list(program_folder("kernels").iterdir())


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="the cache is the user's own")
def test_kernels_that_others_could_have_written_are_not_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TAMZOO_CACHE", str(tmp_path))
    program_folder("kernels").chmod(0o777)
    tree_cpu.library.cache_clear()
    try:
        assert tree_cpu.library() is None
    finally:
        tree_cpu.library.cache_clear()
    assert "others may write there, and its programs are run; remove it" in caplog.text


@needs_compiler
def test_each_kind_of_cpu_and_each_source_has_kernels_of_its_own(tmp_path, monkeypatch):
    """In a cache that machines and versions share; -march=native tells the kind of CPU by macros."""
    monkeypatch.setenv("TAMZOO_CACHE", str(tmp_path))
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    built = [tree_cpu._build([*compiler, *macro]) for macro in ([], ["-D__OTHER_CPU__"], [])]
    assert built[0] == built[2] != built[1]
    monkeypatch.setattr(tree_cpu, "SOURCE", tmp_path / "other.cpp")
    tree_cpu.SOURCE.touch()
    built.append(tree_cpu._build(compiler))
    assert built[3] not in built[:3]
    assert sorted(program_folder("kernels").iterdir()) == sorted(set(built))


@needs_compiler
@pytest.mark.parametrize(("shape", "count"), [((1, 8, 2, 2), 26), ((1, 6, 2, 2), 19), ((8, 2, 2), 27)])
def test_shapes_that_do_not_fit_are_refused(shape, count):
    with pytest.raises(ValueError, match="c a power of two"):
        tree.gate_product(torch.ones(shape), torch.ones(count))


@needs_compiler
def test_gradcheck():
    parameters = torch.cat([p.detach().flatten() for p in shaken(8).parameters()]).requires_grad_()
    assert torch.autograd.gradcheck(tree.gate_product, (images(2, 8, 3, 2), parameters))


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck's own copies
def test_operators_keep_the_rules_of_custom_operators():
    parameters = torch.cat([p.detach().flatten() for p in shaken(8).parameters()]).requires_grad_()
    torch.library.opcheck(tree.gate_product, (images(2, 8, 3, 2), parameters))


@pytest.mark.parametrize(("channels", "group_size"), [(1, 2), (6, 2), (12, 2), (9, 3), (16, 4), (2, 3)])
def test_other_trees_are_computed_plainly(channels, group_size):
    module, x = shaken(channels, group_size=group_size), images(2, channels, 3, 3)
    assert differs(module(x), reference(module, x)) < 1e-12


@pytest.mark.parametrize(("channels", "group_size"), [(1, 2), (6, 2), (16, 2), (9, 3), (16, 4), (2, 3)])
@pytest.mark.parametrize("layout", FORMATS)
def test_the_levels_that_cuda_computes_are_those_of_the_tree(channels, group_size, layout):
    module, x = shaken(channels, group_size=group_size), images(2, channels, 3, 4, layout=layout)
    found, wanted = tree.by_levels(x, module.tree), module.tree(x)
    assert found.shape == wanted.shape and differs(found, wanted) < 1e-12
    pairs = zip(gradients(module, x, found), gradients(module, x, wanted), strict=True)
    assert all(differs(one, other) < 1e-12 for one, other in pairs)


def test_the_levels_that_cuda_computes_leave_bfloat16_as_narrow():
    module, x = shaken(16, torch.float32, group_size=4), images(2, 16, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert tree.by_levels(x, module.tree).dtype is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU that is not there")
def test_where_triton_cannot_run_the_log_says_so(caplog):
    tree_triton = pytest.importorskip("tamzoo.tree_triton")
    tree_triton.works.cache_clear()
    assert not tree_triton.works() and not tree_triton.works()
    (message,) = caplog.messages  # once
    assert "layer by layer" in message and "Triton fails on this GPU" in message


def test_a_dtype_without_kernels_is_computed_plainly():
    module, x = shaken(16, torch.float16), images(2, 16, 3, 3, dtype=torch.float16)
    assert torch.equal(module(x), reference(module, x))


def test_empty_batch_passes():
    assert shaken(8)(images(0, 8, 3, 3)).shape == (0, 8, 3, 3)


@needs_compiler
def test_only_the_input_and_the_parameters_are_kept_for_the_backward_pass():
    module, x = shaken(64), images(2, 64, 8, 8)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + 4 * 64 - 5


def test_gradient_checkpointing_gives_the_same_gradients():
    module, x = shaken(16), images(2, 16, 3, 3)
    again: Any = checkpoint(module, x, use_reentrant=False)
    for found, wanted in zip(gradients(module, x, again), gradients(module, x, module(x)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_compile_keeps_one_graph_and_the_gradients():
    module, x = shaken(16), images(2, 16, 3, 3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(gradients(module, x, compiled(x)), gradients(module, x, module(x)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)  # float64; the order of sums may differ


@needs_compiler
def test_a_compiled_model_uses_the_kernel():
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(shaken(16), backend=backend, fullgraph=True)(images(2, 16, 3, 3))
    assert "tamzoo.gate_product.default" in called


def test_state_dict_names_the_layers_of_the_tree():
    names = [name for name in TAM(4).state_dict() if name != "measured_gate"]
    assert names == ["tree.0.weight", "tree.0.bias", "tree.1.weight", "tree.2.weight", "tree.2.bias"]


def test_export_leaves_standard_operators():
    pytest.importorskip("onnxscript")
    program = torch.export.export(shaken(8, torch.float32).eval(), (images(2, 8, 3, 3, dtype=torch.float32),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets == {f"aten.{name}.default" for name in ("conv2d", "prelu", "sigmoid")} | {
        "aten.mul.Tensor"
    }


def test_importing_the_package_leaves_the_kernels_alone():
    code = "import sys, tamzoo; assert 'tamzoo.tree_triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
