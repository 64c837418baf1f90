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


def _chosen(names: list[str] | None, every: bool) -> list[Any]:
    from tamzoo.catalogue import ENTRIES
    from tamzoo.registry import find_model

    if bool(names) == every:
        raise ValueError("expected either names of entries or --all. All names: tamzoo list")
    found = [find_model(name) for name in names or []]
    strangers = [name for name in found if name not in ENTRIES]
    if strangers:
        raise ValueError(f"{strangers[0]} is no entry of the catalogue. All names: tamzoo list")
    return list(ENTRIES.values()) if every else [ENTRIES[name] for name in found]


@app.command()
def publish(
    names: Annotated[list[str] | None, typer.Argument(help="Trained entries.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every trained entry.")] = False,
    owner: Annotated[
        str | None, typer.Option(help="On the Hub (default: $TAMZOO_HUB_OWNER or tamzoo).")
    ] = None,
    private: Annotated[bool, typer.Option(help="New repositories are private.")] = False,
    create_pr: Annotated[bool, typer.Option(help="Open pull requests instead of pushing.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Write nothing, say what would be uploaded.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Test images for a check by sample (default: $TAMZOO_DATA).")
    ] = None,
) -> None:
    """Publish entries to the Hugging Face Hub; a second run uploads only what has changed."""
    import os
    from importlib import import_module

    from huggingface_hub import HfApi

    from tamzoo import hub
    from tamzoo.catalogue import HUB_OWNER
    from tamzoo.data import data_directory
    from tamzoo.publish import collect, release, sampler

    entries = [entry for entry in _chosen(names, every) if entry.trained or not every]
    if hub.CARDS is None:
        raise ValueError("publishing needs a clone: here is no folder model_cards")
    owner, api = owner or HUB_OWNER, HfApi()
    folder = data_directory(data) if data or os.environ.get("TAMZOO_DATA") else None
    if folder is None:
        print("no --data and no TAMZOO_DATA: the staged weights are not evaluated on a sample")
    export = import_module("tamzoo.onnx_export").export_onnx
    check = sampler(folder, hub.CARDS, _bar) if folder else None
    options = {"owner": owner, "private": private, "create_pr": create_pr, "dry_run": dry_run}
    done = []
    for published in release(entries, api, hub.CARDS, export=export, check=check, **options):
        done.append(published.repo_id)
        print(published, flush=True)
    if done and not (dry_run or create_pr):
        print(f"collection: {collect(done, api, owner, private=private)}")


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Entries.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every entry.")] = False,
    owner: Annotated[
        str | None, typer.Option(help="On the Hub (default: $TAMZOO_HUB_OWNER or tamzoo).")
    ] = None,
    remote: Annotated[bool, typer.Option(help="Also the Hub's copy of trained entries.")] = True,
) -> None:
    """Check entries here and on the Hub: files, hashes, cards, configurations, golden logits."""
    from huggingface_hub import HfApi

    from tamzoo import hub
    from tamzoo.catalogue import HUB_OWNER
    from tamzoo.verify import verify_folder, verify_remote

    api, owner, bad = HfApi(), owner or HUB_OWNER, 0
    for entry in _chosen(names, every):
        found = {}
        if hub.CARDS is not None and (hub.CARDS / entry.name).is_dir():
            found["here"] = verify_folder(entry, hub.CARDS / entry.name)
        if remote and entry.trained:
            found[f"{owner}/{entry.name}"] = verify_remote(entry, api, owner)
        for place, problems in found.items():
            print(f"{entry.name}: {place}: {'; '.join(problems) or 'right'}", flush=True)
        bad += any(found.values())
    if bad:
        raise typer.Exit(1)


def main() -> None:
    app()
