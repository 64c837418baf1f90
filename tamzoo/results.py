"""The catalogue's rows beside the records of our runs: results.csv, the README's table."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tamzoo.attention import GATE_TOLERANCE
from tamzoo.card_texts import table
from tamzoo.catalogue import ENTRIES, OWNER, Entry
from tamzoo.checkpoint import write_whole
from tamzoo.hub import CARDS
from tamzoo.records import Record, read_record

FIELDS: tuple[str, ...] = (
    "entry",
    "table",
    "paper_top1_error",
    "paper_top5_error",
    "top1_error",
    "top5_error",
    "n",
    "epochs",
    "pretraining",
    "training_minutes",
    "hardware",
    "recipe",
    "seed",
    "selection",
    "paper_params_m",
    "params_m",
    "paper_flops_g",
    "static_gates",
    "proven_gates",
    "gates",
    "data_note",
    "weights_sha256",
    "hub_id",
)
README_MARKS = ("<!-- results: written by `tamzoo results` -->", "<!-- /results -->")


def record_of(entry: Entry) -> Record | None:
    """The record in the entry's folder, None where there is none."""
    path = CARDS / entry.name / "record.json" if CARDS else None
    return read_record(path) if path and path.is_file() else None


def result_row(entry: Entry) -> dict[str, object]:
    """One line of results.csv; what is not known is None."""
    paper, record = entry.paper, record_of(entry)
    row: dict[str, Any] = dict.fromkeys(FIELDS)
    row |= {"entry": entry.name, "params_m": f"{entry.params / 1e6:.3f}", "hub_id": f"{OWNER}/{entry.name}"}
    if paper:
        row |= {
            "table": paper.table,
            "paper_top1_error": paper.top1_error,
            "paper_top5_error": paper.top5_error,
            "paper_params_m": paper.params_m,
            "paper_flops_g": paper.flops_g,
        }
    if record:
        *before, (_, epochs) = record.spans
        row |= {
            "top1_error": f"{record.score.top1_error:.2f}",
            "top5_error": f"{record.score.top5_error:.2f}",
            "n": record.score.n,
            "epochs": epochs,
            "pretraining": ", then ".join(f"{epochs} epochs of {entry}" for entry, epochs in before),
            "training_minutes": round(sum(run.seconds for run in record.runs) / 60),
            "hardware": " + ".join(dict.fromkeys(run.hardware for run in record.runs)),
            "recipe": " + ".join(run.recipe["name"] for run in record.runs),
            "seed": record.seed,
            "selection": record.selection,
            "static_gates": sum(gate.width <= GATE_TOLERANCE for gate in record.gates),
            "proven_gates": sum(gate.proven_width <= GATE_TOLERANCE for gate in record.gates),
            "gates": len(record.gates),
            "data_note": "; ".join(dict.fromkeys(note for note in _notes(record) if note)),
            "weights_sha256": record.sha256 if entry.trained else None,
        }
    return row


def _notes(record: Record) -> list[str]:
    """What is special about the data of each of its runs, and of its score."""
    notes = [
        f"{run.data}: {run.data_note}" if run.data_note and run.entry != record.entry else run.data_note
        for run in record.runs
    ]
    return [*notes, record.score.data_note]


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> str:
    """The whole of a CSV file with these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def results_csv() -> str:
    """The whole of results.csv."""
    return csv_text(FIELDS, map(result_row, ENTRIES.values()))


def results_markdown() -> str:
    """The README's table: the entries that were trained, the paper's cell beside ours."""
    heads = "entry", "paper: top-1 error, best epoch of 300", "ours, last epoch", "our training"
    rows: list[tuple[str, ...]] = [(*heads, "static gates", "proven for any picture")]
    for entry in ENTRIES.values():
        row = result_row(entry)
        if row["top1_error"] is not None:
            after = f" after {row['pretraining']}" if row["pretraining"] else ""
            rows.append(
                (
                    f"`{entry.name}`",
                    f"{row['paper_top1_error']:.2f} %" if entry.paper else "not in the paper",
                    f"{row['top1_error']} %{'' if entry.trained else ' (weights not kept)'}",
                    f"{row['epochs']} epochs{after}, {row['training_minutes']} min, {row['hardware']}",
                    f"{row['static_gates']} of {row['gates']}" if row["gates"] else "no gates",
                    f"{row['proven_gates']} of {row['gates']}" if row["gates"] else "",
                )
            )
    return table(rows)


def with_results(readme: str) -> str:
    """A README with the table between the marks made new.

    Raises:
        ValueError: the marks are not there.
    """
    start, end = README_MARKS
    if start not in readme or end not in readme:
        raise ValueError(f"the README lacks the marks {start} and {end}, between which the table stands")
    before, rest = readme.split(start, 1)
    return f"{before}{start}\n{results_markdown()}\n{end}{rest.split(end, 1)[1]}"


def write_results(root: Path) -> list[Path]:
    """Rewrites results.csv and the README's table in a clone; returns what was written.

    Raises:
        ValueError: not a clone; nothing is written.
    """
    readme = root / "README.md"
    if not readme.is_file():
        raise ValueError(f"{root}: expected a clone of tamzoo, found no README.md; change into one")
    pages = {readme: with_results(readme.read_text(encoding="utf-8")), root / "results.csv": results_csv()}
    for path, text in pages.items():
        write_whole(path, text)
    return list(pages)
