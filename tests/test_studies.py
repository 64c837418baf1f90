"""Studies that start in the middle of a network, against whole networks run from the pixels."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from tamzoo.backbones import GatedBlock
from tamzoo.gates import gates_of
from tamzoo.studies import (
    Chain,
    Tally,
    lesion_study,
    straightening_order,
    straightening_study,
    ungated,
    weight_variances,
)

IMAGES, LABELS = 12, torch.arange(12) % 10


@pytest.fixture(params=["resnet20_tam.cifar10", "wrn10_4_tam.cifar10"])
def model(request, shaken):
    return shaken(timm.create_model(request.param))


def batches():
    images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return list(zip(images.split(5), LABELS.split(5), strict=True))  # the last one is smaller


@torch.no_grad()
def naive_errors(model: nn.Module) -> tuple[float, ...]:
    """Top-1 and top-5 error in percent of the whole model, by sorting."""
    ranks = []
    for images, labels in batches():
        order = model(images).argsort(dim=1, descending=True)
        ranks += (order == labels[:, None]).int().argmax(1).tolist()
    return tuple(100 * sum(rank >= k for rank in ranks) / len(ranks) for k in (1, 5))


def errors(row) -> tuple[float, ...]:
    return row.top1_error, row.top5_error


@torch.inference_mode()
def test_a_chain_is_the_model_from_any_block_on(model):
    chain, (images, _) = Chain(model), batches()[0]
    x, whole = chain.stem(images), model(images)
    for index in range(len(chain.blocks)):
        assert torch.equal(chain.logits(x, index), whole)
        x = next(chain.onward(x, index))
    assert torch.equal(chain.logits(x, len(chain.blocks)), whole)


def test_lesions_equal_those_of_whole_networks(model):
    chain = Chain(model)
    intact, lesions = lesion_study(chain, batches())
    assert tuple(intact.errors().values()) == naive_errors(model)
    names = [name for name, block in model.named_modules() if isinstance(block, GatedBlock)]
    assert [row.name for row in lesions] == [f"{name}.se" for name in names]
    assert [row.block for row in lesions] == list(range(1, len(names) + 1))
    for name, row in zip(names, lesions, strict=True):
        other = deepcopy(model)
        other.get_submodule(name).se = nn.Identity()  # times 1
        assert errors(row) == naive_errors(other)
    assert all(block.se is not None for block in chain.blocks.values())


@torch.inference_mode()
def test_a_lesion_with_its_prefix_reused_has_the_very_logits_of_one_without(model):
    chain, (images, _) = Chain(model), batches()[0]
    x, whole = chain.stem(images), model(images)
    for index, (name, block) in enumerate(chain.blocks.items()):
        other = deepcopy(model)
        other.get_submodule(name).se = nn.Identity()
        with ungated(block):
            found = chain.logits(x, index)
        assert torch.equal(found, other(images)) and not torch.equal(found, whole)
        x = next(chain.onward(x, index))


def test_lesions_run_no_block_twice_on_the_same_features(model):
    runs = []
    blocks = [block for block in model.modules() if isinstance(block, GatedBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda block, inputs: runs.append(block))
    lesion_study(Chain(model), batches())
    n = len(blocks)
    assert len(runs) == len(batches()) * (n + n * (n + 1) // 2)


def test_straightened_trees_equal_those_of_whole_networks(model):
    nn.init.constant_(model.layer1[0].se.tree[1].weight, 1.7)  # the others are below 1
    before = deepcopy(model.state_dict())
    steps = straightening_study(Chain(model), model, batches())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    slopes = {
        name: layer.weight.mean().item()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.PReLU)
    }
    assert [row.name for row in steps] == sorted(slopes, key=lambda name: abs(slopes[name] - 1))
    other = deepcopy(model)
    with torch.no_grad():
        trained = [model(images) for images, _ in batches()]
        for row in (steps[0], steps[len(steps) // 2], steps[-1]):
            done = steps[: steps.index(row) + 1]
            for each in done:
                other.get_submodule(each.name).weight.fill_(1.0)
            assert errors(row) == naive_errors(other)
            changed = [other(images) for images, _ in batches()]
            apart = max((a - b).abs().max().item() for a, b in zip(changed, trained, strict=True))
            assert row.logit_change == apart
    assert steps[-1].logit_change > 0
    assert steps[0].slope == pytest.approx(slopes[steps[0].name])


def test_every_prelu_of_the_trees_is_straightened_once(model):
    found = [name for name, _ in straightening_order(model)]
    assert len(found) == len(set(found))
    assert len(found) == sum(
        isinstance(layer, nn.PReLU) for gate in gates_of(model).values() for layer in gate.tree
    )


def test_slopes_are_put_back_where_the_study_fails(model):
    before = deepcopy(model.state_dict())
    short = [(batches()[0][0], torch.zeros(3, dtype=torch.int64))]  # labels of other images
    with pytest.raises(RuntimeError):
        straightening_study(Chain(model), model, short)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_gate_is_put_back_where_the_study_fails(model):
    short = [(batches()[0][0], torch.zeros(3, dtype=torch.int64))]
    with pytest.raises(RuntimeError):
        lesion_study(Chain(model), short)
    assert all(block.se is not None for block in model.modules() if isinstance(block, GatedBlock))


def test_weight_variances_leave_shortcut_and_attention_out(model):
    for row, (name, block) in zip(
        weight_variances(model, "a"),
        [(name, block) for name, block in model.named_modules() if isinstance(block, GatedBlock)],
        strict=True,
    ):
        weights = torch.cat([block.conv1.weight.flatten(), block.conv2.weight.flatten()]).double()
        expected = ((weights - weights.mean()) ** 2).mean().item()
        assert row.variance == pytest.approx(expected, rel=1e-12) and row.model == "a"
        assert f"layer{row.stage}." in f"{name}."


def test_a_study_wants_eval_mode(model):
    with pytest.raises(ValueError, match="call model.eval"):
        Chain(model.train())


def test_a_tally_counts_what_sorting_counts():
    tally, logits, labels = Tally(), torch.randn(50, 10), torch.randint(0, 10, (50,))
    tally.add(logits[:20], labels[:20])
    tally.add(logits[20:], labels[20:])
    ranks = (logits.argsort(descending=True) == labels[:, None]).int().argmax(1)
    expected = {f"top{k}_error": 100 * (ranks >= k).sum().item() / 50 for k in (1, 5)}
    assert tally.errors() == pytest.approx(expected)
