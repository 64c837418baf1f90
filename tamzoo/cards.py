"""Catalogue rows and records as the texts of a Hub repository: card, configuration, evaluation results."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from tamzoo.attention import GATE_TOLERANCE
from tamzoo.card_texts import (
    ATTENTION_TEXTS,
    CITATION,
    DATA_LICENCES,
    FIGURES,
    PAPER_URL,
    TRAINED,
    UNCLAIMED,
    UNTRAINED,
    table,
)
from tamzoo.card_training import training
from tamzoo.catalogue import ENTRIES, OWNER, Entry
from tamzoo.datasets import Dataset
from tamzoo.findings import Analysis
from tamzoo.paper import PAPER_TITLE
from tamzoo.records import GateStats, Record


def render_card(
    entry: Entry,
    record: Record | None = None,
    owner: str = OWNER,
    analysis: Analysis | None = None,
    run: Record | None = None,
) -> str:
    """The README.md of an entry's Hub repository.

    Args:
        record: Of the weights; None renders the card of an entry without.
        analysis: Of the weights, where it was made: its pictures lie beside the card.
        run: Of an entry without weights: the record of one whose weights were not kept, if any.
    Raises:
        ValueError: the record, the analysis or the run is of another entry.
    """
    for what, found in (("record", record), ("analysis", analysis), ("run", run)):
        if found is not None and found.entry != entry.name:
            raise ValueError(f"{entry.name}: the {what} is of {found.entry}")
    datasets = trained_on(record) if record else [entry.dataset]
    texts: dict[str, Any] = {
        "front": "\n".join(_front_matter(entry, record)),
        "name": entry.name,
        "what": f"{entry.backbone.title} {ATTENTION_TEXTS[entry.attention]}.",
        "dataset": entry.dataset.title,
        "source": f"{owner}/tamzoo",  # on GitHub
        "paper": PAPER_TITLE,
        "paper_url": PAPER_URL,
        "licence": " ".join(DATA_LICENCES[dataset.tag] for dataset in datasets),
        "citation": CITATION,
    }
    if record is None:
        how = f"\n## How it was trained\n\n{training(run)}\n" if run else ""
        claim = _score(run) if run else UNCLAIMED
        return UNTRAINED.substitute(texts, claim=claim, cell=_paper_text(entry) + how)
    _, h, w = entry.dataset.input_size
    elsewhere = f'import os\n\nos.environ["TAMZOO_HUB_OWNER"] = "{owner}"  # before tamzoo is imported\n\n'
    theirs = "; the paper's errors are of its best test epoch" if entry.paper else ""
    if entry.paper and entry.attention == "tam" and (entry.paper.params_m or 0) - entry.params / 1e6 > 0.05:
        theirs += ", its parameters more than its Eq. 2 has"
    note = f" ({record.score.data_note})" if record.score.data_note else ""
    return TRAINED.substitute(
        texts,
        results=_results(entry, record),
        selection=record.selection,
        n=f"{record.score.n:,}",
        note=note,
        theirs=theirs,
        calibration=f"{record.score.calibration_error:.2f}",
        loss=f"{record.score.loss:.4f}",
        training=training(record),
        last=" of the last run" * bool(record.start),
        hub_id=f"{owner}/{entry.name}",
        whose=elsewhere * (owner != OWNER),
        trained_on=", then ".join(dataset.title for dataset in datasets),
        model=entry.model,
        tag=entry.dataset.tag,
        h=h,
        w=w,
        classes=entry.dataset.num_classes,
        gates=_gates(record.gates) + _analysis(analysis),
    )


def trained_on(record: Record) -> list[Dataset]:
    """The data sets whose images have part in a record's weights, in the order of its runs."""
    return list(dict.fromkeys(ENTRIES[run.entry].dataset for run in record.runs))


def _front_matter(entry: Entry, record: Record | None) -> Iterable[str]:
    yield "license: apache-2.0"
    yield "library_name: timm"
    yield "pipeline_tag: image-classification"
    yield "tags:"
    attention = [] if entry.attention == "plain" else [entry.attention, "attention"]
    for tag in ["image-classification", "timm", "tamzoo", entry.backbone.name, *attention]:
        yield f"- {tag}"
    if record is None:
        yield "- untrained"
        return
    yield "datasets:"
    for dataset in trained_on(record):
        yield f"- {dataset.hub_id}"
    yield "metrics:\n- accuracy"
    yield f"model-index:\n- name: {entry.name}\n  results:"
    yield "  - task:\n      type: image-classification\n      name: Image Classification"
    yield f"    dataset:\n      type: {entry.dataset.hub_id}\n      name: {entry.dataset.title}"
    yield "      split: test\n    metrics:"
    for title, error in (("Top-1", record.score.top1_error), ("Top-5", record.score.top5_error)):
        kind = "accuracy" if title == "Top-1" else "top_5_accuracy"
        yield f"    - type: {kind}\n      value: {100 - error:.2f}\n      name: {title} accuracy (percent)"


def _paper_text(entry: Entry) -> str:
    if entry.paper is None:
        return "\nThe paper has no such row; it is ours.\n"
    cell = entry.paper
    top5 = "" if cell.top5_error is None else f", {_percent(cell.top5_error)} (top-5)"
    return (
        f"\nFor this row the paper's Table {cell.table} reports an error of {_percent(cell.top1_error)} "
        f"(top-1){top5}, of the best test epoch. That is the paper's number, not ours.\n"
    )


def _score(run: Record) -> str:
    return (
        f"**No weights.** It was trained to compare others with, and its weights were not kept: "
        f"{_percent(run.score.top1_error)} top-1 and {_percent(run.score.top5_error)} top-5 error on "
        f"{run.score.n:,} test images, {run.selection}."
    )


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _results(entry: Entry, record: Record) -> str:
    top1, top5 = record.score.top1_error, record.score.top5_error
    rows = [
        ("", "top-1 error", "top-5 error", "parameters"),
        (f"**ours**, {record.selection}", _percent(top1), _percent(top5), f"{entry.params / 1e6:.2f} M"),
    ]
    if entry.paper is not None:
        cell = entry.paper
        rows.append(
            (
                f"paper, Table {cell.table}",
                _percent(cell.top1_error),
                "" if cell.top5_error is None else _percent(cell.top5_error),
                "" if cell.params_m is None else f"{cell.params_m:.2f} M",
            )
        )
    return table(rows)


def _gates(gates: Sequence[GateStats]) -> str:
    if not gates:
        return ""
    rows = [("gate", "mean", "std", "min", "max", "bounds", "any picture")]
    rows += [
        (
            f"`{gate.name}`",
            f"{gate.mean:.6f}",
            f"{gate.std:.1e}",
            f"{gate.min:.6f}",
            f"{gate.max:.6f}",
            f"{gate.bound_min:.6f} to {gate.bound_max:.6f}",
            gate.on_any_picture(GATE_TOLERANCE),
        )
        for gate in gates
    ]
    return (
        f"\n## Gates\n\nOver all positions of {gates[0].n:,} images; `se` is timm's name for a block's "
        "attention. A gate with a standard deviation near 0 is a number, and folds into the weights before "
        "it. Bounds hold for any input whose channels stay in the ranges seen. Proven: no picture of this "
        f"size, seen or not, moves the gate by more than {GATE_TOLERANCE:g}.\n\n"
        f"{table(rows)}\n\n![Mean and range of every gate](gates.png)\n"
    )


def _analysis(analysis: Analysis | None) -> str:
    if analysis is None:
        return ""
    shown = [name for name in analysis.figures if name != "gates"]  # which stands with its table
    pictures = "\n\n".join(f"![{FIGURES[name]}]({name}.png)\n\n{FIGURES[name]}." for name in shown)
    absent = f" Not compared with {', '.join(analysis.absent)}: these had no weights then." * bool(
        analysis.absent
    )
    return (
        "\n## What the gates do\n\nThe figures of the paper's section 4, measured on these weights and "
        f"{analysis.n:,} test images; the numbers are in `analysis.json`.{absent}\n\n{pictures}\n"
    )


def config_json(entry: Entry, gates: Sequence[GateStats] = (), golden: Sequence[float] | None = None) -> str:
    """timm's config.json, from which `hf-hub:` and `local-dir:` build the model.

    Args:
        golden: Logits on the fixed image that `evaluate.golden_logits` feeds, where there are weights.
    """
    backbone, dataset = entry.backbone, entry.dataset
    config: dict[str, Any] = {
        "architecture": entry.model,
        "num_classes": dataset.num_classes,
        "num_features": backbone.num_features,
        "label_names": dataset.class_names,
        "model_args": {"stem": dataset.stem},
        "pretrained_cfg": {
            "tag": dataset.tag,
            "custom_load": False,
            "input_size": dataset.input_size,
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": dataset.crop_pct,
            "crop_mode": "center",
            "mean": dataset.mean,
            "std": dataset.std,
            "num_classes": dataset.num_classes,
            "first_conv": "conv1",
            "classifier": "fc",
            "license": "apache-2.0",
            "paper_name": PAPER_TITLE,
        },
        "gates": [asdict(gate) for gate in gates],
    }
    if golden is not None:
        config["golden_logits"] = list(golden)
    return json.dumps(config, indent=2) + "\n"


def eval_results(entry: Entry, record: Record) -> str:
    """The `.eval_results/TAG.yaml` of a trained entry: the Hub's form of evaluation results."""
    return (
        f"- dataset:\n    id: {entry.dataset.hub_id}\n    task_id: image-classification\n"
        f"  value: {100 - record.score.top1_error:.2f}\n"
        f"  notes: top-1 accuracy in percent on {record.score.n} test images, {record.selection}\n"
    )


def pictures(record: Record | None, analysis: Analysis | None) -> list[str]:
    """The files of the pictures that an entry's card shows."""
    names = analysis.figures if analysis else ["gates"] if record and record.gates else []
    return [f"{name}.png" for name in names]


def card_files(
    entry: Entry,
    record: Record | None = None,
    golden: Sequence[float] | None = None,
    owner: str = OWNER,
    analysis: Analysis | None = None,
    run: Record | None = None,
) -> dict[str, str]:
    """Every rendered file of an entry's Hub repository, path to text; arguments as of `render_card`."""
    files = {
        "README.md": render_card(entry, record, owner, analysis, run),
        "config.json": config_json(entry, record.gates if record else (), golden),
    }
    if record is not None:
        files[f".eval_results/{entry.dataset.tag}.yaml"] = eval_results(entry, record)
    return files
