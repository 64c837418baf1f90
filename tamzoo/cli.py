"""The commands that use models; with `terminal` and the other cli rooms, the only ones that print."""

from __future__ import annotations

import fnmatch
import json
import signal
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from tamzoo import __version__, cli_analyze, cli_demo, cli_export, cli_gates, cli_hub, cli_predict, cli_train
from tamzoo.allocator import keep_freed_memory
from tamzoo.terminal import Data, Device, Name, Weights, bar, device_called, load_model, one_sentence, table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (
    cli_demo.demo,
    cli_predict.predict,
    cli_analyze.analyze,
    cli_gates.gates,
    cli_gates.freeze_gates,
    cli_export.export,
    cli_train.train,
    cli_train.plot,
    cli_hub.publish,
    cli_hub.verify,
):
    app.command()(command)
app.add_typer(cli_train.sweep, name="sweep")


def _version(asked: bool) -> None:
    if asked:
        print(f"tamzoo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tree-structured attention models: list, predict, measure gates, fold, export, train."""


@app.command("list")
def list_entries(
    pattern: Annotated[str, typer.Argument(help="Wildcards, for instance 'resnet50*' or '*.cifar10'.")] = "*",
    every: Annotated[
        bool, typer.Option("--all", help="Every registered model and tag, not only the catalogue's.")
    ] = False,
) -> None:
    """List the catalogue, the paper's tables and some rows of ours, beside what was trained."""
    from tamzoo.catalogue import ENTRIES
    from tamzoo.datasets import DATASETS
    from tamzoo.hub import entry_folder
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
                record and record.spans[-1][1],
                "here" if entry_folder(entry.name) else "in a clone" if entry.trained else "no",
            )
        )
    table(
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
def evaluate(name: Name, data: Data = None, weights: Weights = None, device: Device = "cpu") -> None:
    """Errors on all images of the test split."""
    from dataclasses import asdict

    from tamzoo.data import data_directory, load_split
    from tamzoo.evaluate import evaluate as score

    folder, place = data_directory(data), device_called(device)
    model, full, dataset = load_model(name, weights)
    split = load_split(folder, dataset, "test", bar).to(place)
    found = score(model.to(place), split, dataset, progress=bar)
    print(json.dumps({"entry": full} | asdict(found), indent=2))


@app.command()
def results() -> None:
    """Rewrite model_cards, results.csv and the README's table from rows and records (in a clone)."""
    from tamzoo.hub import CARDS
    from tamzoo.plots import plot_gates
    from tamzoo.plots_analysis import plot_analysis
    from tamzoo.results import write_results
    from tamzoo.verify import write_cards

    here = Path("model_cards")
    if here.is_dir() and (CARDS is None or CARDS.resolve() != here.resolve()):
        raise ValueError(
            f"the installed tamzoo reads its records from {CARDS}, not from {here.resolve()}; install this "
            "clone (pip install -e .) and run the command again"
        )
    pages = write_results(Path.cwd())  # first: it sees that this is a clone
    cards = write_cards(here, draw=plot_gates, draw_analysis=plot_analysis)
    for path in (*cards, *pages):
        print(path)


def main() -> None:
    """Runs the command line; a ValueError, RuntimeError or OSError is one sentence and exit code 2."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's, of what is answered
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves nothing half-written
    with one_sentence():
        app()
