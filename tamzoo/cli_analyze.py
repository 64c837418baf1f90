"""The command that shows what gates do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tamzoo.terminal import Data, Device, Name, Weights, bar, device_called, table

if TYPE_CHECKING:
    from tamzoo.findings import Analysis


def analyze(
    name: Name,
    data: Data = None,
    weights: Weights = None,
    out: Annotated[Path, typer.Option(help="Folder for analysis.json and the pictures.")] = Path("analysis"),
    images: Annotated[int | None, typer.Option(min=2, help="Test images (default: all).")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Entry or run folder to compare with, beside those known.")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Of pictures (default: png and svg).")] = None,
    device: Device = "cpu",
) -> None:
    """Show what the gates of a TAM model do: the paper's section 4 as numbers and pictures."""
    from tamzoo.analysis import analyse
    from tamzoo.checkpoint import write_whole
    from tamzoo.data import data_directory, load_split
    from tamzoo.findings import ANALYSIS
    from tamzoo.plots import check_picture
    from tamzoo.plots_analysis import plot_analysis
    from tamzoo.subjects import check_peers, known_peers, subject

    kinds = [f".{each}" for each in kind or ("png", "svg")]
    for each in kinds:
        check_picture(out / f"analysis{each}")
    place = device_called(device)
    folder, main = data_directory(data), subject(name, weights)
    candidates = (*known_peers(main), *(subject(given) for given in peer or ()))
    peers = list({each.weights.resolve(): each for each in candidates}.values())
    check_peers(main, peers)
    split = load_split(folder, main.dataset, "test", bar).first(images)
    for each in (main, *peers):
        each.load()  # before anything is made or measured
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(error.errno, f"cannot make the folder {out}: {error.strerror}") from error
    found = analyse(main, peers, split.to(place), bar)
    for old in (out / f"{name}.{each}" for name in found.figures for each in ("png", "svg", "pdf")):
        old.unlink(missing_ok=True)  # were this interrupted, it would pass for one of these numbers
    write_whole(out / ANALYSIS, found.to_json())
    _tell(found)
    for path in plot_analysis(found, out, kinds):
        print(path)


def _tell(found: Analysis) -> None:
    """The numbers behind the pictures, in brief."""
    table(
        f"{found.entry} on {found.n} {found.dataset} test images: "
        f"{found.top1_error:.2f} % top-1 error, {found.top5_error:.2f} % top-5",
        ("gate", "block", "stage", "mean", "std", "top-1 error without", "top-5 error without"),
        [
            (
                gate.name,
                gate.block,
                gate.stage,
                f"{gate.mean:.6f}",
                f"{gate.std:.1e}",
                f"{lesion.top1_error:.2f} %",
                f"{lesion.top5_error:.2f} %",
            )
            for gate, lesion in zip(found.gates, found.lesions, strict=True)
        ],
    )
    for row in found.passes:
        spared = f", {row.blocks} block passes in place of {row.blocks_naive}" * (
            row.blocks < row.blocks_naive
        )
        print(f"{row.study}: {row.seconds} s{spared}")
    if found.absent:
        print(f"not compared with {', '.join(found.absent)}: no weights on this backbone and data set")
