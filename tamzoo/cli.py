"""The commands; the only room that prints."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _bar(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A bar on a terminal; nothing where the output is a file."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description, console=console, transient=True) if console.is_terminal else items


@app.callback()
def _root() -> None:
    """Tree-structured attention models: list, predict, measure gates, fold, export, train."""


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="Entry, for instance resnet18_tam.cifar10.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run that is there is resumed.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with parquet shards (default: $TAMZOO_DATA).")
    ] = None,
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


def main() -> None:
    app()
