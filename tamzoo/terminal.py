"""What the commands share: bars, tables, and the model that a name means."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tamzoo.datasets import Dataset
    from tamzoo.progress import Moment
    from tamzoo.records import GateStats

DEMO_ENTRY = "resnet18_tam.cifar10"
# What only one command needs is imported inside its function.
Name = Annotated[
    str, typer.Argument(help="Model or entry, for instance resnet18_tam or resnet18_tam.cifar10.")
]
Weights = Annotated[Path | None, typer.Option(help="A safetensors file in place of the entry's weights.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder with the data, or hub to download it (default: $TAMZOO_DATA).")
]
Sample = Annotated[
    Path | None,
    typer.Option(
        help="As for evaluate; with neither it nor $TAMZOO_DATA, crops of shipped pictures and noise."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, or cuda where there is a GPU.")]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns ValueError, RuntimeError or OSError into a sentence and exit code 2; an interrupt into 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        told = str(error)
        if isinstance(error, OSError) and error.strerror:  # without its number
            told = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


def bar(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A bar on a terminal; nothing where the output is a file."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description, console=console, transient=True) if console.is_terminal else items


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        drawn.add_row(*("-" if cell is None else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(drawn)


def print_gates(gates: Iterable[GateStats], images: str) -> None:
    from tamzoo.attention import GATE_TOLERANCE

    columns = ("gate", "block", "stage", "mean", "std", "min", "max", "bound", "static", "any picture")
    rows = [
        (
            gate.name,
            gate.block,
            gate.stage,
            f"{gate.mean:.6f}",
            f"{gate.std:.1e}",
            f"{gate.min:.6f}",
            f"{gate.max:.6f}",
            f"{gate.bound_min:.6f} to {gate.bound_max:.6f}",
            "yes" if gate.width <= GATE_TOLERANCE else "no",
            gate.on_any_picture(GATE_TOLERANCE),
        )
        for gate in gates
    ]
    title = (
        f"Gates over {images}; static: maximum - minimum at most {GATE_TOLERANCE:g}; proven: on any picture"
    )
    table(title, columns, rows)


class RunBar:
    """A live line for a training run on a terminal; nothing where the output is a file."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[told]}"))
        self._seen = console.is_terminal
        self._live = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, disable=not self._seen
        )
        self._task = self._live.add_task("", told="")

    def watch(self, moment: Moment) -> None:
        if not self._seen:
            return
        minutes, seconds = divmod(int(moment.eta_s), 60)
        told = f"loss {moment.loss:.3f}  {moment.images_per_s:,.0f} images/s  {minutes}:{seconds:02d} left"
        place = f"Epoch {moment.epoch}/{moment.epochs}"
        self._live.start()
        self._live.update(self._task, description=place, completed=moment.step, total=moment.steps, told=told)

    def say(self, line: str) -> None:
        self.close()
        print(line, flush=True)

    def close(self) -> None:
        self._live.stop()


def load_model(name: str, weights: Path | None = None) -> tuple[nn.Module, str, Dataset]:
    """A model in eval mode with weights, its full name, and its data set's row."""
    import timm

    from tamzoo.datasets import DATASETS
    from tamzoo.registry import full_name, model_from

    full = full_name(name)
    model = model_from(weights, full) if weights else timm.create_model(full, pretrained=True).eval()
    return model, full, DATASETS[full.partition(".")[2]]


def device_called(name: str) -> torch.device:
    """The device of that name, ready to compute in float32.

    Raises:
        ValueError: no such device, or none that torch can use here.
    """
    import torch

    from tamzoo.learner import set_cudnn

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        why = str(error).splitlines()[0]
        raise ValueError(
            f"cannot compute on {name!r} ({why}); expected cpu, or cuda where there is a GPU"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"cannot compute on {name!r}; expected cpu, or cuda where there is a GPU")
    set_cudnn()
    return device


def test_pixels(data: Path | None, dataset: Dataset, n: int) -> tuple[Tensor, str]:
    """uint8 (n, 3, h, w) images: of the test split where there is data, else of the shipped pictures."""
    import os

    from tamzoo.data import data_directory, load_split
    from tamzoo.images import random_crops

    if data is not None or os.environ.get("TAMZOO_DATA"):
        pixels = load_split(data_directory(data), dataset, "test", bar).pixels[:n]
        return pixels, f"{len(pixels)} {dataset.title} test images"
    return random_crops(n, dataset.input_size[-1]), f"{n} crops of the shipped pictures and noise"
