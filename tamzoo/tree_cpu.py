"""The compiled kernels of `tree` for CPUs: built by the system's C++ compiler on first use, then cached."""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tamzoo.cache import program_folder

SOURCE = Path(__file__).with_name("tree_cpu.cpp")
# OpenMP's threads are those that torch has already loaded and keeps
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PATIENCE_S = 120

logger = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be built; then the log says why."""
    given = os.environ.get("CXX", "")
    try:
        command = shlex.split(given) or [shutil.which("c++") or shutil.which("g++") or "c++"]
        return ctypes.CDLL(str(_build(command)))
    # a ValueError of a user without a home, or of a quote in CXX that does not end
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            "training TAM layer by layer, which is slower: its kernels cannot be built with %s (%s)",
            given or "the system's C++ compiler",
            told[0] if told else error,
        )
        return None


def _build(command: list[str]) -> Path:
    """Compiles the source, unless this compiler has done so for this kind of CPU."""
    # the macros tell the compiler's version and what -march=native means here
    asked = [*command, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    told = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=PATIENCE_S)
    key = hashlib.sha256(f"{FLAGS} {told.stdout} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    folder = program_folder("kernels")
    built = folder / f"tree-{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            part = Path(place) / built.name
            subprocess.run(
                [*command, *FLAGS, str(SOURCE), "-o", str(part)],
                check=True,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
            with part.open("r+b") as file:
                os.fsync(file.fileno())  # a short file would be taken for whole, and crash
            part.replace(built)
    return built


def _call(name: str, rows: Tensor, *tensors: Tensor) -> None:
    """Calls a kernel with tensors, the number of pixels, of channels and of threads."""
    kernels = library()
    if kernels is None:
        raise RuntimeError("the CPU kernels cannot be built here; see the log")
    n, channels, h, w = rows.shape
    kernel = kernels[f"{name}_{str(rows.dtype).removeprefix('torch.')}"]
    kernel.restype = None
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    kernel(*pointers, ctypes.c_int64(n * h * w), channels, torch.get_num_threads())


def _computing(parameters: Tensor, x: Tensor) -> Tensor:
    """Parameters in the dtype in which the kernels for x compute."""
    return parameters.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def forward(x: Tensor, parameters: Tensor) -> Tensor:
    """`tamzoo.tree.gate_product` of a channels_last x."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    _call("forward", x, x, _computing(parameters, x), out)
    return out


def backward(grad: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """`tamzoo.tree.gate_product_backward` of a channels_last x."""
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad.to(x.dtype)))
    computing = _computing(parameters, x)
    grad_x, grad_parameters = torch.empty_like(x), torch.empty_like(computing)
    _call("backward", x, grad, x, computing, grad_x, grad_parameters)
    return grad_x, grad_parameters.to(parameters.dtype)
