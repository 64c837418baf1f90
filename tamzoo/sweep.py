"""One training run a value of a setting: group sizes (paper, Figure 2), or attentions and seeds."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch

from tamzoo.catalogue import ENTRIES
from tamzoo.distributed import World
from tamzoo.gates import gates_of
from tamzoo.progress import Voice
from tamzoo.records import Record, read_record
from tamzoo.registry import find_entry
from tamzoo.session import Order, train_entries

GROUP_SIZES = (2, 4, 8, 16, 32, 64)  # of the paper


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A run that a sweep is to make."""

    folder: str
    entry: str
    seed: int
    group_size: int | None = None  # None: the entry's own, if any


def group_sizes(name: str, sizes: Sequence[int], seed: int) -> list[Variant]:
    """An entry once a group size, then without attention.

    Where a group size does not divide a gate's channels, that gate's tree is one convolution over them all.

    Args:
        name: An entry with TAM.
        sizes: Each at least 2.
    Raises:
        ValueError: no such entry.
    """
    if name not in ENTRIES or ENTRIES[name].attention != "tam":
        raise ValueError(f"{name}: expected an entry with TAM. All names: tamzoo list '*_tam.*'")
    plain = replace(ENTRIES[name], attention="plain").name
    return [
        *(
            Variant(folder=f"group_size_{size}", entry=name, seed=seed, group_size=size)
            for size in sorted(set(sizes))
        ),
        Variant(folder="plain", entry=plain, seed=seed),
    ]


def attentions(backbone: str, names: Sequence[str], tag: str, seeds: int) -> list[Variant]:
    """A backbone with each attention, once a seed from 0 on; all of a seed before the next one.

    Raises:
        ValueError: the catalogue has no such row, or fewer than two seeds.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, for a spread, got {seeds}")
    entries = [find_entry(f"{backbone}_{name}.{tag}").name for name in dict.fromkeys(names)]
    return [
        Variant(folder=f"{entry}-seed-{seed}", entry=entry, seed=seed)
        for seed in range(seeds)
        for entry in entries
    ]


def sweep(
    variants: Sequence[Variant],
    order: Order,
    data: Path | None,
    out: Path,
    time_budget: float,
    world: World,
    voice: Voice,
) -> list[Record]:
    """Trains each variant; ended runs are not repeated, others go on.

    Args:
        order: The same for all runs, but for what a variant says.
        out: Holds the folders of the runs.
        time_budget: Seconds of wall time, from now.
    Returns:
        The records of the runs that have ended, in the variants' order.
    Raises:
        ValueError: a group size below 2, or a folder that holds another run.
    """
    started, found = time.monotonic(), []
    for variant in variants:
        folder, size = out / variant.folder, variant.group_size
        model_args: dict[str, Any] = {"group_size": size} if size else {}
        if size:
            with torch.device("meta"):
                gates = gates_of(timm.create_model(variant.entry, **model_args)).values()
            single = sum(len(gate.tree) == 1 for gate in gates)
            voice.say(
                f"group size {size}: {single} of {len(gates)} trees are one convolution over all channels"
            )
        ordered = replace(order, seed=variant.seed, model_args=model_args, resume=True)
        left = time_budget - (time.monotonic() - started)
        if not train_entries({variant.entry: folder}, ordered, data, left, world, voice):
            break
        if world.first:
            found.append(read_record(folder / "record.json"))
    return found


def summary(runs: Sequence[Record]) -> list[str]:
    """For each entry its runs' mean top-1 error, with the standard deviation of a sample over its seeds."""
    lines = []
    for entry in dict.fromkeys(run.entry for run in runs):
        errors = [run.score.top1_error for run in runs if run.entry == entry]
        spread = f", standard deviation {stdev(errors):.2f}" if len(errors) > 1 else ""
        each = ", ".join(f"{error:.2f}" for error in errors)
        lines.append(f"{entry}: top-1 error {mean(errors):.2f} %{spread} ({each})")
    return lines
