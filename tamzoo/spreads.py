"""How gates vary within an image: mean and variance of every image, streamed into histograms (Figure 3)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers import SEModule
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from tamzoo.attention import TAM
from tamzoo.backbones import blocks_of
from tamzoo.findings import Spread
from tamzoo.gates import stage_of

FLAT = 1e-12  # the variance of a gate that moves by a few units in the last place of float32 lies below
MEAN_BINS = 100  # of equal width in [0, 1]
BINS_A_DECADE = 5
VARIANCE_BINS = 1 + 12 * BINS_A_DECADE  # at most FLAT; then from FLAT to 1, equal in the logarithm


class SpreadWatch:
    """Mean and variance of one gate over each image's positions or channels, as a histogram.

    Bin i of the means begins at i / 100; bin 0 of the variances ends at 1e-12, bin j > 0 begins at
    1e-12 * 10 ** ((j - 1) / 5). Its size does not depend on the number of images.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(MEAN_BINS * VARIANCE_BINS, dtype=torch.int64)
        self.images = 0
        self.means = torch.zeros(2, dtype=torch.float64)  # sums of the means and of their squares
        self.variance_sum, self.variance_max = 0.0, 0.0

    def __call__(self, gate: Tensor) -> None:
        """Takes a batch of gates: (n, 1, h, w), or (n, c, 1, 1)."""
        values = gate.double().flatten(1)  # (n, positions or channels)
        mean, variance = values.mean(1), values.var(1, unbiased=False)
        if not torch.isfinite(variance).all():
            raise ValueError("a gate is not finite: the weights or the images hold NaN or infinity")
        decades = (variance.clamp(min=FLAT) / FLAT).log10()
        row = torch.where(variance > FLAT, 1 + (decades * BINS_A_DECADE).long(), 0)
        column = (mean * MEAN_BINS).long().clamp(0, MEAN_BINS - 1)
        bins = column * VARIANCE_BINS + row.clamp(max=VARIANCE_BINS - 1)
        self.counts += torch.bincount(bins.cpu(), minlength=len(self.counts))
        self.images += len(values)
        self.means += torch.stack([mean.sum(), mean.square().sum()]).cpu()
        self.variance_sum += variance.sum().item()
        self.variance_max = max(self.variance_max, variance.max().item())

    def spread(self, **place: Any) -> Spread:
        """What was seen, as a record of the gate at that place."""
        mean, square = (self.means / self.images).tolist()
        counts = self.counts.view(MEAN_BINS, VARIANCE_BINS)
        cells = [[*cell, int(counts[tuple(cell)])] for cell in counts.nonzero().tolist()]
        return Spread(
            **place,
            n=self.images,
            mean=mean,
            mean_std=max(square - mean**2, 0.0) ** 0.5,
            variance_mean=self.variance_sum / self.images,
            variance_max=self.variance_max,
            flat=int(counts[:, 0].sum()),
            cells=cells,
        )


def _gates(attention: nn.Module | None) -> dict[str, nn.Module]:
    """Kind of gate -> the module that shows it; TAM's own gate is no module, so its input has to do."""
    if isinstance(attention, TAM):
        return {"TAM": attention}
    if isinstance(attention, SEModule):
        return {"SE": attention.get_submodule("gate")}
    if isinstance(attention, CbamModule):
        return {f"CBAM {part}": attention.get_submodule(f"{part}.gate") for part in ("channel", "spatial")}
    return {}


def _see(watch: SpreadWatch, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    watch(module.gate(inputs[0]) if isinstance(module, TAM) else output)


@contextmanager
def watched_gates(model: nn.Module, label: str) -> Iterator[Callable[[], list[Spread]]]:
    """Watches every gate of TAM, SE and CBAM while the model runs inside the block.

    Args:
        label: What the rows call the model.
    Yields:
        A function that gives a row a gate, from the stem to the head; CBAM has two a block.
    """
    watches: list[tuple[dict[str, Any], SpreadWatch]] = []
    hooks = []
    for block, (name, module) in enumerate(blocks_of(model).items(), start=1):
        for kind, gate in _gates(module.se).items():
            place = {"model": label, "kind": kind, "name": f"{name}.se", "block": block}
            watches.append((place | {"stage": stage_of(name)}, watch := SpreadWatch()))
            hooks.append(gate.register_forward_hook(partial(_see, watch)))
    try:
        yield lambda: [watch.spread(**place) for place, watch in watches]
    finally:
        for hook in hooks:
            hook.remove()
