"""Exports the whole zoo: `python -m export.zoo --out DIR --data DIR [--only PATTERN]`.

Every entry with weights, in every format of FORMATS; each file is checked before it gets its name and
evaluated on the whole test split. Writes `report.csv` into DIR, where rows of other entries stay, and prints
its own. What fails is a row that says why, and the rest goes on. Exit code: 0; 1 where a row failed; 2 for
bad input.
"""

import argparse
import csv
import errno
import fnmatch
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tamzoo.catalogue import ENTRIES, Entry
from tamzoo.checkpoint import load_weights, write_whole
from tamzoo.data import Split, data_directory, load_split
from tamzoo.datasets import Dataset
from tamzoo.deploy import PARITY_IMAGES, Deployment, Run, as_input, deployment
from tamzoo.evaluate import logits_of, score_of
from tamzoo.fold import plain_name
from tamzoo.latency import time_in_turns
from tamzoo.onnx_export import export_deployment, onnx_libraries, open_session, runner
from tamzoo.program_export import export_plain, export_program, load_program
from tamzoo.quantise import calibration_of, export_int8
from tamzoo.results import csv_text
from tamzoo.terminal import bar, one_sentence, table

ROUNDS = 50
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no other format would fare better
FLOAT32 = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report."""

    entry: str
    format: str
    file: str
    size_mb: float | None = None
    accuracy: float | None = None  # top-1 on the whole test split, percent
    lost: float | None = None  # points of accuracy that torch's float32 has more
    agreement: float | None = None  # images with torch's top-1, percent
    latency_ratio: float | None = None  # of plain float32 in onnxruntime, batch 1, one thread, median
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How an entry is written, and opened with a number of threads (0: the runtime chooses)."""

    name: str
    file: str
    write: Callable[[Deployment, Path, Tensor], object]
    load: Callable[[Deployment, Path, int], Run]


def _load_onnx(made: Deployment, path: Path, threads: int) -> Run:
    return runner(open_session(path, threads))


def _load_plain(made: Deployment, path: Path, threads: int) -> nn.Module:
    name = plain_name(made.name)
    model = timm.create_model(name).eval()
    load_weights(model, path, name)
    return model


FORMATS = (
    Format(
        name="onnx float32",
        file=FLOAT32,
        write=lambda made, path, _: export_deployment(made, path, progress=bar),
        load=_load_onnx,
    ),
    Format(
        name="onnx float16",
        file="model_float16.onnx",
        write=lambda made, path, _: export_deployment(made, path, float16=True, progress=bar),
        load=_load_onnx,
    ),
    Format(
        name="onnx int8",
        file="model_int8.onnx",
        write=lambda made, path, calibration: export_int8(
            made, path, source=path.with_name(FLOAT32), calibration=calibration, progress=bar
        ),
        load=_load_onnx,
    ),
    Format(
        name="plain safetensors",
        file="plain.safetensors",
        write=lambda made, path, _: export_plain(made, path, progress=bar),
        load=_load_plain,
    ),
    Format(
        name="torch.export",
        file="model.pt2",
        write=lambda made, path, _: export_program(made, path, progress=bar),
        load=lambda made, path, _: load_program(path),
    ),
)


def export_formats(entry: Entry, folder: Path, train: Split, test: Split, rounds: int = ROUNDS) -> list[Row]:
    """Writes an entry in every format into a folder, which need not exist, and measures each.

    Args:
        train: Some of its images calibrate int8.
        test: Its images are what accuracy and agreement are over.
        rounds: Of the comparison of latencies.
    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    rows = [Row(entry=entry.name, format=form.name, file=form.file) for form in FORMATS]
    folder.mkdir(parents=True, exist_ok=True)
    for form in FORMATS:  # an older file would pass for a new one
        (folder / form.file).unlink(missing_ok=True)
    try:
        model = timm.create_model(entry.name, pretrained=True).eval()
        sha256 = entry.trained.sha256 if entry.trained else ""
        made = deployment(model, pixels=test.pixels[:PARITY_IMAGES], weights_sha256=sha256)
        expected = logits_of(model, test, entry.dataset, bar)
    except Exception as error:
        return [replace(row, error=_reason(error)) for row in rows]
    calibration, runs = calibration_of(train), {}
    for index, form in enumerate(FORMATS):
        path = folder / form.file
        try:
            form.write(made, path, calibration)
            found = logits_of(form.load(made, path, 0), test, entry.dataset, bar)
            runs[index] = form.load(made, path, 1)
        except Exception as error:  # whatever an exporter raises, the next format is tried
            rows[index] = replace(rows[index], error=_reason(error))
        else:
            rows[index] = _compared(rows[index], path, found, expected, test.labels, entry.dataset)
    try:
        for index, ratio in _latency_ratios(made, runs, rounds).items():
            rows[index] = replace(rows[index], latency_ratio=ratio)
    except Exception as error:
        return [row if row.error else replace(row, error=_reason(error)) for row in rows]
    return rows


def _reason(error: Exception) -> str:
    """What went wrong, in one line; a full disk is raised, since nothing else will succeed."""
    if isinstance(error, OSError) and error.errno in FULL:
        raise OSError(error.errno, f"{error.strerror}; free some space and run again") from error
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _compared(row: Row, path: Path, found: Tensor, expected: Tensor, labels: Tensor, dataset: Dataset) -> Row:
    accuracy, wanted = (100 - score_of(logits, labels, dataset).top1_error for logits in (found, expected))
    return replace(
        row,
        size_mb=path.stat().st_size / 1e6,
        accuracy=accuracy,
        lost=wanted - accuracy,
        agreement=100 * (found.argmax(1) == expected.argmax(1)).double().mean().item(),
    )


def _latency_ratios(made: Deployment, runs: dict[int, Run], rounds: int) -> dict[int, float]:
    """Batch 1, one thread, in turns with the plain backbone in onnxruntime; medians of paired ratios."""
    plain = timm.create_model(plain_name(made.name)).eval()
    # values do not change the time, but with random ones the logits of deep backbones explode
    plain.load_state_dict(made.model.state_dict(), strict=False)
    image, threads = as_input(made.pixels[:1], made.dataset), torch.get_num_threads()
    with TemporaryDirectory() as folder:
        path = Path(folder) / FLOAT32
        export_deployment(replace(made, model=plain, reference=plain), path)
        baseline = runner(open_session(path, 1))
    programs: dict[str, Callable[[], object]] = {"plain": partial(baseline, image)}
    programs |= {str(index): partial(run, image) for index, run in runs.items()}
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            timings = time_in_turns(programs, rounds=rounds, progress=bar)[1:]
    finally:
        torch.set_num_threads(threads)
    return {int(timing.name): timing.ratio for timing in timings}


def report(rows: Iterable[Row]) -> str:
    """The whole of report.csv."""
    return csv_text([column.name for column in fields(Row)], map(_rounded, rows))


def _rounded(row: Row) -> dict[str, object]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(row).items()}


def read_report(path: Path) -> list[Row]:
    """The rows of a report, none where there is no file.

    Raises:
        ValueError: it is no report.
    """
    if not path.is_file():
        return []
    numbers = {column.name for column in fields(Row) if column.default is None}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            texts: list[dict[str, Any]] = list(csv.DictReader(file))
        for row in texts:
            row.update({key: float(row[key]) if row[key] else None for key in numbers})
        return [Row(**row) for row in texts]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: expected a report of an earlier run ({error}); remove it") from error


def chosen_entries(pattern: str) -> list[Entry]:
    """Entries with weights whose name a wildcard pattern matches.

    Raises:
        ValueError: there is none; names those that have weights.
    """
    trained = [entry for entry in ENTRIES.values() if entry.trained]
    found = [entry for entry in trained if fnmatch.fnmatch(entry.name, pattern)]
    if not found:
        names = ", ".join(entry.name for entry in trained)
        raise ValueError(f"no entry with weights matches {pattern!r}; those with weights: {names or 'none'}")
    return found


def export_zoo(entries: list[Entry], out: Path, data: Path | None, rounds: int = ROUNDS) -> list[Row]:
    """Exports entries into a folder each under `out`; the report there is whole after each entry.

    Returns:
        The rows of these entries; the report keeps those of others.
    Raises:
        ValueError: no rounds, an extra is not installed, the data are missing or damaged, or as
            `read_report`.
        OSError: `out` cannot be written.
    """
    if rounds < 1:
        raise ValueError(f"expected at least one of --rounds, got {rounds}")
    onnx_libraries()
    path, names = out / "report.csv", {entry.name for entry in entries}
    kept = [row for row in read_report(path) if row.entry not in names]
    folder, datasets = data_directory(data), {entry.dataset.tag: entry.dataset for entry in entries}
    splits = {
        tag: (load_split(folder, dataset, "train", bar), load_split(folder, dataset, "test", bar))
        for tag, dataset in datasets.items()
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(error.errno, f"cannot make the folder {out}: {error.strerror}") from error
    rows: list[Row] = []
    for entry in entries:
        write_whole(path, report([*kept, *rows]))
        rows += export_formats(entry, out / entry.name, *splits[entry.dataset.tag], rounds)
    write_whole(path, report([*kept, *rows]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m export.zoo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of names, for instance '*.cifar10'")
    parser.add_argument("--data", type=Path, help="as for tamzoo (default: $TAMZOO_DATA)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the comparison of latencies")
    options = parser.parse_args()
    with one_sentence():
        rows = export_zoo(chosen_entries(options.only), options.out, options.data, options.rounds)
    names = [column.name for column in fields(Row) if column.name not in ("file", "error")]
    title = "Accuracy and agreement in percent over the whole test split; latency of plain float32, batch 1"
    table(title, names, ([_rounded(row)[name] for name in names] for row in rows))
    failed = [row for row in rows if row.error]
    for row in failed:
        print(f"{row.entry}, {row.format}: {row.error}", file=sys.stderr)
    print(options.out / "report.csv")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
