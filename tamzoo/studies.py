"""Gates removed, trees made linear, weights compared (paper, section 4): one configuration after another.

A configuration changes one block; what enters that block is known from the one before, so the network
runs from there on only.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from tamzoo.backbones import GatedBlock, blocks_of
from tamzoo.findings import Lesion, Straightened, WeightVariance
from tamzoo.gates import gates_of, stage_of

Batches = Iterable[tuple[Tensor, Tensor]]  # (n, c, h, w) normalised, and (n,) int64 labels


class Chain:
    """A model as stem, blocks and tail, to be run from any block on.

    Attributes:
        blocks: By name, from the stem to the head.
    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        if model.training:
            raise ValueError("a study needs a model in eval mode; call model.eval() first")
        self.stem = cast(Callable[[Tensor], Tensor], model.forward_stem)
        self.tail = cast(Callable[[Tensor], Tensor], model.forward_tail)
        self.blocks = blocks_of(model)

    def onward(self, x: Tensor, block: int) -> Iterator[Tensor]:
        """What leaves each block from the one at index `block` on, fed with x."""
        for module in list(self.blocks.values())[block:]:
            x = module(x)
            yield x

    def logits(self, x: Tensor, block: int) -> Tensor:
        """Logits where x enters the block at index `block`; after the last index, the tail's input."""
        for y in self.onward(x, block):
            x = y
        return self.tail(x)


class Tally:
    """Errors of one configuration, counted batch by batch."""

    def __init__(self) -> None:
        self.n, self.top1, self.top5 = 0, 0, 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        hits = logits.topk(5, dim=1).indices == labels.unsqueeze(1)  # (n, 5), best first
        self.n += len(labels)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())

    def errors(self) -> dict[str, float]:
        """In percent."""
        return {
            "top1_error": 100 * (self.n - self.top1) / self.n,
            "top5_error": 100 * (self.n - self.top5) / self.n,
        }


@contextmanager
def ungated(block: GatedBlock) -> Iterator[None]:
    """The block with its gate replaced by 1."""
    attention, block.se = block.se, None
    try:
        yield
    finally:
        block.se = attention


@torch.inference_mode()
def lesion_study(chain: Chain, batches: Batches) -> tuple[Tally, list[Lesion]]:
    """Errors of the intact model, and with each gate in turn replaced by 1 (paper, Figure 4b).

    Batch by batch: the features that enter a block are computed once, for the intact model; each lesion
    runs from its block on. With B blocks that is B + B (B + 1) / 2 block passes in place of B + B * B.
    """
    intact, tallies = Tally(), [Tally() for _ in chain.blocks]
    for pixels, labels in batches:
        x = chain.stem(pixels)
        for index, block in enumerate(chain.blocks.values()):
            with ungated(block):
                tallies[index].add(chain.logits(x, index), labels)
            x = next(chain.onward(x, index))
        intact.add(chain.tail(x), labels)
    rows = enumerate(zip(chain.blocks, tallies, strict=True), start=1)
    return intact, [
        Lesion(name=f"{name}.se", block=block, stage=stage_of(name), **tally.errors())
        for block, (name, tally) in rows
    ]


def straightening_order(model: nn.Module) -> list[tuple[str, nn.PReLU]]:
    """All PReLUs of the gates' trees, that of the mean slope nearest to 1 first (paper, Figure 5a)."""
    found = [
        (f"{gate}.{name}", layer)
        for gate, tam in gates_of(model).items()
        for name, layer in tam.named_modules()
        if isinstance(layer, nn.PReLU)
    ]
    return sorted(found, key=lambda row: abs(row[1].weight.double().mean().item() - 1))


@torch.inference_mode()
def straightening_study(chain: Chain, model: nn.Module, batches: Batches) -> list[Straightened]:
    """Errors as the trees' PReLUs are set to slope 1, one more each time (paper, Figure 5a).

    A step changes one block: the features before it are those of the step before. The slopes are put back.
    """
    layers, names = straightening_order(model), list(chain.blocks)
    before = [layer.weight.clone() for _, layer in layers]
    places = [names.index(name.partition(".se.")[0]) for name, _ in layers]
    tallies, changes = [Tally() for _ in layers], [0.0] * len(layers)
    for pixels, labels in batches:
        x = chain.stem(pixels)
        features = [x, *chain.onward(x, 0)]  # features[k] enters the block at index k
        trained = chain.tail(features[-1])
        try:
            for step, ((_, layer), place) in enumerate(zip(layers, places, strict=True)):
                layer.weight.fill_(1)
                features[place + 1 :] = chain.onward(features[place], place)
                logits = chain.tail(features[-1])
                tallies[step].add(logits, labels)
                changes[step] = max(changes[step], (logits - trained).abs().max().item())
        finally:
            for (_, layer), slopes in zip(layers, before, strict=True):
                layer.weight.copy_(slopes)
    rows = zip(layers, places, before, tallies, changes, strict=True)
    return [
        Straightened(
            name=name,
            block=place + 1,
            stage=stage_of(name),
            slope=slopes.double().mean().item(),
            **tally.errors(),
            logit_change=change,
        )
        for (name, _), place, slopes, tally, change in rows
    ]


def weight_variances(model: nn.Module, label: str) -> list[WeightVariance]:
    """Variance of the weights of each block's own convolutions, shortcut and attention left out (Figure 5b).

    Args:
        label: What the rows call the model.
    """
    rows = []
    for index, (name, block) in enumerate(blocks_of(model).items(), start=1):
        convolutions = [layer for layer in block.children() if isinstance(layer, nn.Conv2d)]
        weights = torch.cat([layer.weight.detach().flatten() for layer in convolutions])
        variance = weights.double().var(unbiased=False).item()
        rows.append(WeightVariance(model=label, block=index, stage=stage_of(name), variance=variance))
    return rows
