"""Histograms of gates, against mean and variance of each image by numpy."""

import numpy as np
import pytest
import timm
import torch

from tamzoo.attention import CBAM, SE, TAM
from tamzoo.backbones import GatedBlock
from tamzoo.spreads import BINS_A_DECADE, FLAT, MEAN_BINS, SpreadWatch, watched_gates


def reference(gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance of each image."""
    flat = gates.astype(np.float64).reshape(len(gates), -1)
    return flat.mean(1), ((flat - flat.mean(1, keepdims=True)) ** 2).mean(1)


def cell_of(mean: float, variance: float) -> tuple[int, int]:
    column = min(int(mean * MEAN_BINS), MEAN_BINS - 1)
    return column, 0 if variance <= FLAT else 1 + int(np.log10(variance / FLAT) * BINS_A_DECADE)


def check(row, gates: np.ndarray) -> None:
    mean, variance = reference(gates)
    assert row.n == len(gates)
    assert row.mean == pytest.approx(mean.mean()) and row.mean_std == pytest.approx(mean.std(), abs=1e-7)
    assert row.variance_mean == pytest.approx(variance.mean(), rel=1e-5, abs=1e-15)
    assert row.variance_max == pytest.approx(variance.max(), rel=1e-5, abs=1e-15)
    counts: dict[tuple[int, int], int] = {}
    for each in zip(mean, variance, strict=True):
        counts[cell_of(*each)] = counts.get(cell_of(*each), 0) + 1
    assert {(a, b): n for a, b, n in row.cells} == counts
    assert row.flat == sum(variance <= FLAT)


def place(**changes):
    return {"model": "m", "kind": "TAM", "name": "layer1.0.se", "block": 1, "stage": 1} | changes


def test_a_histogram_counts_every_image_where_it_belongs():
    scale = 10.0 ** torch.linspace(-8, -0.5, 40).view(-1, 1, 1, 1)  # variances over fifteen decades
    gates = 0.5 + (torch.rand(40, 1, 4, 4) - 0.5) * scale
    gates[:3] = torch.tensor([0.0, 0.7029573917388916, 1.0]).view(3, 1, 1, 1)  # constants, at the ends too
    watch = SpreadWatch()
    for part in gates.split(7):
        watch(part)
    row = watch.spread(**place())
    check(row, gates.numpy())
    assert row.flat >= 3 and sum(n for *_, n in row.cells) == 40


def test_memory_does_not_grow_with_the_images():
    watch = SpreadWatch()
    watch(torch.rand(2, 1, 4, 4))
    size = watch.counts.nbytes
    for _ in range(50):
        watch(torch.rand(64, 1, 4, 4))
    assert watch.counts.nbytes == size and watch.images == 2 + 50 * 64


def test_a_gate_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="a gate is not finite"):
        SpreadWatch()(torch.full((1, 1, 2, 2), torch.nan))


def gates_by_formula(attention, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gates of one module, written from the papers."""
    if isinstance(attention, TAM):
        return {"TAM": attention.gate(x)}
    if isinstance(attention, SE.func):
        squeezed = x.mean((2, 3), keepdim=True)
        return {"SE": torch.sigmoid(attention.fc2(torch.relu(attention.fc1(squeezed))))}
    channel = attention.channel
    pooled = [x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)]
    gate = torch.sigmoid(sum(channel.fc2(torch.relu(channel.fc1(each))) for each in pooled))
    y = x * gate
    maps = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], dim=1)
    return {"CBAM channel": gate, "CBAM spatial": torch.sigmoid(attention.spatial.conv(maps))}


@pytest.mark.parametrize("attention", ["tam", "se", "cbam"])
def test_gates_of_every_attention_are_seen(attention, shaken):
    model = shaken(timm.create_model(f"resnet20_{attention}.cifar10"))
    seen: dict[tuple[int, str], np.ndarray] = {}
    blocks = [block for block in model.modules() if isinstance(block, GatedBlock)]
    images = torch.randn(9, 3, 32, 32)
    with torch.no_grad():
        hooks = [
            block.se.register_forward_pre_hook(
                lambda module, inputs, index=index: seen.update(
                    {
                        (index, kind): gate.numpy()
                        for kind, gate in gates_by_formula(module, inputs[0]).items()
                    }
                )
            )
            for index, block in enumerate(blocks, start=1)
        ]
        with watched_gates(model, "some run") as spreads:
            model(images)
        rows = spreads()
        for hook in hooks:
            hook.remove()
        model(images[:2])  # no longer watched
    assert spreads()[0].n == 9 and {row.model for row in rows} == {"some run"}
    assert {(row.block, row.kind) for row in rows} == set(seen) and CBAM is not SE
    for row in rows:
        assert row.stage == (row.block - 1) // 3 + 1
        assert row.over_channels == (seen[row.block, row.kind].shape[1] > 1)
        mean, variance = reference(seen[row.block, row.kind])
        assert row.mean == pytest.approx(mean.mean(), rel=1e-6)
        assert row.variance_mean == pytest.approx(variance.mean(), rel=1e-4, abs=1e-12)


def test_a_plain_model_has_nothing_to_watch():
    with watched_gates(timm.create_model("resnet20_plain.cifar10"), "plain") as spreads:
        assert spreads() == []
