"""Weights and records on disk: safetensors with a JSON sidecar, hashed, written whole or not at all."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tamzoo.records import Record, read_record

WEIGHTS = "model.safetensors"  # in the folder of an entry or of a run, record.json beside it
HEAD = {"fc.weight", "fc.bias"}
ADAPTABLE = {"conv1.weight", *HEAD}  # timm fits them to other channels and classes
HALF_WRITTEN = f".*.{'[0-9a-f]' * 8}.*"  # what `whole_file` leaves of files with a suffix where it is killed


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name only when the block succeeds.

    The content is synced before the renaming; on any failure nothing is left behind.

    Raises:
        OSError: the folder cannot be written, or the disk is full; says which.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        part.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}") from error
    try:
        yield part
        with part.open("r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if not error.errno or (error.filename and str(error.filename) != str(part)):
            raise
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file at once or not at all."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def locked(lock: FileLock, refusal: str, error: type[ValueError] = ValueError) -> AbstractContextManager:
    """Takes a lock at once; leaving the context gives it back. Whoever holds it may take it again.

    Raises:
        ValueError: another holds it; of the kind `error`, says `refusal`.
    """
    try:
        return lock.acquire(timeout=0)
    except Timeout as timeout:
        raise error(refusal) from timeout


def check_output_file(path: Path) -> None:
    """Sees that a file can have this name, before there is any work.

    Raises:
        ValueError: no such folder, one that may not be written to, or a folder itself.
    """
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file, found a folder")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: you may not write to {path.parent.resolve()}")


def check_weights_file(path: Path, sha256: str | None = None) -> None:
    """Sees that a file holds safetensors before anything is built from it. Nothing is ever unpickled.

    Args:
        sha256: What the file's hash must be; not compared where None.
    Raises:
        ValueError: missing, a pickle, truncated, or another file than the catalogue's.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a safetensors file, found {'a folder' if path.is_dir() else 'nothing'}"
        )
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(9)  # of safetensors: the length of a header, which begins with a brace
        if start[8:] not in (b"", b"{") and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise ValueError(
                f"{path}: expected safetensors, got a pickle (.pth/.bin), which can run code when loaded; "
                "convert it with safetensors.torch.save_file in an environment you trust"
            ) from error
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); fetch or write it again"
        ) from error
    if sha256 is not None and sha256_of(path) != sha256:
        raise ValueError(
            f"{path}: its SHA-256 is {sha256_of(path)[:12]}..., "
            f"the catalogue says {sha256[:12]}...; fetch it again"
        )


def check_fit(weights: dict[str, Tensor], model: nn.Module, name: str) -> None:
    """Sees that weights are of this architecture; a head or stem of another size may still be adapted.

    Raises:
        ValueError: keys are missing or left over, or shapes differ; names the first of each.
    """
    expected = {key: value.shape for key, value in model.state_dict().items() if "measured_gate" not in key}
    found = {key: value.shape for key, value in weights.items() if "measured_gate" not in key}
    problems = {
        "missing": sorted(expected.keys() - found.keys() - ADAPTABLE),
        "unexpected": sorted(found.keys() - expected.keys() - ADAPTABLE),
        "of another shape": sorted(
            key for key in expected.keys() & found.keys() - ADAPTABLE if expected[key] != found[key]
        ),
    }
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {what} (first: {keys[0]})" for what, keys in problems.items() if keys)
        raise ValueError(f"these weights are not of {name}: {told}")


def read_finished(folder: Path) -> Record:
    """The record of a finished run, once its weights are seen to be those that it tells of.

    Raises:
        ValueError: not the folder of a finished run, or the weights are others.
    """
    if not ((folder / WEIGHTS).is_file() and (folder / "record.json").is_file()):
        raise ValueError(f"{folder}: expected a finished run with {WEIGHTS} and record.json")
    record = read_record(folder / "record.json")
    if (found := sha256_of(folder / WEIGHTS)) != record.sha256:
        raise ValueError(
            f"{folder / WEIGHTS}: its SHA-256 is {found[:12]}..., its record says {record.sha256[:12]}...; "
            "fetch or copy both again"
        )
    return record


def model_arguments(weights: Path) -> dict[str, Any]:
    """How the model of a weights file is made: its number of classes, and what the record beside it tells.

    Raises:
        ValueError: not a safetensors file; or the record there cannot be read.
    """
    check_weights_file(weights)
    with safe_open(weights, framework="pt") as file:
        head = "fc.bias" in file.keys()  # noqa: SIM118
        arguments = {"num_classes": file.get_tensor("fc.bias").numel()} if head else {}
    record = record_beside(weights)
    return arguments | (record.model_args if record else {})


def told_entry(weights: Path) -> str | None:
    """The `architecture.tag` that a safetensors file says it is of, where it says so, as exported ones do."""
    with safe_open(weights, framework="pt") as file:
        return (file.metadata() or {}).get("architecture")


def record_beside(weights: Path) -> Record | None:
    """The record in a weights file's folder, where it is of these very weights.

    Raises:
        ValueError: it cannot be read.
    """
    path = weights.parent / "record.json"
    record = read_record(path) if path.is_file() else None
    return record if record and record.sha256 == sha256_of(weights) else None


def load_weights(model: nn.Module, path: Path, name: str, *, head: bool = True) -> None:
    """Loads a safetensors file into a model of exactly its shapes.

    Args:
        name: What the model is called in a message.
        head: Whether the file's classifier is loaded too; without it the model keeps its own.
    Raises:
        ValueError: not safetensors, or of another architecture or class count.
    """
    check_weights_file(path)
    weights = load_file(path)
    check_fit(weights, model, name)
    state = model.state_dict()
    if not head:
        weights |= {key: state[key] for key in HEAD}
    for key in sorted(ADAPTABLE & (state.keys() | weights.keys())):
        expected, found = (list(held[key].shape) if key in held else None for held in (state, weights))
        if found != expected:
            raise ValueError(f"these weights are not of {name}: {key} is {found}, expected {expected}")
    model.load_state_dict(weights)


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where all are numbers."""
    return next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)


def check_finite(weights: dict[str, Tensor], name: str) -> None:
    """Sees that weights are numbers.

    Args:
        name: What they are called in a message.
    Raises:
        ValueError: NaN or infinity; names the first tensor that holds one.
    """
    if bad := not_finite(weights):
        raise ValueError(
            f"{name}: {bad} holds NaN or infinity; expected finite weights, train or fetch again"
        )


def save_weights(path: Path, state: dict[str, Tensor]) -> str:
    """Writes weights as float16 safetensors and returns the file's SHA-256.

    BatchNorm's counters stay integers; measured gates stay float32, since folding multiplies by them.
    """
    stored = {
        key: value.half() if value.is_floating_point() and "measured_gate" not in key else value
        for key, value in ((key, value.detach().cpu().contiguous()) for key, value in state.items())
    }
    if bad := not_finite(stored):
        raise ValueError(f"{bad} is not finite in float16; these weights are not stored")
    write_whole(path, save(stored, metadata={"format": "pt"}))
    return sha256_of(path)
