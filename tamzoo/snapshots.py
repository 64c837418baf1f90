"""Snapshots of a run in progress: written whole or not at all, the one before kept, damaged ones passed over.

A snapshot is a safetensors file named by its step; a checksum of all tensors and of what is told with
them is in its metadata, since safetensors itself sees a short file but not a changed byte.
"""

import json
import logging
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tamzoo.checkpoint import HALF_WRITTEN, not_finite, write_whole

log = logging.getLogger(__name__)


def _paths(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("snapshot-*.safetensors"), reverse=True)


def _checksum(tensors: dict[str, Tensor], told: dict[str, str]) -> str:
    value = zlib.crc32(json.dumps({**told, "checksum": ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = zlib.crc32(
            tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), value)
        )
    return f"{value:08x}"


def save_snapshot(folder: Path, step: int, state: dict[str, Tensor], told: dict[str, str]) -> None:
    """Writes the state at a step; of those before, the newest is kept.

    Args:
        told: What else to remember.
    Raises:
        OSError: the file cannot be written; those before are untouched.
        ValueError: a tensor is not finite; nothing is written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if bad := not_finite(tensors):
        raise ValueError(f"{bad} is not finite at step {step}")
    path = folder / f"snapshot-{step:08d}.safetensors"
    told = {**told, "step": str(step)}
    told["checksum"] = _checksum(tensors, told)
    # save_file would write a file under a name of its own, and leave it where it is killed
    write_whole(path, save(tensors, metadata=told))
    keep_newest(folder, 2)


def keep_newest(folder: Path, n: int) -> None:
    """Deletes all snapshots but n, and what a killed process left half-written."""
    for path in [*_paths(folder)[n:], *folder.glob(HALF_WRITTEN)]:
        path.unlink(missing_ok=True)


def newest(folder: Path) -> Path | None:
    """The file of the highest step, read or not."""
    return next(iter(_paths(folder)), None)


def load_snapshot(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The newest whole snapshot, on the CPU, and what was told with it; None where there is no file.

    Damaged ones that are newer go: they would be taken for the last good one, and push out good ones.

    Raises:
        ValueError: there are files, and none is whole.
    """
    paths = _paths(folder)
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            log.warning("%s: damaged (%s); falling back to the snapshot before", path, error)
            continue
        if told and told.get("checksum") == _checksum(tensors, told):
            for damaged in paths[: paths.index(path)]:
                damaged.unlink()
            return tensors, told
        log.warning("%s: damaged (another checksum); falling back to the snapshot before", path)
    if paths:
        raise ValueError(f"{folder}: none of its {len(paths)} snapshots is whole; delete it to start again")
    return None
