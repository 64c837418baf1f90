"""Measures inference: `python -m export.benchmark infer --model wrn10_4` compares attentions and runtimes.

All programs of a backbone live in one process and run once a round in shuffled order; a ratio is the median
over rounds of program / plain. Values of weights do not change the time, so a backbone without trained
weights gets random ones, and its gates are folded as they were measured, static or not.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from torch import Tensor, nn

from tamzoo.card_texts import table
from tamzoo.catalogue import BACKBONES, ENTRIES
from tamzoo.checkpoint import write_whole
from tamzoo.data import normalise
from tamzoo.datasets import DATASETS, Dataset
from tamzoo.deploy import PARITY_IMAGES, Run, as_input
from tamzoo.fold import FoldReport, reparameterize_model, report_of
from tamzoo.gates import measure_gates
from tamzoo.images import random_crops
from tamzoo.journal import hardware
from tamzoo.latency import time_in_turns
from tamzoo.onnx_export import export_entry, open_session, operators_of, runner
from tamzoo.plots import check_picture, plot_latencies
from tamzoo.quantise import quantise
from tamzoo.records import Timing
from tamzoo.results import csv_text
from tamzoo.terminal import bar

ATTENTIONS = {"plain": "plain", "SE": "se", "CBAM": "cbam", "TAM unfolded": "tam", "TAM folded": "tam"}
PROGRAMS = (*ATTENTIONS, "int8", "torch", "torch.compile")  # the last three: of TAM folded
QUIET = 0.25  # load a core of a machine that is called idle


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A backbone's programs, ready to run on a batch; the first is the plain one."""

    backbone: str
    told: str  # of weights, gates and operators, one sentence
    programs: dict[str, Run]


def add_options(command: argparse.ArgumentParser) -> None:
    """What `infer` is asked on the command line."""
    command.set_defaults(run=infer)
    command.add_argument("--model", nargs="+", choices=BACKBONES, default=["wrn10_4"], metavar="BACKBONE")
    command.add_argument("--tag", choices=DATASETS, default="cifar10", help="data set: classes and stem")
    command.add_argument("--batches", nargs="+", type=int, default=[1, 16, 128], metavar="N")
    command.add_argument("--rounds", nargs="+", type=int, default=[200, 50, 20], metavar="N", help="a batch")
    command.add_argument("--threads", type=int, default=1, help="of every program (default: 1)")
    command.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS, metavar="PROGRAM")
    command.add_argument("--csv", type=Path, help="file for the table")
    command.add_argument("--plot", type=Path, help="picture: .png, .svg or .pdf")
    command.add_argument("--force", action="store_true", help="even where the machine is busy")


def check_load(force: bool) -> float:
    """The load of the last minute.

    Raises:
        ValueError: the machine is busy, and nobody forces.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > QUIET * cores and not force:
        raise ValueError(
            f"the machine is busy: its load was {load:.2f} over the last minute, expected at most "
            f"{QUIET * cores:.2f} on {cores} cores; wait a minute, or measure nonetheless with --force"
        )
    return load


def settled(name: str, pixels: Tensor, dataset: Dataset) -> nn.Module:
    """A model with its trained weights, or random ones and these images' BatchNorm statistics."""
    if _trained(name):
        return timm.create_model(name, pretrained=True).eval()
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # else the activations of deep backbones grow without bound
        model.train()(normalise(pixels, dataset))
    return model.eval()


def folded_copy(name: str, model: nn.Module, pixels: Tensor, dataset: Dataset) -> nn.Module:
    """Folded by the gates that it carries; an untrained one by the means of its gates on these images."""
    if _trained(name):
        return reparameterize_model(model)
    return reparameterize_model(model, measure_gates(model, normalise(pixels, dataset)), tolerance=0.99)


def _trained(name: str) -> bool:
    entry = ENTRIES.get(name)
    return bool(entry and entry.trained)


def prepare(backbone: str, tag: str, chosen: Iterable[str], threads: int) -> Contest:
    """Exports and opens what was chosen of PROGRAMS, and the plain one; errors as `describe`."""
    dataset, chosen = DATASETS[tag], {"plain", *chosen}
    pixels = random_crops(PARITY_IMAGES, dataset.input_size[-1])
    few, tam = pixels[:32], f"{backbone}_tam.{tag}"
    unfolded = settled(tam, few, dataset)
    folded = folded_copy(tam, unfolded, few, dataset)
    made = {"TAM unfolded": unfolded, "TAM folded": folded}
    programs: dict[str, Run] = {"torch": folded, "torch.compile": torch.compile(folded)}
    with TemporaryDirectory() as folder:
        files = {program: Path(folder) / f"{program}.onnx" for program in PROGRAMS}
        for program, attention in ATTENTIONS.items():
            if program in chosen | {"TAM folded"}:
                model = made.get(program) or settled(f"{backbone}_{attention}.{tag}", few, dataset)
                export_entry(model, files[program], pixels=pixels, keep_gates=True)
        if "int8" in chosen:
            model = quantise(files["TAM folded"], dataset, pixels)
            files["int8"].write_bytes(model.SerializeToString())
        for program, file in files.items():
            if file.exists():  # spinning threads of one session would slow down the next one's
                programs[program] = runner(open_session(file, threads, spin=False))
        told = describe(
            tam, report_of(folded), operators_of(files["plain"]), operators_of(files["TAM folded"])
        )
    folded.to(memory_format=torch.channels_last)
    chosen_programs = {program: programs[program] for program in PROGRAMS if program in chosen}
    return Contest(backbone=backbone, told=told, programs=chosen_programs)


def describe(tam: str, report: FoldReport, plain: dict[str, int], folded: dict[str, int]) -> str:
    """Weights, gates and operators of a folded model.

    Args:
        plain: How many operators of each kind the plain graph has.
        folded: The same of the folded one.
    Raises:
        RuntimeError: all gates were folded, yet the two differ.
    """
    if not report.kept and plain != folded:
        raise RuntimeError(f"{tam}: folded, its operators are {folded}, those of the plain graph are {plain}")
    counts = ", ".join(f"{count} {operator}" for operator, count in folded.items())
    gates = f"{len(report.folded)} of {len(report.folded) + len(report.kept)} gates folded"
    weights = "trained weights" if _trained(tam) else "random weights, gates folded by their means"
    if report.kept:
        return f"{weights}, {gates}. Operators of the folded graph: {counts}"
    return f"{weights}, {gates}. Operators of plain and folded graph alike: {counts}"


def compete(contest: Contest, batch: int, rounds: int, dataset: Dataset) -> list[Timing]:
    """Timings of every program at a batch size, the plain one first."""
    x = as_input(random_crops(batch, dataset.input_size[-1]), dataset)
    inputs = {True: x.to(memory_format=torch.channels_last), False: x}  # torch is faster with the former
    programs: dict[str, Callable[[], object]] = {
        name: partial(run, inputs[name.startswith("torch")]) for name, run in contest.programs.items()
    }
    with torch.inference_mode():
        return time_in_turns(programs, rounds=rounds, progress=bar)


def infer(options: argparse.Namespace) -> None:
    """Runs the comparison, prints a table a backbone in Markdown, and writes the files that were asked for.

    Raises:
        ValueError: bad options, a busy machine, or an extra that is not installed.
    """
    batches, rounds = options.batches, options.rounds * (1 if options.rounds[1:] else len(options.batches))
    if len(rounds) != len(batches) or min(*batches, *rounds, options.threads) < 1:
        raise ValueError(
            f"expected positive numbers and as many --rounds as --batches or one, got {options.rounds} "
            f"for {batches}, {options.threads} threads"
        )
    if options.plot:
        check_picture(options.plot)
    load = check_load(options.force)
    torch.set_num_threads(options.threads)
    series: dict[tuple[str, int], list[Timing]] = {}
    for backbone in options.model:
        contest = prepare(backbone, options.tag, options.programs, options.threads)
        found = {
            batch: compete(contest, batch, count, DATASETS[options.tag])
            for batch, count in zip(batches, rounds, strict=True)
        }
        series |= {(backbone, batch): timings for batch, timings in found.items()}
        print(f"{backbone}, {options.tag}: {contest.told}.\n\n{markdown(found)}\n", flush=True)
    cpu = hardware(torch.device("cpu"), 1)
    state = f"threads: {options.threads}, {cpu}, load {load:.2f} before the run"
    libraries = f"onnxruntime {version('onnxruntime')}, torch {torch.__version__}"
    print(f"`python -m export.benchmark {shlex.join(sys.argv[1:])}`: {state}; {libraries}.")
    if options.csv:
        write_whole(options.csv, _as_csv(series, options, state))
    if options.plot:
        named = {f"{backbone}, batch {batch}": timings for (backbone, batch), timings in series.items()}
        plot_latencies(named, options.plot)


def markdown(found: dict[int, list[Timing]]) -> str:
    """A row a program, and for each batch size its median and the median of its ratios to plain."""
    rows = [["program"] + [head for batch in found for head in (f"batch {batch}", "of plain (quartiles)")]]
    for timings in zip(*found.values(), strict=True):
        rows.append([timings[0].name])
        for t in timings:
            rows[-1] += [f"{t.median_ms:.2f} ms", f"{t.ratio:.2f} ({t.ratio_low:.2f} to {t.ratio_high:.2f})"]
    return table(rows)


def _as_csv(series: dict[tuple[str, int], list[Timing]], options: argparse.Namespace, state: str) -> str:
    rows = [
        {"model": backbone, "tag": options.tag, "batch": batch}
        | asdict(timing)
        | {"images_per_s": 1e3 * batch / timing.median_ms, "threads": options.threads, "machine": state}
        for (backbone, batch), timings in series.items()
        for timing in timings
    ]
    return csv_text(rows[0], rows)
