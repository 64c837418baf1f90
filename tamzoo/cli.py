"""The commands; the only room that prints."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tamzoo.progress import Moment

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


class _RunBar:
    """A live line for a training run on a terminal; nothing where the output is a file."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[told]}"))
        self._seen = console.is_terminal
        self._bar = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, disable=not self._seen
        )
        self._task = self._bar.add_task("", told="")

    def watch(self, moment: "Moment") -> None:
        if not self._seen:
            return
        minutes, seconds = divmod(int(moment.eta_s), 60)
        told = f"loss {moment.loss:.3f}  {moment.images_per_s:,.0f} images/s  {minutes}:{seconds:02d} left"
        place = f"Epoch {moment.epoch}/{moment.epochs}"
        self._bar.start()
        self._bar.update(self._task, description=place, completed=moment.step, total=moment.steps, told=told)

    def say(self, line: str) -> None:
        self.close()
        print(line, flush=True)

    def close(self) -> None:
        self._bar.stop()


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; with --queue, of the runs.")],
    name: Annotated[str | None, typer.Argument(help="Entry, for instance resnet18_tam.cifar10.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the data, or hub to download it (default: $TAMZOO_DATA).")
    ] = None,
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
    bar = _RunBar()
    with join() as world:
        voice = Voice(say=bar.say, bar=_bar, watch=bar.watch) if world.first else SILENT
        try:
            train_entries(folders, order, data, time_budget, world, voice)
        finally:
            bar.close()


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture: .png, .svg or .pdf.")],
) -> None:
    """Draw test error against epoch, a line a run."""
    from tamzoo.plots import plot_error

    plot_error(runs, out)
    print(out)


def main() -> None:
    app()
