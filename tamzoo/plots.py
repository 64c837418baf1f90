"""Pictures of what was measured; they need matplotlib (`tamzoo[plots]`)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tamzoo.checkpoint import check_output_file, whole_file
from tamzoo.findings import Curve
from tamzoo.journal import read_log
from tamzoo.records import GateStats, Timing

# Okabe & Ito's palette, told apart with any colour vision; dashes and markers tell lines apart in grey print
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
KINDS = (".png", ".svg", ".pdf")
GREY = "0.45"

logger = logging.getLogger(__name__)


def line_style(index: int) -> dict[str, Any]:
    """How the line of that index is drawn; no two of 32 alike."""
    dashes = DASHES[(index + index // len(COLOURS)) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}


class Placed(Protocol):
    """A row of a record that belongs to a block."""

    @property
    def block(self) -> int: ...
    @property
    def stage(self) -> int: ...


def plot_error(runs: Sequence[Path], out: Path) -> None:
    """Draws test error against epoch, a line a run (as the paper's Figure 6).

    Args:
        runs: Folders of training runs; lines are named after them, with their paths where names repeat.
            Those whose first epoch has not ended are left out.
        out: .png, .svg or .pdf.
    Raises:
        ValueError: no matplotlib, a folder without a log, no place for the picture, or another kind of it.
    """
    check_matplotlib()
    check_output_file(out)
    begun = [run for run in runs if not (run / "log.csv").exists() and (run / "run.json").is_file()]
    runs = [run for run in runs if run not in begun] or runs
    for run in begun:
        logger.warning("%s: no epoch has ended yet; left out", run)
    errors = [[row["test_top1_error"] for row in read_log(run)] for run in runs]
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = list(map(str, runs))
    plot_curves([Curve(model=name, top1_errors=row) for name, row in zip(names, errors, strict=True)], out)


def literal(text: str) -> str:
    """A text that matplotlib shows as it is, not as a formula."""
    return text.replace("$", r"\$")


def plot_curves(curves: Sequence[Curve], out: Path) -> None:
    """Draws test error against epoch, a line a run (as the paper's Figure 6)."""
    figure, axes = canvas(out)
    for index, curve in enumerate(curves):
        errors = curve.top1_errors
        axes.plot(
            range(1, len(errors) + 1),
            errors,
            **line_style(index),
            marker="o" if len(errors) == 1 else None,
            label=literal(f"{curve.model}: {errors[-1]:.2f} %" if errors else curve.model),
        )
    axes.set(xlabel="epoch", ylabel="top-1 error on the test split (%)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, title="run: error of the last epoch")
    save(figure, out)


def plot_gates(gates: Sequence[GateStats], out: Path) -> None:
    """Draws mean and range of every gate against its block (as the paper's Figure 4a).

    Args:
        gates: From the stem to the head.
        out: .png, .svg or .pdf.
    Raises:
        ValueError: no matplotlib, or another kind of picture.
    """
    figure, axes = canvas(out)
    axes.errorbar(
        [gate.block for gate in gates],
        [gate.mean for gate in gates],
        yerr=[[gate.mean - gate.min for gate in gates], [gate.max - gate.mean for gate in gates]],
        color=COLOURS[5],
        marker="o",
        linestyle="none",
        capsize=4,
    )
    axes.set(xlabel="block", ylabel=f"gate: mean and range over {gates[0].n:,} images", ylim=(0, 1))
    mark_stages(axes, gates)
    save(figure, out)


def plot_latencies(series: Mapping[str, Sequence[Timing]], out: Path) -> None:
    """Draws each program's time over the first one's, median and quartiles.

    Args:
        series: What was timed -> its programs, the same ones for all.
        out: .png, .svg or .pdf.
    Raises:
        ValueError: no matplotlib, or another kind of picture.
    """
    figure, axes = canvas(out)
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
            marker=MARKERS[index % len(MARKERS)],
            linestyle="none",
            capsize=3,
            label=label,
        )
    axes.set(xscale="log", xlabel=f"time / time of {names[0]}, median and quartiles")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.legend(frameon=False)
    save(figure, out)


def check_picture(out: Path) -> None:
    """Sees that a picture of this name can be drawn.

    Raises:
        ValueError: no matplotlib, or another kind of picture.
    """
    canvas(out)


def canvas(out: Path, rows: int = 1, columns: int = 1, height: float = 4.0) -> tuple[Any, Any]:
    """A figure, and its axes: one, or an array of them that share what they can.

    Args:
        height: Inches.
    Raises:
        ValueError: no matplotlib, or `out` is another kind of picture than .png, .svg or .pdf.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    if out.suffix not in KINDS:
        raise ValueError(f"{out}: expected a picture named {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    figure = Figure(figsize=(6.4, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=columns > 1).flatten()
    for axes in grid:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid if len(grid) > 1 else grid[0]


def mark_stages(axes: Any, rows: Sequence[Placed], named: bool = True) -> None:
    """Shades every second stage of an axis that counts blocks, and names them above it."""
    blocks: dict[int, list[int]] = {}
    for row in rows:
        blocks.setdefault(row.stage, []).append(row.block)
    for index, (stage, numbers) in enumerate(sorted(blocks.items())):
        low, high = min(numbers) - 0.5, max(numbers) + 0.5
        axes.axvspan(low, high, color="0.93" if index % 2 else "1.0", zorder=0, linewidth=0)
        if named:
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text((low + high) / 2, 1.01, f"stage {stage}", color=GREY, **place)
    last = max(row.block for row in rows)
    step = -(-last // 17)  # labels that do not touch
    axes.set(xlim=(0.5, last + 0.5), xticks=range(1, last + 1, step))


def legend_below(figure: Any, title: str | None = None) -> None:
    """One legend for the figure, where it covers nothing."""
    figure.legend(loc="outside lower center", ncols=2, frameon=False, title=title)


def check_matplotlib() -> None:
    """Raises ValueError where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("drawing needs matplotlib; pip install 'tamzoo[plots]'") from error


def save(figure: Any, out: Path) -> None:
    """Writes a picture at once or not at all; the same numbers give the same bytes."""
    import matplotlib

    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "tamzoo"}), whole_file(out) as part:
        figure.savefig(part, dpi=200, format=out.suffix[1:], metadata=metadata[out.suffix])
