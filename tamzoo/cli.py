"""The commands; the only room that prints."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tamzoo.catalogue import Dataset
    from tamzoo.records import GateStats

# Heavy libraries are imported inside the commands: `tamzoo --help` answers at once.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Name = Annotated[str, typer.Argument(help="Model or entry, for instance wrn10_4_tam or wrn10_4_tam.cifar10.")]
Weights = Annotated[Path | None, typer.Option(help="A safetensors file in place of the entry's weights.")]
Data = Annotated[Path | None, typer.Option(help="Folder with parquet shards (default: $TAMZOO_DATA).")]
DEMO_ENTRY = "wrn10_4_tam.cifar10"


def _bar(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A bar on a terminal; nothing where the output is a file."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description, console=console, transient=True) if console.is_terminal else items


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _load(name: str, weights: Path | None = None) -> tuple[nn.Module, str, Dataset]:
    """A model in eval mode with weights, its full name, and its data set's row."""
    import timm

    from tamzoo.catalogue import DATASETS
    from tamzoo.checkpoint import check_weights_file, load_weights
    from tamzoo.registry import find_model

    name = find_model(name)
    if weights is not None:
        check_weights_file(weights)
    model = timm.create_model(name, pretrained=weights is None).eval()
    cfg: dict[str, Any] = model.pretrained_cfg  # pyright: ignore
    full = f"{cfg['architecture']}.{cfg['tag']}"
    if weights is not None:
        load_weights(model, weights, full)
    return model, full, DATASETS[cfg["tag"]]


def _pixels(data: Path | None, dataset: Dataset, n: int) -> tuple[Tensor, str]:
    """uint8 (n, 3, h, w) images: of the test split where there is data, else of the shipped pictures."""
    import os

    from tamzoo.data import data_directory, load_split
    from tamzoo.images import random_crops

    if data is not None or os.environ.get("TAMZOO_DATA"):
        pixels = load_split(data_directory(data), dataset, "test", _bar).pixels[:n]
        return pixels, f"{len(pixels)} {dataset.title} test images"
    return random_crops(n, dataset.input_size[-1]), f"{n} crops of the shipped pictures and noise"


@app.callback()
def _root() -> None:
    """Tree-structured attention models: list, predict, measure gates, fold, export, train."""


@app.command("list")
def list_entries(
    pattern: Annotated[str, typer.Argument(help="Wildcards, for instance 'resnet50*' or '*.cifar10'.")] = "*",
    every: Annotated[
        bool, typer.Option("--all", help="Every registered model and tag, not only the tables'.")
    ] = False,
) -> None:
    """List the catalogue: the paper's tables, row by row, beside what was trained."""
    from tamzoo.catalogue import DATASETS, ENTRIES
    from tamzoo.registry import MODELS
    from tamzoo.results import record_of

    def matches(name: str) -> bool:
        return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.split(".")[0], pattern)

    names = [f"{model}.{tag}" for model in MODELS for tag in DATASETS] if every else list(ENTRIES)
    names = [name for name in names if matches(name)]
    if not names:
        raise ValueError(f"nothing matches {pattern!r}; for every name: tamzoo list --all")
    if every:
        print("\n".join(names))
        return
    rows = []
    for entry in map(ENTRIES.__getitem__, names):
        record, paper = record_of(entry), entry.paper
        ours = f"{record.score.top1_error:.2f}" if record else None
        rows.append(
            (
                entry.name,
                paper and paper.table,
                paper and paper.top1_error,
                paper and paper.top5_error,
                ours,
                record and record.epochs,
                "yes" if entry.trained else "no",
            )
        )
    _table(
        "Errors in percent; the paper's at its best of 300 epochs, ours at the last epoch",
        ("entry", "table", "paper top-1", "paper top-5", "our top-1", "our epochs", "weights"),
        rows,
    )


@app.command()
def info(name: Name) -> None:
    """Tell what is known of one model: architecture, the paper's cell, our record."""
    from dataclasses import asdict

    import timm

    from tamzoo.catalogue import ENTRIES
    from tamzoo.registry import find_model
    from tamzoo.results import record_of

    model = timm.create_model(find_model(name))
    cfg: dict[str, Any] = model.pretrained_cfg  # pyright: ignore
    full = f"{cfg['architecture']}.{cfg['tag']}"
    told: dict[str, Any] = {
        "name": full,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input_size": cfg["input_size"],
        "classes": cfg["num_classes"],
        "mean": cfg["mean"],
        "std": cfg["std"],
    }
    entry = ENTRIES.get(full)
    if entry:
        told |= {"paper": asdict(entry.paper) if entry.paper else None, "hub_id": entry.hub_id}
        record = record_of(entry)
        told |= {"weights": asdict(entry.trained) if entry.trained else None}
        told |= {"record": asdict(record) if record else None}
    print(json.dumps(told, indent=2))


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Model or entry.")] = DEMO_ENTRY,
    onnx: Annotated[Path | None, typer.Option(help="An exported file in place of the model.")] = None,
    weights: Weights = None,
    top: Annotated[int, typer.Option(min=1, help="Classes a picture.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """Classify pictures."""
    from tamzoo.images import picture_paths
    from tamzoo.onnx_export import metadata_of, open_session
    from tamzoo.predict import onnx_classifier, torch_classifier
    from tamzoo.predict import predict as classify

    paths = picture_paths(images)
    if onnx is not None:
        session = open_session(onnx)
        classifier = onnx_classifier(session, metadata_of(session))
    else:
        classifier = torch_classifier(_load(model, weights)[0])
    answers = classify(classifier, paths, top, _bar)
    if as_json:
        found = [
            {"image": str(path), "top": [{"label": label, "probability": p} for label, p in answer]}
            for path, answer in zip(paths, answers, strict=True)
        ]
        print(json.dumps(found, indent=2))
        return
    for path, answer in zip(paths, answers, strict=True):
        print(f"{path}: " + ", ".join(f"{label} {100 * p:.1f} %" for label, p in answer))


def _print_gates(gates: Iterable[GateStats], tolerance: float, images: str) -> None:
    columns = ("gate", "block", "stage", "mean", "std", "min", "max", "bound", "static")
    rows = [
        (
            gate.name,
            gate.block,
            gate.stage,
            f"{gate.mean:.6f}",
            f"{gate.std:.1e}",
            f"{gate.min:.6f}",
            f"{gate.max:.6f}",
            f"{gate.bound_min:.4f} to {gate.bound_max:.4f}",
            "yes" if gate.width <= tolerance else "no",
        )
        for gate in gates
    ]
    _table(f"Gates over {images}; static: maximum - minimum at most {tolerance:g}", columns, rows)


@app.command()
def gates(
    name: Name,
    data: Data = None,
    weights: Weights = None,
    images: Annotated[int, typer.Option(min=2, help="How many.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """Measure every gate of a TAM model: does it depend on its input?"""
    from dataclasses import asdict

    from tamzoo.attention import GATE_TOLERANCE
    from tamzoo.data import normalise
    from tamzoo.gates import gates_of, measure_gates

    model, full, dataset = _load(name, weights)
    if not gates_of(model):
        raise ValueError(f"{full} has no TAM gates; expected a model named *_tam")
    pixels, told = _pixels(data, dataset, images)
    found = measure_gates(
        model, (normalise(batch, dataset) for batch in _bar(pixels.split(128), "Measuring gates"))
    )
    if as_json:
        print(json.dumps([asdict(gate) for gate in found], indent=2))
    else:
        _print_gates(found, GATE_TOLERANCE, told)


@app.command()
def evaluate(name: Name, data: Data = None, weights: Weights = None) -> None:
    """Errors on all images of the test split."""
    from dataclasses import asdict

    from tamzoo.data import data_directory, load_split
    from tamzoo.evaluate import evaluate as score

    folder = data_directory(data)
    model, full, dataset = _load(name, weights)
    split = load_split(folder, dataset, "test", _bar)
    print(json.dumps({"entry": full} | asdict(score(model, split, dataset, progress=_bar)), indent=2))


@app.command()
def export(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    keep_gates: Annotated[bool, typer.Option(help="Export without folding.")] = False,
    uint8: Annotated[
        bool, typer.Option(help="Take raw (n, h, w, 3) bytes and normalise in the graph.")
    ] = False,
    data: Data = None,
    weights: Weights = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest width of a gate that is folded.")] = None,
) -> None:
    """Fold a model and write one ONNX file that was checked against it."""
    model, full, dataset = _load(name, weights)
    print(_export(model, full, dataset, output, keep_gates, uint8, data, tolerance, weights))
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def _export(
    model: nn.Module,
    full: str,
    dataset: Dataset,
    output: Path,
    keep_gates: bool = False,
    uint8: bool = False,
    data: Path | None = None,
    tolerance: float | None = None,
    weights: Path | None = None,
) -> str:
    """Folds, exports and checks; returns what to tell."""
    from tamzoo import __version__
    from tamzoo.attention import GATE_TOLERANCE
    from tamzoo.catalogue import ENTRIES
    from tamzoo.checkpoint import sha256_of
    from tamzoo.fold import reparameterize_model
    from tamzoo.onnx_export import PARITY_IMAGES, export_onnx

    deployed, told, gates = model, "exported with its gates", {}
    if not keep_gates:
        deployed = reparameterize_model(model, tolerance=GATE_TOLERANCE if tolerance is None else tolerance)
        told, gates = str(deployed.fold_report), deployed.fold_report.folded  # pyright: ignore
    entry = ENTRIES.get(full)
    stored = entry.trained.sha256 if entry and entry.trained else ""
    metadata = {
        "entry": full,
        "version": __version__,
        "weights_sha256": sha256_of(weights) if weights else stored,
        "gates": gates,
        "fold_report": told,
    }
    pixels, _ = _pixels(data, dataset, PARITY_IMAGES)
    parity = export_onnx(
        deployed,
        output,
        reference=model,
        dataset=dataset,
        pixels=pixels,
        metadata=metadata,
        uint8=uint8,
        progress=_bar,
    )
    return f"{told}\n{parity}"


@app.command()
def demo() -> None:
    """The main job, on a shipped checkpoint: classify, measure the gates, fold, export, compare, time."""
    import tempfile
    import time

    from tamzoo.attention import GATE_TOLERANCE
    from tamzoo.data import normalise
    from tamzoo.gates import measure_gates
    from tamzoo.images import PICTURES, picture_paths, random_crops
    from tamzoo.onnx_export import open_session
    from tamzoo.predict import onnx_classifier, torch_classifier
    from tamzoo.predict import predict as classify

    began = time.monotonic()
    model, full, dataset = _load(DEMO_ENTRY)
    print(f"1. {full}, a {dataset.title} model, on pictures that it has never seen:")
    paths = picture_paths([PICTURES])
    answers = classify(torch_classifier(model), paths, 3)
    for path, answer in zip(paths, answers, strict=True):
        print(f"   {path.name:14s} " + ", ".join(f"{label} {100 * p:.0f} %" for label, p in answer))
    print("   Of these, only a cat and a horse are among its ten classes.")

    pixels = random_crops(256, dataset.input_size[-1])
    print("\n2. Do the attention gates depend on the picture?")
    _print_gates(measure_gates(model, normalise(pixels, dataset)), GATE_TOLERANCE, "256 crops and noise")

    with tempfile.TemporaryDirectory() as folder:
        print("3. Fold, export to ONNX, and compare with the unfolded torch model:")
        files = {"TAM folded": Path(folder) / "folded.onnx", "TAM": Path(folder) / "tam.onnx"}
        print(_export(model, full, dataset, files["TAM folded"]))
        _export(model, full, dataset, files["TAM"], keep_gates=True)
        session = open_session(files["TAM folded"])
        from tamzoo.onnx_export import metadata_of

        again = classify(onnx_classifier(session, metadata_of(session)), paths, 1)
        same = sum(a[0][0] == b[0][0] for a, b in zip(answers, again, strict=True))
        print(f"   The ONNX file names the same class on {same} of {len(paths)} pictures.")

        print("\n4. Latency in onnxruntime, batch 1, programs taking turns:")
        _time_demo(files, dataset, Path(folder) / "plain.onnx")
    print(f"\n{time.monotonic() - began:.0f} s in all.")


def _time_demo(files: dict[str, Path], dataset: Dataset, plain: Path) -> None:
    import timm

    from tamzoo.data import normalise
    from tamzoo.images import random_crops
    from tamzoo.latency import time_in_turns
    from tamzoo.onnx_export import PARITY_IMAGES, export_onnx, open_session

    model = timm.create_model(
        DEMO_ENTRY.replace("_tam", "_plain")
    ).eval()  # untrained: weights do not change time
    pixels = random_crops(PARITY_IMAGES, dataset.input_size[-1])
    export_onnx(model, plain, reference=model, dataset=dataset, pixels=pixels, metadata={"entry": "plain"})
    image = {"pixel_values": normalise(pixels[:1], dataset).numpy()}
    sessions = {name: open_session(path, threads=2) for name, path in ({"plain": plain} | files).items()}
    programs = {name: (lambda s=session: s.run(None, image)) for name, session in sessions.items()}
    for timing in time_in_turns(programs, rounds=200, progress=_bar):
        print(
            f"   {timing.name:10s} {timing.median_ms:6.2f} ms, {timing.ratio:.2f} of plain "
            f"(quartiles {timing.ratio_low:.2f} to {timing.ratio_high:.2f})"
        )


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="Entry, for instance resnet18_tam.cifar10.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run that is there is resumed.")],
    data: Data = None,
    recipe: Annotated[str, typer.Option(help="Recipe row.")] = "short",
    epochs: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    seed: int = 0,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16 (default: by device).")] = None,
    time_budget: Annotated[float, typer.Option(help="Seconds; a later call goes on.")] = float("inf"),
) -> None:
    """Train an entry, resuming what is in the folder."""
    import torch

    from tamzoo.catalogue import ENTRIES
    from tamzoo.data import data_directory, load_split
    from tamzoo.recipes import RECIPES
    from tamzoo.train import Run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entry, row, folder = ENTRIES[name], RECIPES[recipe], data_directory(data)
    if epochs is not None:
        row = replace(row, epochs=epochs)
    splits = [load_split(folder, entry.dataset, split, _bar).to(device) for split in ("train", "test")]
    precision = precision or ("bfloat16" if device.type == "cuda" else "float32")
    run = Run(entry, row, *splits, out=out, seed=seed, precision=precision)
    print(f"{entry.name}: {row.epochs} epochs of recipe {row.name}, {precision} on {device}")
    done = run.train(time_budget, _bar, lambda epoch: print(epoch, flush=True))
    if not done:
        print(f"stopped after epoch {run.epoch} of {row.epochs}; the same command goes on")
        return
    score = run.finish(_bar).score
    print(f"{entry.name}: top-1 error {score.top1_error:.2f} % on {score.n} images; weights in {out}")


@app.command()
def results() -> None:
    """Rewrite results.csv and the README's table from rows and records (in a clone)."""
    from tamzoo.results import write_results

    for path in write_results(Path.cwd()):
        print(path)


def main() -> None:
    """Runs the command line; a ValueError, RuntimeError or OSError is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
