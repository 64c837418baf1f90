"""The commands that speak to the Hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tamzoo.terminal import Data, bar

Owner = Annotated[str | None, typer.Option(help="On the Hub (default: $TAMZOO_HUB_OWNER or tamzoo).")]


def _chosen(names: list[str] | None, every: bool) -> list[Any]:
    from tamzoo.catalogue import ENTRIES
    from tamzoo.registry import find_entry

    if bool(names) == every:
        raise ValueError("expected either names of entries or --all. All names: tamzoo list")
    return list(ENTRIES.values()) if every else [find_entry(name) for name in names or []]


def publish(
    names: Annotated[list[str] | None, typer.Argument(help="Trained entries.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every trained entry.")] = False,
    owner: Owner = None,
    private: Annotated[bool, typer.Option(help="New repositories are private.")] = False,
    create_pr: Annotated[bool, typer.Option(help="Open pull requests instead of pushing.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Write nothing, say what would be uploaded.")] = False,
    data: Data = None,
) -> None:
    """Publish entries to the Hugging Face Hub; a second run uploads only what has changed."""
    import os
    from functools import cache
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    from tamzoo import hub
    from tamzoo.catalogue import HUB_OWNER
    from tamzoo.data import data_directory, load_split
    from tamzoo.onnx_export import export_entry
    from tamzoo.publish import collect
    from tamzoo.publish import publish as upload
    from tamzoo.staging import stage

    entries = [entry for entry in _chosen(names, every) if entry.trained or not every]
    if hub.CARDS is None:
        raise ValueError("publishing needs a clone: here is no folder model_cards")
    owner, api = owner or HUB_OWNER, HfApi()
    folder = data_directory(data) if data or os.environ.get("TAMZOO_DATA") else None
    if folder is None:
        print("no --data and no TAMZOO_DATA: the staged weights are not evaluated on a sample")
    test_split = cache(lambda dataset: load_split(folder, dataset, "test", bar)) if folder else None
    done = []
    for entry in entries:
        with TemporaryDirectory(prefix="tamzoo-") as there:
            source = hub.CARDS / entry.name
            staged = stage(
                entry, source, Path(there), owner=owner, export=export_entry, test_split=test_split
            )
            published = upload(staged, api, private=private, create_pr=create_pr, dry_run=dry_run)
        done.append(published.repo_id)
        print(published, flush=True)
    if done and not (dry_run or create_pr):
        print(f"collection: {collect(done, api, owner, private=private)}")


def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Entries.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every entry.")] = False,
    owner: Owner = None,
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
        if hub.CARDS is not None and (hub.CLONED or (hub.CARDS / entry.name).is_dir()):
            found["here"] = verify_folder(entry, hub.CARDS / entry.name)
        if remote and entry.trained:
            found[f"{owner}/{entry.name}"] = verify_remote(entry, api, owner)
        if not (found or every):
            found["nowhere"] = ["nothing to check: this installation has no folder of it"]
        for place, problems in found.items():
            print(f"{entry.name}: {place}: {'; '.join(problems) or 'right'}", flush=True)
        bad += any(found.values())
    if bad:
        raise typer.Exit(1)
