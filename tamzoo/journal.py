"""What a run writes for people: run.json at its start; an epoch's line to log.csv and TensorBoard."""

import csv
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tamzoo.checkpoint import locked, whole_file, write_whole
from tamzoo.recipes import Recipe
from tamzoo.snapshots import newest

SESSIONS = ("commits", "hardware", "versions")  # of a run: those of each session that differ
logger = logging.getLogger(__name__)
LOG_FIELDS = ("epoch", "lr", "train_loss", "test_top1_error", "images_per_s", "seconds")


class AnotherTrainsError(ValueError):
    """Another process trains in the run's folder."""


class Journal:
    """The run's folder.

    Args:
        folder: Made where missing.
        wanted: The run's `identity`.
        resume: Go on with the run that is there, where there is one.
        hardware: What trains in this session.
    Raises:
        ValueError: the folder holds another run; or this one, and `resume` is not set; or it is a file.

    Attributes:
        commit, hardware, versions: Of all sessions of the run.
    """

    def __init__(self, folder: Path, wanted: dict[str, Any], *, resume: bool, hardware: str) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")
        self._writer: Any = None
        self._late: list[dict[str, float]] = []  # rows not yet written
        if folder.is_file():
            raise ValueError(f"{folder}: expected a folder for the run, found a file; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        if not path.exists() and ((folder / "record.json").exists() or newest(folder)):
            raise ValueError(f"{folder} holds a run without its run.json; choose another --out")
        found = wanted | (_read_run(path) if path.exists() else {key: [] for key in SESSIONS})
        check_same_run(folder, found, wanted)
        if path.exists() and not resume:
            raise ValueError(
                f"{folder} holds a run of {wanted['entry']}; pass --resume to go on, or choose another --out"
            )
        if (folder / "log.csv").exists():
            read_log(folder)  # a damaged one is told before there is any work
        # what ran is told when it starts: by its end the code on disk may be another
        here: dict[str, Any] = dict(zip(SESSIONS, (commit_here(), hardware, versions()), strict=True))
        for key in SESSIONS:
            if here[key] not in found[key]:
                found[key].append(here[key])
        self._run = found
        self.commit, self.hardware = ", ".join(found["commits"]), "; ".join(found["hardware"])
        self.versions = {
            name: ", ".join(dict.fromkeys(each[name] for each in found["versions"])) for name in versions()
        }

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from training in the folder, and writes run.json.

        Raises:
            AnotherTrainsError: one does.
        """
        refusal = f"{self.folder}: another process trains there; wait for its end, or choose another --out"
        with locked(self._lock, refusal, AnotherTrainsError):
            write_whole(self.folder / "run.json", json.dumps(self._run, indent=2) + "\n")
            yield

    def log(self, row: dict[str, float]) -> None:
        """Adds an epoch to log.csv; later ones, of a session that was lost, go.

        Raises:
            OSError: it cannot be written; the next call, or `close`, writes this row too.
        """
        self._late.append(row)
        self._write_late()

    def _write_late(self) -> None:
        path = self.folder / "log.csv"
        before = read_log(self.folder) if path.exists() else []
        rows = [*(old for old in before if old["epoch"] < self._late[0]["epoch"]), *self._late]
        with whole_file(path) as part, part.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(LOG_FIELDS)
            writer.writerows([[row[name] for name in LOG_FIELDS] for row in rows])
        for late in self._late:
            self._to_tensorboard(late)
        self._late.clear()

    def _to_tensorboard(self, row: dict[str, float]) -> None:
        epoch = int(row["epoch"])
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=epoch)
            except ImportError:
                self._writer = False
            except Exception as error:  # an installation that clashes fails in any way; the run goes on
                logger.warning("nothing is told to TensorBoard: %s", error)
                self._writer = False
        if self._writer:
            for name in LOG_FIELDS[1:]:
                self._writer.add_scalar(name, row[name], epoch)
            self._writer.flush()

    def close(self) -> None:
        """Ends TensorBoard's thread, after the rows that could not be written before.

        Raises:
            OSError: nor can they be now.
        """
        if self._late:
            self._write_late()
        if self._writer:
            self._writer.close()
        self._writer = None


def identity(
    *,
    entry: str,
    recipe: Recipe,
    seed: int,
    precision: str,
    model_args: dict[str, Any],
    start: str | None,
    images: int | None = None,
) -> dict[str, Any]:
    """What makes two runs the same, as JSON holds it.

    Args:
        start: SHA-256 of the weights that the run begins with; None for random ones.
        images: The training split's `checksum`.
    """
    found = {
        "entry": entry,
        "seed": seed,
        "precision": precision,
        "recipe": asdict(recipe),
        "model_args": model_args,
        "start": start,
        "images": images,
    }
    return json.loads(json.dumps(found))  # tuples become lists


def check_same_run(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compares the identity of the run in a folder with that of the run that is wanted.

    Raises:
        ValueError: they differ; names the first thing that does.
    """
    for key, value in wanted.items():
        theirs = found[key]
        if key == "recipe":  # early ones had fewer fields
            theirs = {field.name: field.default for field in fields(Recipe)} | theirs
        if theirs == value:
            continue
        if key == "recipe":
            field = next(field for field in value | theirs if theirs.get(field) != value.get(field))
            key, theirs, value = f"recipe's {field}", theirs.get(field), value.get(field)
        raise ValueError(f"{folder} holds another run ({key}: {theirs}, not {value}); choose another --out")


def _read_run(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}, not an object")
        kinds = {"entry": str, "seed": int, "precision": str, "recipe": dict, **dict.fromkeys(SESSIONS, list)}
        for key, kind in kinds.items():
            if not isinstance(found[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the description of a run ({error}); choose another --out") from error


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's log.csv, an epoch each.

    Raises:
        ValueError: no log there, or not one of ours.
    """
    path = folder / "log.csv"
    if not path.is_file():
        raise ValueError(f"{path}: expected the log of a training run, found nothing")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: float(row[name]) for name in LOG_FIELDS} for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the log of a training run ({error!r})") from error
    return [row | {"epoch": int(row["epoch"])} for row in rows]


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    found = {}
    for name in ("torch", "torchvision", "timm", "tamzoo"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # ours, run from a clone
            found[name] = "not installed"
    return found


def hardware(device: torch.device, processes: int) -> str:
    """The name of what trains, and how many times; of a CPU how many cores torch computes on."""
    times = f"{processes} x " if processes > 1 else ""
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    used, cores = torch.get_num_threads(), os.cpu_count() or 1
    share = f"{used} of " if used < cores else ""
    return f"{times}CPU, {share}{cores} cores ({names[0] if names else platform.machine()})"


def commit_here() -> str:
    """The repository's commit, with `-dirty` where files differ from it.

    Outside our repository what TAMZOO_COMMIT says (for a copy of the tree without .git), else `unknown`.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed; a repository further up would be somebody else's
        return os.environ.get("TAMZOO_COMMIT", "unknown")
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
