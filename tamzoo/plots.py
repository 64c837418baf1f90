"""Pictures of what was measured; they need matplotlib (`tamzoo[plots]`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tamzoo.checkpoint import whole_file
from tamzoo.journal import read_log
from tamzoo.records import GateStats, Timing

# Okabe & Ito's palette, told apart with any colour vision; the dashes tell lines apart in grey print
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
DASHES = ("-", "--", "-.", ":")


def plot_error(runs: Sequence[Path], out: Path) -> None:
    """Draws test error against epoch, a line a run (as the paper's Figure 6).

    Args:
        runs: Folders of training runs, each named after its line.
        out: .png, .svg or .pdf.
    Raises:
        ValueError: no matplotlib, a folder without a log, or another kind of picture.
    """
    figure, axes = _canvas(out)
    for index, run in enumerate(runs):
        rows = read_log(run)
        axes.plot(
            [row["epoch"] for row in rows],
            [row["test_top1_error"] for row in rows],
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            marker="o" if len(rows) == 1 else None,
            label=f"{run.resolve().name}: {rows[-1]['test_top1_error']:.2f} %" if rows else run.name,
        )
    axes.set(xlabel="epoch", ylabel="top-1 error on the test split (%)", ylim=(0, None))
    axes.legend(frameon=False, title="run: error of the last epoch")
    _save(figure, out)


def plot_gates(gates: Sequence[GateStats], out: Path) -> None:
    """Draws mean and range of every gate against its block (as the paper's Figure 4a).

    Args:
        gates: From the stem to the head.
        out: .png, .svg or .pdf.
    Raises:
        ValueError: no matplotlib, or another kind of picture.
    """
    figure, axes = _canvas(out)
    for stage in sorted({gate.stage for gate in gates}):
        rows = [gate for gate in gates if gate.stage == stage]
        axes.errorbar(
            [gate.block for gate in rows],
            [gate.mean for gate in rows],
            yerr=[[gate.mean - gate.min for gate in rows], [gate.max - gate.mean for gate in rows]],
            color=COLOURS[stage % len(COLOURS)],
            marker="osD^v"[stage % 5],
            linestyle="none",
            capsize=4,
            label=f"stage {stage}",
        )
    axes.set(xlabel="block", ylabel="gate", ylim=(0, 1), xticks=[gate.block for gate in gates])
    axes.legend(frameon=False, title=f"mean, and range over {gates[0].n:,} images")
    _save(figure, out)


def plot_latencies(series: Mapping[str, Sequence[Timing]], out: Path) -> None:
    """Draws each program's time over the first one's, median and quartiles.

    Args:
        series: What was timed -> its programs, the same ones for all.
        out: .png, .svg or .pdf.
    Raises:
        ValueError: no matplotlib, or another kind of picture.
    """
    figure, axes = _canvas(out)
    names = [timing.name for timing in next(iter(series.values()))]
    for index, (label, timings) in enumerate(series.items()):
        offset = 0.6 * ((index + 0.5) / len(series) - 0.5)
        below = [timing.ratio - timing.ratio_low for timing in timings]
        above = [timing.ratio_high - timing.ratio for timing in timings]
        axes.errorbar(
            [timing.ratio for timing in timings],
            [row + offset for row in range(len(names))],
            xerr=[below, above],
            color=COLOURS[index % len(COLOURS)],
            marker="osD^v"[index % 5],
            linestyle="none",
            capsize=3,
            label=label,
        )
    axes.set(xscale="log", xlabel=f"time / time of {names[0]}, median and quartiles")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.legend(frameon=False)
    _save(figure, out)


def check_picture(out: Path) -> None:
    """Sees that a picture of this name can be drawn.

    Raises:
        ValueError: no matplotlib, or another kind of picture.
    """
    _canvas(out)


def _canvas(out: Path) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib; pip install 'tamzoo[plots]'") from error
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{out}: expected a picture named .png, .svg or .pdf")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, out: Path) -> None:
    with whole_file(out) as part:
        figure.savefig(part, dpi=200, format=out.suffix[1:])
