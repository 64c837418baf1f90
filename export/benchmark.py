"""Measures training: `python -m export.benchmark train --model resnet18` prints one row a variant.

Every variant lives in a process of its own, and rounds go through the processes one after the other, so
that whatever else the machine does reaches all alike. A ratio is the median over rounds of variant / plain.
"""

import argparse
import csv
import multiprocessing
import statistics
import sys
import time
from functools import partial
from itertools import accumulate
from typing import Any

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from export import benchmark_gate, benchmark_infer
from tamzoo.allocator import keep_freed_memory
from tamzoo.attention import TAM
from tamzoo.block_end import join_ends
from tamzoo.catalogue import BACKBONES
from tamzoo.datasets import DATASETS
from tamzoo.learner import compile_blocks, set_cudnn
from tamzoo.replay import Replayed
from tamzoo.terminal import one_sentence
from tamzoo.tree import by_levels

VARIANTS = ("plain", "se", "cbam", "tam-reference", "tam", "tam-levels", "tam-joined")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DEFAULTS = {"model": "resnet18", "tag": "cifar10", "batch": 32, "rounds": 20, "warmup": 3}
COLUMNS = ("variant", "step_ms", "ratio", "images_per_s", "peak_mb", "peak_ratio", "matrix_peak")
DENSE_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 FLOP/s, from the data sheets


class ReferenceTAM(TAM):
    """TAM as its formula reads: layer by layer, every layer kept for the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forget_gate()
        return x * torch.sigmoid(self.tree(x))


class LevelsTAM(TAM):
    """TAM as products and sums, for torch.compile to fuse with what is around it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forget_gate()
        return x * torch.sigmoid(by_levels(x, self.tree))


FORMULATIONS = {"": TAM, "reference": ReferenceTAM, "levels": LevelsTAM, "joined": TAM}


class Trainer:
    """One variant's model and optimizer, stepping on one batch of noise."""

    def __init__(self, variant: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        set_cudnn()
        if options.threads:
            torch.set_num_threads(options.threads)
        attention, _, formulation = variant.partition("-")
        device, layout = torch.device(options.device), FORMATS[options.format]
        self.model: Any = timm.create_model(f"{options.model}_{attention}.{options.tag}")
        for module in self.model.modules():
            if type(module) is TAM:
                module.__class__ = FORMULATIONS[formulation]
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # the one that is waited for
        self.model.to(device, memory_format=layout).train()
        if formulation == "joined" and not join_ends(self.model):
            raise ValueError(f"tam-joined: {options.model} has no block whose end can be joined")
        self.call = torch.compile(self.model) if options.compile == "model" else self.model
        if options.compile == "blocks":
            compile_blocks(self.model)
        size = self.model.pretrained_cfg["input_size"]
        self.x = torch.randn(options.batch, *size, device=device).to(memory_format=layout)
        self.labels = torch.randint(self.model.num_classes, (options.batch,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16")
        self._replayed = partial(Replayed(), self._update) if options.cuda_graph else self._update

    def step(self) -> None:
        """One training step."""
        self._replayed(self.x, self.labels)

    def _update(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            logits = self.call(x)
        self.optimizer.zero_grad()
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def prepare(self) -> None:
        """The first step, which may compile; cuDNN's search waits until no other process disturbs it."""
        torch.backends.cudnn.benchmark = False
        self.step()
        self._wait()
        torch.backends.cudnn.benchmark = True

    def seconds(self) -> float:
        """Of one training step: on CUDA of ten that do not wait for each other, as in a run."""
        count = 10 if self.x.is_cuda else 1
        started = time.perf_counter()
        for _ in range(count):
            self.step()
        self._wait()
        return (time.perf_counter() - started) / count

    def _wait(self) -> None:
        if self.x.is_cuda:
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Most memory that tensors hold at once in a training step."""
        if self.x.is_cuda:  # a replay allocates nothing
            torch.cuda.reset_peak_memory_stats()
            self._update(self.x, self.labels)
            return torch.cuda.max_memory_allocated()
        states = self.optimizer.state.values()
        held = [*self.model.state_dict().values(), self.x, *(state["momentum_buffer"] for state in states)]
        before = sum(tensor.nbytes for tensor in held)
        self.optimizer.zero_grad()
        with torch.profiler.profile(profile_memory=True) as profile:
            self.step()
        trace: Any = profile.profiler
        events = sorted(trace.kineto_results.events(), key=lambda event: event.start_ns())
        return max(accumulate((e.nbytes() for e in events if e.name() == "[memory]"), initial=before))

    def flops(self) -> float:
        """Of one step's convolutions and matrix products."""
        call, self.call = self.call, self.model  # the counter may not see inside compiled code
        with FlopCounterMode(display=False) as counter:
            self._update(self.x, self.labels)
        self.call = call
        return counter.get_total_flops()

    def kernels(self) -> list[tuple[str, float]]:
        """Milliseconds in a step, longest first: of kernels on CUDA, of operators on CPUs."""
        steps = 5
        with torch.profiler.profile() as profile:
            for _ in range(steps):
                self.step()
            self._wait()
        device = self.x.device.type
        rows: list[Any] = [row for row in profile.key_averages() if row.device_type.name == device.upper()]
        if self.x.is_cuda:  # annotations span the kernels that they name
            rows = [row for row in rows if not row.is_user_annotation]
        field = "self_device_time_total" if self.x.is_cuda else "self_cpu_time_total"
        times = [(row.key, getattr(row, field) / 1e3 / steps) for row in rows]  # microseconds
        return sorted(times, key=lambda row: -row[1])


def _serve(variant: str, options: argparse.Namespace, pipe: Any) -> None:
    keep_freed_memory()
    trainer = Trainer(variant, options)
    for order in iter(pipe.recv, None):
        pipe.send(getattr(trainer, order)())


def train(options: argparse.Namespace) -> tuple[list[tuple], dict[str, list[tuple[str, float]]]]:
    """A table of COLUMNS, one row a variant; and, where `options.kernels` asks for it, each one's kernels.

    Raises:
        ValueError: no such device, none that has CUDA graphs, or counts below their least.
        RuntimeError: the first variant's process died; its own message is on stderr. Another one that dies is
            left out.
    """
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch {torch.__version__} finds no CUDA device here")
    if options.cuda_graph and not options.device.startswith("cuda"):
        raise ValueError(f"--cuda-graph needs --device cuda, got {options.device}")
    for name, least in {"batch": 1, "rounds": 1, "warmup": 0, "threads": 0, "kernels": 0}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    context, pipes = multiprocessing.get_context("spawn"), {}
    for variant in options.variants:
        pipes[variant], end = context.Pipe()
        context.Process(target=_serve, args=(variant, options, end), daemon=True).start()
        end.close()  # so that the death of the process ends the wait for it
        pipes[variant].send("prepare")  # all side by side

    first, ready = options.variants[0], list(options.variants)

    def ask(order: str = "") -> dict[str, Any]:
        """Of each variant that is ready, one after another, the answer to an order, or to the one before."""
        answers = {}
        for variant in list(ready):
            try:
                if order:
                    pipes[variant].send(order)
                answers[variant] = pipes[variant].recv()
            except (EOFError, ConnectionError) as error:
                died = f"the process of {variant} died; what it said is above"
                if variant == first:
                    raise RuntimeError(died) from error
                print(f"{variant}: left out: {died}", file=sys.stderr)
                ready.remove(variant)
        return answers

    ask()
    rounds = [ask("seconds") for _ in range(options.warmup + options.rounds)][options.warmup :]
    rows: list[tuple] = [COLUMNS]
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else ""
    peak = next((flops for key, flops in DENSE_PEAK.items() if key in name), None)
    work = ask("flops")[first] if peak else 0.0  # attentions add next to none
    memory, kernels = ask("peak_bytes"), ask("kernels") if options.kernels else {}
    for variant in ready:
        seconds = statistics.median(times[variant] for times in rounds)
        ratio = statistics.median(times[variant] / times[first] for times in rounds)
        told = (1e3 * seconds, ratio, options.batch / seconds, memory[variant] / 2**20)
        told += (memory[variant] / memory[first], work / seconds / peak if peak else float("nan"))
        rows.append((variant, *(round(value, 3) for value in told)))
        pipes[variant].send(None)
    return rows, kernels


def print_training(options: argparse.Namespace) -> None:
    table, kernels = train(options)
    if options.csv:
        return csv.writer(sys.stdout, lineterminator="\n").writerows(table)
    told = {name: value for name, value in vars(options).items() if name != "run"}
    print(*(f"{name}={value}" for name, value in told.items()), f"torch={torch.__version__}")
    for row in table:
        print("".join(f"{cell!s:>15}" for cell in row))
    for variant, times in kernels.items():
        whole = sum(spent for _, spent in times)
        print(f"\nlongest of {variant}, {whole:.3f} ms a step in all:")
        for name, spent in times[: options.kernels]:
            print(f"{spent / whole:7.1%}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m export.benchmark")
    commands = parser.add_subparsers(required=True)
    benchmark_infer.add_options(commands.add_parser("infer", description=benchmark_infer.__doc__))
    benchmark_gate.add_options(commands.add_parser("gate", description=benchmark_gate.__doc__))
    command = commands.add_parser("train", description=__doc__)
    command.set_defaults(run=print_training)
    for name, default in DEFAULTS.items():
        choices = {"model": BACKBONES, "tag": DATASETS}.get(name)
        command.add_argument(f"--{name}", type=type(default), default=default, choices=choices)
    command.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:-2])
    command.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    command.add_argument("--format", choices=FORMATS, default="channels_last")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--threads", type=int, default=0, help="0: as many as torch chooses")
    command.add_argument(
        "--compile", nargs="?", const="model", choices=("model", "blocks"), help="as one graph, or by blocks"
    )
    command.add_argument("--cuda-graph", action="store_true", help="replay a captured step")
    command.add_argument(
        "--kernels", type=int, default=0, metavar="N", help="also the N longest kernels of each variant"
    )
    command.add_argument("--csv", action="store_true")
    options = parser.parse_args()
    with one_sentence():
        options.run(options)


if __name__ == "__main__":
    main()
