"""Pictures of an analysis: the figures of the paper's section 4."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, floor, log10
from operator import attrgetter
from pathlib import Path
from statistics import mean
from typing import Any

from tamzoo.findings import Analysis, Spread
from tamzoo.plots import (
    COLOURS,
    GREY,
    MARKERS,
    canvas,
    legend_below,
    line_style,
    literal,
    mark_stages,
    plot_curves,
    plot_gates,
    save,
)
from tamzoo.records import Record, read_record
from tamzoo.spreads import BINS_A_DECADE, MEAN_BINS

FLAT_ROW = -14  # where the decimal logarithm of a variance of at most 1e-12 is drawn


def plot_spreads(spreads: Sequence[Spread], out: Path) -> None:
    """Draws the variance within an image against the mean, a marker a histogram cell (as Figure 3).

    A panel for each kind of gate of each model; SE's and CBAM's first gate over channels, the others over
    positions. The lowest row holds what is at most 1e-12: to float32, no variance at all.
    """
    panels = {(row.model, row.kind): [] for row in spreads}
    for row in spreads:
        panels[row.model, row.kind].append(row)
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure, found = canvas(out, rows=height, columns=columns, height=0.8 + 3.2 * height)
    grid = [found] if len(panels) == 1 else list(found)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, ((model, kind), rows) in zip(grid, panels.items(), strict=False):
        for row in rows:
            axes.scatter(
                [(mean + 0.5) / MEAN_BINS for mean, _, _ in row.cells],
                [-12 + (bin - 0.5) / BINS_A_DECADE if bin else FLAT_ROW for _, bin, _ in row.cells],
                s=[_area(images) for _, _, images in row.cells],
                color=COLOURS[row.stage % len(COLOURS)],
                marker=MARKERS[row.stage % len(MARKERS)],
                alpha=0.6,
                linewidths=0,
            )
        axes.axhline((FLAT_ROW - 12) / 2, color=GREY, linewidth=0.8, linestyle=":")
        several = [same for _, same in panels].count(kind) > 1
        axes.set_title(f"{kind}\n{literal(model)}" if several else kind)
        axes.set(
            xlabel=f"mean over {'channels' if rows[0].over_channels else 'positions'}", xlim=(-0.02, 1.02)
        )
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "", "0.5", "", "1"))
        axes.tick_params(labelbottom=True)
        axes.set(ylim=(FLAT_ROW - 0.8, 0), yticks=[FLAT_ROW, *range(-12, 1, 2)])
        axes.set_yticklabels(["$\\leq 10^{-12}$", *(f"$10^{{{power}}}$" for power in range(-12, 1, 2))])
    for axes in grid[::columns]:
        axes.set_ylabel("variance within an image")
    _spread_legend(figure, grid[0], sorted({row.stage for row in spreads}), spreads[0].n)
    save(figure, out)


def _area(images: int) -> float:
    """Of a marker, points squared: 6 for one image, 20 more for each factor of ten."""
    return 6 + 20 * log10(images)


def _spread_legend(figure: Any, axes: Any, stages: Sequence[int], n: int) -> None:
    handles = [
        axes.scatter(
            [], [], s=40, color=COLOURS[stage % 8], marker=MARKERS[stage % 8], label=f"stage {stage}"
        )
        for stage in stages
    ]
    counts = [1, *(count for count in (100, 10_000) if count <= n)]
    handles += [
        axes.scatter(
            [], [], s=_area(count), color=GREY, marker="o", label=f"{count:,} image{'s' * (count > 1)}"
        )
        for count in counts
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(stages), frameon=False)


def plot_lesions(analysis: Analysis, out: Path) -> None:
    """Draws the errors with each gate in turn replaced by 1, from the intact model's (as Figure 4b)."""
    figure, (upper, lower) = canvas(out, rows=2)
    lesions, blocks = analysis.lesions, [row.block for row in analysis.lesions]
    for axes, name, intact, errors in (
        (upper, "top-1", analysis.top1_error, [row.top1_error for row in lesions]),
        (lower, "top-5", analysis.top5_error, [row.top5_error for row in lesions]),
    ):
        axes.axhline(intact, color=GREY, linestyle="--", linewidth=1, label=f"all gates: {intact:.2f} %")
        axes.vlines(blocks, intact, errors, color=COLOURS[5], linewidth=1)
        axes.plot(blocks, errors, "o", color=COLOURS[5], label="one gate removed" if axes is upper else None)
        axes.set(ylabel=f"{name} error (%)")
        axes.margins(y=0.15)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    lower.set(xlabel="block whose gate is replaced by 1")
    mark_stages(upper, lesions)
    mark_stages(lower, lesions, named=False)
    save(figure, out)


def plot_straightened(analysis: Analysis, out: Path) -> None:
    """Draws accuracy and change of logits as PReLUs get slope 1, nearest mean slope first (as Figure 5a)."""
    figure, (upper, lower) = canvas(out, rows=2)
    steps = analysis.straightened
    for axes, values in (
        (upper, [100 - analysis.top1_error, *(100 - row.top1_error for row in steps)]),
        (lower, [0.0, *(row.logit_change for row in steps)]),
    ):
        axes.plot(range(len(values)), values, color=GREY, linewidth=1)
        axes.plot(0, values[0], marker="o", color=COLOURS[0], linestyle="none", label="as trained")
        for stage in sorted({row.stage for row in steps}):
            chosen = [index for index, row in enumerate(steps, start=1) if row.stage == stage]
            axes.plot(
                chosen,
                [values[index] for index in chosen],
                color=COLOURS[stage % len(COLOURS)],
                marker=MARKERS[stage % len(MARKERS)],
                linestyle="none",
                label=f"PReLU of stage {stage}",
            )
    upper.set(ylabel="top-1 accuracy (%)", ylim=(0, 100))
    lower.set(xlabel="PReLU layers set to slope 1", ylabel="largest change\nof a logit")
    lower.margins(y=0.15)
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, out)


def plot_group_sizes(runs: Sequence[Record], out: Path) -> None:
    """Draws the errors against the group size, and those without attention (as the paper's Figure 2)."""
    figure, (upper, lower) = canvas(out, rows=2)
    sizes = [run for run in runs if run.model_args]
    groups = [run.model_args["group_size"] for run in sizes]
    for axes, name, error_of in (
        (upper, "top-1", attrgetter("score.top1_error")),
        (lower, "top-5", attrgetter("score.top5_error")),
    ):
        axes.plot(groups, [error_of(run) for run in sizes], "o-", color=COLOURS[5], label="TAM")
        for plain in (run for run in runs if not run.model_args):
            axes.axhline(error_of(plain), color=GREY, linestyle="--", label="no attention")
        axes.set(ylabel=f"{name} error (%)", xscale="log")
        axes.margins(y=0.15)
    lower.set_xticks(groups, [str(group) for group in groups])
    lower.minorticks_off()
    lower.set_xlabel("group size g")
    upper.set_title(f"{sizes[0].entry}, {sizes[0].epochs} epochs, last epoch, seed {sizes[0].seed}")
    upper.legend(frameon=False)
    save(figure, out)


def plot_seeds(runs: Sequence[Record], out: Path) -> None:
    """Draws the top-1 error of every run over its entry, and a bar at each entry's mean."""
    figure, axes = canvas(out)
    entries = list(dict.fromkeys(run.entry for run in runs))
    for place, entry in enumerate(entries):
        errors = [run.score.top1_error for run in runs if run.entry == entry]
        axes.plot([place] * len(errors), errors, "o", color=COLOURS[5], alpha=0.6)
        axes.plot(place, mean(errors), "_", color=COLOURS[0], markersize=30)
    axes.set(ylabel="top-1 error (%)", xlim=(-0.5, len(entries) - 0.5))
    axes.set_xticks(range(len(entries)), entries)
    axes.set_title(f"{runs[0].epochs} epochs, last epoch; a point a seed, a bar at the mean")
    save(figure, out)


def plot_weights(analysis: Analysis, out: Path) -> None:
    """Draws the variance of each block's convolution weights, a line a model (as Figure 5b)."""
    figure, axes = canvas(out)
    for index, model in enumerate(dict.fromkeys(row.model for row in analysis.weights)):
        rows = [row for row in analysis.weights if row.model == model]
        axes.plot(
            [row.block for row in rows],
            [row.variance for row in rows],
            **line_style(index),
            marker=MARKERS[index % len(MARKERS)],
            label=literal(model),
        )
    ends = [log10(choose(row.variance for row in analysis.weights)) for choose in (min, max)]
    axes.set(xlabel="block", ylabel="variance of convolution weights", yscale="log")
    axes.set_ylim(10 ** floor(ends[0]), 10 ** ceil(ends[1]))  # whole decades, so that ticks have labels
    legend_below(figure)
    mark_stages(axes, analysis.weights)
    save(figure, out)


FIGURES: dict[str, Callable[[Analysis, Path], None]] = {
    "spreads": lambda analysis, out: plot_spreads(analysis.spreads, out),
    "gates": lambda analysis, out: plot_gates(analysis.gates, out),
    "lesions": plot_lesions,
    "straightened": plot_straightened,
    "weights": plot_weights,
    "curves": lambda analysis, out: plot_curves(analysis.curves, out),
}


def plot_analysis(analysis: Analysis, folder: Path, kinds: Sequence[str] = (".png",)) -> list[Path]:
    """Draws all that an analysis holds into a folder, `lesions.png` and so on; returns the files.

    Where the folder holds the record of these weights, gates are drawn as that has them, of all images.

    Args:
        kinds: Of .png, .svg and .pdf.
    Raises:
        ValueError: no matplotlib, another kind of picture, or a record that cannot be read.
    """
    record = read_record(path) if (path := folder / "record.json").is_file() else None
    if record and record.sha256 == analysis.sha256 and record.gates:
        analysis = replace(analysis, gates=record.gates)
    paths = [folder / f"{name}{kind}" for name in analysis.figures for kind in kinds]
    for path in paths:
        FIGURES[path.stem](analysis, path)
    return paths
