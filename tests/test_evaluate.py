"""The numbers that are published, against the same from loops over images."""

import math

import pytest
import torch

from tamzoo.datasets import DATASETS
from tamzoo.evaluate import score_of


def test_a_score_is_what_its_definitions_say():
    n, classes = 2000, 10
    logits, labels = 2 * torch.randn(n, classes), torch.randint(0, classes, (n,))
    labels[:1000] = logits[:1000].argmax(1)
    ranks, loss = [], 0.0
    bins: list[list[float]] = [[] for _ in range(15)]  # (0, 1/15], ...: confidence, less 1 where right
    for row, label in zip(logits.double().softmax(1).tolist(), labels.tolist(), strict=True):
        ranks.append(sum(share > row[label] for share in row))
        loss -= math.log(row[label]) / n
        bins[math.ceil(max(row) * 15) - 1].append(max(row) - (ranks[-1] == 0))
    assert all(bins[2:]) and len(set(ranks)) == classes
    found = score_of(logits, labels, DATASETS["cifar10"], "a note")
    assert (found.n, found.dataset, found.data_note) == (n, "cifar10", "a note")
    assert found.top1_error == pytest.approx(100 * sum(rank >= 1 for rank in ranks) / n)
    assert found.top5_error == pytest.approx(100 * sum(rank >= 5 for rank in ranks) / n)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.calibration_error == pytest.approx(100 * sum(abs(sum(each)) for each in bins) / n, rel=1e-5)
