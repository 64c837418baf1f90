"""The commands that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tamzoo.terminal import Data, RunBar, bar

if TYPE_CHECKING:
    from tamzoo.distributed import World
    from tamzoo.progress import Voice
    from tamzoo.records import Record
    from tamzoo.session import Order
    from tamzoo.sweep import Variant

Epochs = Annotated[int | None, typer.Option(help="In place of the recipe's.")]
RecipeRow = Annotated[str, typer.Option("--recipe", help="Recipe row.")]
Precision = Annotated[str | None, typer.Option(help="float32 or bfloat16 (default: by device).")]


def _seconds(found: float) -> float:
    if not found >= 0:  # nor NaN
        raise ValueError(f"--time-budget must be a number of seconds from 0 on, got {found}")
    return found


Budget = Annotated[
    float,
    typer.Option(help="Seconds; a later call goes on ('train NAME': with --resume).", callback=_seconds),
]
Compile = Annotated[
    Literal["no", "model", "blocks"] | None,
    typer.Option(
        help="What torch.compile makes: one graph, or one a kind of block, which starts sooner (default: on "
        "CUDA, blocks with --cuda-graph and model without)."
    ),
]
sweep = typer.Typer(no_args_is_help=True, help="Train one model with several values of a setting.")


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; with --queue, of the runs.")],
    name: Annotated[str | None, typer.Argument(help="Entry, for instance resnet18_tam.cifar10.")] = None,
    data: Data = None,
    recipe: RecipeRow = "short",
    epochs: Epochs = None,
    seed: int = 0,
    precision: Precision = None,
    time_budget: Budget = float("inf"),
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out, or start it.")] = False,
    queue: Annotated[
        bool, typer.Option(help="The next entries that the recipe has not trained, each resumed.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="With --queue: pattern of names, for instance '*_tam.cifar*'.")
    ] = "*",
    compile: Compile = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(help="Replay a captured step, in one launch (default: on one process on CUDA)."),
    ] = None,
    join_ends: Annotated[
        bool,
        typer.Option(help="BatchNorm, TAM, sum and ReLU of a block in one kernel; on one process on CUDA."),
    ] = False,
    initial_checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the weights of this finished run of the same model; of another data set's, with "
            "a new head."
        ),
    ] = None,
) -> None:
    """Train an entry or the queue; under torchrun, on several processes."""
    from tamzoo.session import Order, train_entries, waiting

    if (name is None) != queue:
        raise ValueError("pass either the name of an entry or --queue")
    if only != "*" and not queue:
        raise ValueError("--only chooses from the queue: pass --queue too")
    if queue and initial_checkpoint:
        raise ValueError("--initial-checkpoint is of one entry: pass its name in place of --queue")
    order = Order(
        recipe=recipe,
        epochs=epochs,
        seed=seed,
        precision=precision,
        resume=resume or queue,
        compiled=compile,
        cuda_graph=cuda_graph,
        joined=join_ends,
        start=initial_checkpoint,
    )
    with _session() as (world, voice):
        folders = {name: out} if name else {waits: out / waits for waits in waiting(out, recipe, only, world)}
        train_entries(folders, order, data, time_budget, world, voice)


Runs = Annotated[Path, typer.Option("--out", help="Folder of the runs, and of the pictures.")]
Backbone = Annotated[str, typer.Option("--model", help="Backbone, for instance resnet20.")]
Tag = Annotated[str, typer.Option(help="Data set.")]


@sweep.command()
def group_size(
    out: Runs,
    sizes: Annotated[list[int] | None, typer.Argument(help="Default: 2 4 8 16 32 64.", min=2)] = None,
    model: Backbone = "resnet20",
    tag: Tag = "cifar10",
    data: Data = None,
    recipe: RecipeRow = "short",
    epochs: Epochs = None,
    seed: int = 0,
    precision: Precision = None,
    time_budget: Budget = float("inf"),
    compile: Compile = None,
) -> None:
    """Train TAM once a group size and draw the errors (the paper's Figure 2); ended runs are not repeated."""
    from tamzoo.plots_analysis import plot_group_sizes
    from tamzoo.session import Order
    from tamzoo.sweep import GROUP_SIZES, group_sizes

    order = Order(recipe=recipe, epochs=epochs, precision=precision, compiled=compile)
    variants = group_sizes(f"{model}_tam.{tag}", sizes or GROUP_SIZES, seed)
    _sweep(variants, order, data, out, time_budget, plot_group_sizes)


@sweep.command()
def attention(
    out: Runs,
    names: Annotated[list[str] | None, typer.Argument(help="Default: plain scalar tam.")] = None,
    model: Backbone = "resnet20",
    tag: Tag = "cifar10",
    seeds: Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, ...", min=2)] = 3,
    data: Data = None,
    recipe: RecipeRow = "short",
    epochs: Epochs = None,
    precision: Precision = None,
    time_budget: Budget = float("inf"),
    compile: Compile = None,
) -> None:
    """Train a backbone with each attention, once a seed: does it lower the error by more than chance?

    Ended runs are not repeated.
    """
    from tamzoo.plots_analysis import plot_seeds
    from tamzoo.session import Order
    from tamzoo.sweep import attentions, summary

    order = Order(recipe=recipe, epochs=epochs, precision=precision, compiled=compile)
    variants = attentions(model, names or ("plain", "scalar", "tam"), tag, seeds)
    for line in summary(_sweep(variants, order, data, out, time_budget, plot_seeds)):
        print(line)


def _sweep(
    variants: list[Variant],
    order: Order,
    data: Path | None,
    out: Path,
    time_budget: float,
    draw: Callable[[list[Record], Path], None],
) -> list[Record]:
    from tamzoo.plots import check_matplotlib
    from tamzoo.sweep import sweep as sweep_through

    check_matplotlib()
    with _session() as (world, voice):
        found = sweep_through(variants, order, data, out, time_budget, world, voice)
        for path in (out / "sweep.png", out / "sweep.svg") if found else ():
            draw(found, path)
            voice.say(str(path))
    return found


@contextmanager
def _session() -> Iterator[tuple[World, Voice]]:
    """The processes that train together, and how the first of them speaks."""
    from tamzoo.distributed import join
    from tamzoo.progress import SILENT, Voice

    live = RunBar()
    with join() as world:
        try:
            yield world, Voice(say=live.say, bar=bar, watch=live.watch) if world.first else SILENT
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
