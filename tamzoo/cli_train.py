"""The commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tamzoo.terminal import Data, RunBar, bar


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; with --queue, of the runs.")],
    name: Annotated[str | None, typer.Argument(help="Entry, for instance resnet18_tam.cifar10.")] = None,
    data: Data = None,
    recipe: Annotated[str, typer.Option(help="Recipe row.")] = "short",
    epochs: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    seed: int = 0,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16 (default: by device).")] = None,
    time_budget: Annotated[float, typer.Option(help="Seconds; a later call goes on.")] = float("inf"),
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out, or start it.")] = False,
    queue: Annotated[bool, typer.Option(help="The next entries without weights, each resumed.")] = False,
    only: Annotated[str, typer.Option(help="With --queue: pattern of names, for instance '*_tam.*'.")] = "*",
    compile: Annotated[bool | None, typer.Option(help="torch.compile (default: on CUDA).")] = None,
) -> None:
    """Train an entry or the queue; under torchrun, on several processes."""
    from tamzoo.distributed import join
    from tamzoo.progress import SILENT, Voice
    from tamzoo.session import Order, train_entries, waiting

    if (name is None) != queue:
        raise ValueError("pass either the name of an entry or --queue")
    folders = {name: out} if name else {waits: out / waits for waits in waiting(out, only)}
    order = Order(
        recipe=recipe, epochs=epochs, seed=seed, precision=precision, resume=resume or queue, compiled=compile
    )
    live = RunBar()
    with join() as world:
        voice = Voice(say=live.say, bar=bar, watch=live.watch) if world.first else SILENT
        try:
            train_entries(folders, order, data, time_budget, world, voice)
        finally:
            live.close()


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture: .png, .svg or .pdf.")],
) -> None:
    """Draw test error against epoch, a line a run."""
    from tamzoo.plots import plot_error

    plot_error(runs, out)
    print(out)
