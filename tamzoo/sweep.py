"""One training run a group size (paper, Figure 2)."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch

from tamzoo.attention import GATE_TOLERANCE
from tamzoo.catalogue import ENTRIES
from tamzoo.checkpoint import write_whole
from tamzoo.distributed import World
from tamzoo.findings import SweptSize
from tamzoo.gates import gates_of
from tamzoo.progress import Voice
from tamzoo.records import Record, read_record
from tamzoo.session import Order, train_entries

GROUP_SIZES = (2, 4, 8, 16, 32, 64)  # of the paper


def sweep_group_sizes(
    name: str,
    sizes: Sequence[int],
    order: Order,
    data: Path | None,
    out: Path,
    time_budget: float,
    world: World,
    voice: Voice,
) -> list[SweptSize]:
    """Trains an entry once a group size, then without attention; ended runs are not repeated, others go on.

    Where a group size does not divide a gate's channels, that gate's tree is one convolution over them all.
    Without attention nothing is trained where the catalogue has no such row.

    Args:
        name: An entry with TAM.
        sizes: Each at least 2.
        order: The same for all runs.
        out: Holds a folder for each run, `group_size_2` and so on and `plain`, and `sweep.json`.
        time_budget: Seconds of wall time, from now.
    Returns:
        The runs that have ended, by group size, the one without attention last.
    Raises:
        ValueError: no such entry, a group size below 2, or a folder that holds another run.
    """
    if name not in ENTRIES or ENTRIES[name].attention != "tam":
        raise ValueError(f"{name}: expected an entry with TAM. All names: tamzoo list '*_tam.*'")
    started, found = time.monotonic(), []
    plain = replace(ENTRIES[name], attention="plain").name
    for size in [*sorted(set(sizes)), *([None] if plain in ENTRIES else [])]:
        folder, trained, model_args = out / "plain", plain, {}
        if size:
            folder, trained, model_args = out / f"group_size_{size}", name, {"group_size": size}
        gates, single = _trees(trained, model_args)
        if size:
            voice.say(f"group size {size}: {single} of {gates} trees are one convolution over all channels")
        ordered = replace(order, model_args=model_args, resume=True)
        left = time_budget - (time.monotonic() - started)
        if not train_entries({trained: folder}, ordered, data, left, world, voice):
            break
        if world.first:
            found.append(_swept(read_record(folder / "record.json"), size, gates, single))
            write_whole(out / "sweep.json", json.dumps([asdict(row) for row in found], indent=2) + "\n")
    return found


def _trees(name: str, model_args: dict[str, Any]) -> tuple[int, int]:
    """How many gates of TAM the entry has, and how many of their trees are one convolution."""
    with torch.device("meta"):
        gates = gates_of(timm.create_model(name, **model_args)).values()
    return len(gates), sum(len(gate.tree) == 1 for gate in gates)


def _swept(record: Record, size: int | None, gates: int, single: int) -> SweptSize:
    return SweptSize(
        group_size=size,
        entry=record.entry,
        recipe=record.recipe["name"],
        epochs=record.epochs,
        seed=record.seed,
        n=record.score.n,
        top1_error=record.score.top1_error,
        top5_error=record.score.top5_error,
        gates=gates,
        single=single,
        static=sum(gate.width <= GATE_TOLERANCE for gate in record.gates),
        sha256=record.sha256,
    )
