"""The paper's recipe, line by line (sections 3.2 and 3.3), and what every row keeps to."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tamzoo.augment import draw
from tamzoo.catalogue import ENTRIES
from tamzoo.datasets import DATASETS
from tamzoo.distributed import World
from tamzoo.learner import Learner
from tamzoo.recipes import PAPER, PAPER_SVHN, RECIPES, SHORT, recipe_for

STEPS_PER_EPOCH = 391  # 50,000 images in batches of 128


def lr_of_epoch(recipe, epoch, step=0):
    return recipe.lr_at((epoch * STEPS_PER_EPOCH + step) / (recipe.epochs * STEPS_PER_EPOCH))


@pytest.mark.parametrize(
    ("recipe", "epoch", "lr"),
    [
        *(
            (PAPER, *row)
            for row in [(0, 0.1), (149, 0.1), (150, 0.01), (224, 0.01), (225, 0.001), (299, 0.001)]
        ),
        *((PAPER_SVHN, *row) for row in [(0, 0.1), (79, 0.1), (80, 0.01), (119, 0.01), (120, 0.001)]),
        (PAPER_SVHN, 159, 0.001),
    ],
)
def test_the_papers_learning_rate_drops_where_it_says(recipe, epoch, lr):
    for step in (0, 1, STEPS_PER_EPOCH - 1):  # constant within an epoch
        assert lr_of_epoch(recipe, epoch, step) == pytest.approx(lr, rel=1e-12)


def test_the_papers_other_numbers():
    for recipe in (PAPER, PAPER_SVHN):
        assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (128, 0.9, 1e-4)
        assert not recipe.nesterov
        assert recipe.label_smoothing == recipe.cutout == recipe.ema_decay == 0
    assert (PAPER.epochs, PAPER.crop_padding, PAPER.flip) == (300, 4, True)
    assert (PAPER_SVHN.epochs, PAPER_SVHN.crop_padding, PAPER_SVHN.flip) == (160, 0, False)


@pytest.mark.parametrize("recipe", [PAPER, SHORT])
def test_the_optimiser_is_the_recipes_and_decays_every_parameter(recipe):
    world = World(device=torch.device("cpu"))
    entry = ENTRIES["resnet20_tam.cifar10"]
    learner = Learner(entry, recipe, seed=0, precision="float32", compiled="no", world=world)
    assert type(learner.optimizer) is torch.optim.SGD
    (group,) = learner.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in learner.model.parameters()}
    slopes = [m.weight for m in learner.model.modules() if isinstance(m, nn.PReLU)]
    assert slopes and {id(p) for p in slopes} <= {id(p) for p in group["params"]}
    found = (group["weight_decay"], group["momentum"], group["nesterov"], group["dampening"], group["lr"])
    assert found == (recipe.weight_decay, 0.9, recipe.nesterov, 0, recipe.lr)


def test_crops_flips_and_cutouts_are_uniform():
    n = 90_000
    draws = draw(n, PAPER, DATASETS["cifar10"], torch.Generator().manual_seed(0))
    # each of 9 offsets 10,000 times, standard deviation 94; flips 45,000, standard deviation 150
    for column in (0, 1):
        counts = draws[:, column].bincount(minlength=9)
        assert len(counts) == 9 and (counts - n / 9).abs().max() < 5 * 94
    assert abs(draws[:, 2].sum().item() - n / 2) < 5 * 150
    for column in (3, 4):  # centres of the cut-out: each of 32 2,812 times, standard deviation 52
        counts = draws[:, column].bincount(minlength=32)
        assert len(counts) == 32 and (counts - n / 32).abs().max() < 5 * 52
    assert torch.corrcoef(draws.T.double()).fill_diagonal_(0).abs().max() < 0.02
    still = draw(1000, PAPER_SVHN, DATASETS["svhn"], torch.Generator().manual_seed(0))
    assert not still[:, :3].any()


def test_a_data_sets_own_variant_is_found():
    assert recipe_for("paper", "svhn") is PAPER_SVHN
    assert recipe_for("paper", "cifar10") is PAPER
    assert not any(recipe_for(name.removesuffix("-svhn"), "svhn").flip for name in RECIPES)
    with pytest.raises(ValueError, match="no recipe 'papr'; expected one of paper"):
        recipe_for("papr", "cifar10")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr_points": ((0.0, 1.0), (0.5, 0.1))}, "must rise from fraction 0.0 to 1.0"),
        ({"epochs": 0}, "must be positive"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"small_until": 1.0, "small_side": 24}, "small_until must be in"),
        ({"small_until": 0.5}, "with a positive small_side, got 0.5 and 0"),
    ],
)
def test_a_wrong_row_says_so(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **wrong)


def test_a_short_cycle_rises_and_falls():
    rates = [SHORT.lr_at(step / 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert peak == 200 and max(rates) == pytest.approx(SHORT.lr)
    assert rates[:201] == sorted(rates[:201]) and rates[200:] == sorted(rates[200:], reverse=True)
    assert rates[-1] < 0.002 * SHORT.lr
