"""Measures the gate's product alone: `python -m export.benchmark gate`, beside a copy of its input.

A copy reads and writes a tensor once, as the product must; its gradient reads two and writes one. With
`--end`, what `--join-ends` makes of a block's end, which reads two and writes one; its gradient reads three
and writes two.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tamzoo.block_end import block_end, block_end_backward
from tamzoo.latency import time_in_turns
from tamzoo.learner import PRECISIONS
from tamzoo.tree import gate_product, gate_product_backward

COLUMNS = ("channels", "copy GB/s", "forward ms", "of a copy's rate", "backward ms", "of a copy's rate")
CALLS = 10  # before a wait for the device, which share what starting and waiting cost
PASSES = {"copy": 2, "forward": 2, "backward": 3}  # over a tensor of x's size
END_PASSES = {"copy": 2, "forward": 3, "backward": 5}


def add_options(command: argparse.ArgumentParser) -> None:
    """What `gate` is asked on the command line."""
    cuda = torch.cuda.is_available()
    command.set_defaults(run=print_rates)
    command.add_argument(
        "--channels", nargs="+", type=int, default=[64, 128, 256, 512, 1024, 2048], metavar="C"
    )
    command.add_argument(
        "--elements", type=int, default=2**27 if cuda else 2**23, help="of the input, far beyond the caches"
    )
    command.add_argument("--precision", choices=PRECISIONS, default="bfloat16" if cuda else "float32")
    command.add_argument("--device", default="cuda" if cuda else "cpu")
    command.add_argument("--rounds", type=int, default=20)
    command.add_argument("--end", action="store_true", help="with what is around it at a block's end")


def rates(channels: int, options: argparse.Namespace) -> tuple[float, ...]:
    """One row of COLUMNS.

    Raises:
        ValueError: the channels are no power of two, or more than there are elements.
    """
    pixels, device = options.elements // channels, torch.device(options.device)
    if channels < 2 or channels & (channels - 1) or not pixels:
        raise ValueError(f"--channels must be powers of two from 2 to {options.elements}, got {channels}")
    made = {"device": device, "dtype": PRECISIONS[options.precision]}
    x, grad, out = (
        torch.randn(1, channels, pixels, 1, **made).to(memory_format=torch.channels_last) for _ in "123"
    )
    parameters = 0.7 * torch.randn(4 * channels - 5, device=device)
    parts = [torch.rand(channels, device=device) for _ in ("mean", "rstd", "weight", "bias")]
    works: dict[str, Callable[[], object]] = {
        "copy": partial(out.copy_, x),
        "forward": partial(gate_product, x, parameters),
        "backward": partial(gate_product_backward, grad, x, parameters),
    }
    if options.end:
        works["forward"] = partial(block_end, x, *parts, grad, parameters)
        works["backward"] = partial(block_end_backward, grad, out, x, *parts, parameters)
    times = time_in_turns({name: partial(_often, work, x) for name, work in works.items()}, options.rounds)
    (copy, *others), passes = times, END_PASSES if options.end else PASSES
    told = [channels, passes["copy"] * x.nbytes * CALLS / copy.median_ms / 1e6]
    for row in others:
        told += [row.median_ms / CALLS, passes[row.name] / passes["copy"] / row.ratio]
    return tuple(told)


def _often(work: Callable[[], object], x: Tensor) -> None:
    for _ in range(CALLS):
        work()
    if x.is_cuda:
        torch.cuda.synchronize()


def print_rates(options: argparse.Namespace) -> None:
    """Prints a row a channel count."""
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    told = {name: value for name, value in vars(options).items() if name != "run"}
    print(*(f"{name}={value}" for name, value in told.items()), f"torch={torch.__version__}")
    print("".join(f"{name:>18}" for name in COLUMNS))
    device = torch.device(options.device)
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)  # the one that is waited for
    with torch.no_grad():
        for channels in options.channels:
            print("".join(f"{round(cell, 3):>18}" for cell in rates(channels, options)), flush=True)
