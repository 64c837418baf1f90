"""A TAM model beside its peers on the test split: weights in, the numbers of the paper's section 4 out."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from tamzoo.backbones import blocks_of
from tamzoo.checkpoint import sha256_of
from tamzoo.data import Split
from tamzoo.evaluate import normalised
from tamzoo.findings import Analysis, Pass, Spread
from tamzoo.gates import measure_gates
from tamzoo.journal import commit_here, hardware, versions
from tamzoo.progress import Progress, silent
from tamzoo.spreads import watched_gates
from tamzoo.studies import (
    Batches,
    Chain,
    lesion_study,
    straightening_order,
    straightening_study,
    weight_variances,
)
from tamzoo.subjects import Subject, check_peers

BATCH = 64  # images
COMPARED = ("plain", "se", "cbam")  # with TAM, in the paper's figures


def analyse(main: Subject, peers: Sequence[Subject], split: Split, progress: Progress = silent) -> Analysis:
    """All numbers of section 4 for one TAM model, each study one pass over the split in batches.

    Args:
        peers: Other attentions on the same backbone and data set, for comparison.
        split: Test images, on the device that computes; memory does not grow with their number.
    Raises:
        ValueError: as `check_peers` and `Subject.load`; fewer than two images; gates that are not finite.
    """
    check_peers(main, peers)
    shown = partial(normalised, split, main.dataset, BATCH, progress)
    curves = [row for each in (main, *peers) for row in each.curve()]
    device = split.labels.device
    model, others = main.load().to(device), [(peer, peer.load().to(device)) for peer in peers]
    chain, ledger = Chain(model), _Ledger(model, -(-len(split) // BATCH))
    with ledger.study("gates", 1), watched_gates(model, main.label) as spreads:
        gates = measure_gates(model, (pixels for pixels, _ in shown("Measuring gates")))
    with ledger.study("lesions", len(chain.blocks) + 1):
        intact, lesions = lesion_study(chain, shown("Removing gates"))
    with ledger.study("straightened", len(straightening_order(model)) + 1):
        straightened = straightening_study(chain, model, shown("Making trees linear"))
    rows, weights = spreads(), weight_variances(model, main.label)
    for peer, other in others:
        if peer.attention in ("se", "cbam", "tam"):
            rows += _spreads(other, peer.label, shown(f"Watching {peer.label}"))
        weights += weight_variances(other, peer.label)
    there = {peer.attention for peer in peers}
    return Analysis(
        entry=main.entry,
        sha256=sha256_of(main.weights),
        dataset=main.dataset.tag,
        n=len(split),
        data_note=split.note,
        **intact.errors(),
        gates=gates,
        spreads=rows,
        lesions=lesions,
        straightened=straightened,
        weights=weights,
        curves=curves,
        absent=[attention for attention in COMPARED if attention not in there],
        passes=ledger.passes,
        peak_memory_mb=_peak_memory_mb(),
        hardware=hardware(device, 1),
        commit=commit_here(),
        versions=versions(),
    )


class _Ledger:
    """What each study costs: seconds, and how often a block runs on a batch."""

    def __init__(self, model: nn.Module, batches: int) -> None:
        self.passes: list[Pass] = []
        self._blocks = list(blocks_of(model).values())
        self._batches = batches
        self._runs = 0

    def _count(self, *_: object) -> None:
        self._runs += 1

    @contextmanager
    def study(self, name: str, configurations: int) -> Iterator[None]:
        """Times what is inside the block, which shows that many configurations of the model every image."""
        hooks = [block.register_forward_pre_hook(self._count) for block in self._blocks]
        self._runs, began = 0, time.monotonic()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        seconds = round(time.monotonic() - began, 1)
        naive = configurations * len(self._blocks) * self._batches
        self.passes.append(Pass(study=name, seconds=seconds, blocks=self._runs, blocks_naive=naive))


@torch.inference_mode()
def _spreads(model: nn.Module, label: str, batches: Batches) -> list[Spread]:
    with watched_gates(model, label) as spreads:
        for pixels, _ in batches:
            model(pixels)
    return spreads()


def _peak_memory_mb() -> float | None:
    """Largest resident size of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
