import re
import runpy

import pytest
import timm
import torch

from tamzoo import catalogue
from tamzoo.catalogue import BACKBONES, ENTRIES, Backbone, Entry
from tamzoo.datasets import DATASETS, Dataset
from tamzoo.recipes import RECIPES


def test_both_tables_are_whole():
    tables = [entry.paper.table for entry in ENTRIES.values() if entry.paper]
    assert tables.count(1) == 5 * 4 * 2
    assert tables.count(2) == 4 * 3


@pytest.mark.parametrize(("value", "owner"), [("me", "me"), ("", "tamzoo")])
def test_an_empty_owner_counts_as_unset(value, owner, monkeypatch):
    monkeypatch.setenv("TAMZOO_HUB_OWNER", value)
    assert runpy.run_path(catalogue.__file__)["HUB_OWNER"] == owner


def test_data_on_the_hub_are_pinned_to_a_commit():
    hosted = [dataset for dataset in DATASETS.values() if dataset.hub_id]
    assert {dataset.tag for dataset in hosted} >= {"cifar10", "cifar100", "svhn"}
    assert all(re.fullmatch("[0-9a-f]{40}", dataset.hub_revision) for dataset in hosted)


@pytest.mark.parametrize(
    "entry",
    [entry for entry in ENTRIES.values() if entry.paper and entry.paper.params_m],
    ids=lambda entry: entry.name,
)
def test_parameter_counts_match_the_tables(entry):
    assert entry.paper and entry.paper.params_m
    if entry.attention != "tam":
        assert abs(entry.params / 1e6 - entry.paper.params_m) <= 0.01
        return
    # Eq. 2's tree has 4c - 5 parameters; the paper's figure for TAM is not reachable from it
    backbone = entry.backbone
    expansion = 4 if backbone.block == "bottleneck" else 1
    trees = sum(
        blocks * (4 * c * expansion - 5) for blocks, c in zip(backbone.layers, backbone.channels, strict=True)
    )
    assert entry.params == ENTRIES[entry.name.replace("_tam", "_plain")].params + trees
    assert entry.params / 1e6 < entry.paper.params_m + 0.01


@pytest.mark.parametrize(
    "name", ["resnet18_plain", "resnet50_plain", "wrn16_8_plain", "resnext50_32x4d_plain"]
)
def test_flops_match_the_table(name):
    from torch.utils.flop_counter import FlopCounterMode

    entry = ENTRIES[f"{name}.cifar100"]
    assert entry.paper and entry.paper.flops_g
    with torch.device("meta"):
        model = timm.create_model(entry.name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    multiply_accumulates = counter.get_total_flops() / 2
    # the table's unit is 2**30 and some of its cells count more than convolutions
    assert multiply_accumulates / 2**30 == pytest.approx(entry.paper.flops_g, rel=0.02)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_every_row_builds_as_its_data_set_wants(entry):
    with torch.device("meta"):
        model = timm.create_model(entry.name).eval()
        assert model(torch.empty(2, *entry.dataset.input_size)).shape == (2, entry.dataset.num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.params
    assert model.num_features == entry.backbone.num_features


@pytest.mark.parametrize(
    "name",
    [
        f"{backbone}_{attention}.cifar10"
        for backbone in ("resnet20", "wrn10_4", "resnet18", "resnext50_32x4d")
        for attention in ("plain", "se", "cbam", "tam", "scalar")
    ],
)
def test_every_parameter_gets_a_gradient(name):
    model = timm.create_model(name)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_rows_check_themselves():
    with pytest.raises(ValueError, match="3 classes, but 2 names"):
        Dataset(
            tag="x",
            title="x",
            num_classes=3,
            class_names=("a", "b"),
            input_size=(3, 8, 8),
            stem="3x3",
            mean=(),
            std=(),
        )
    with pytest.raises(ValueError, match="2 stages of blocks, 1 widths"):
        Backbone(name="x", title="x", block="basic", layers=(1, 1), channels=(8,))
    with pytest.raises(ValueError, match="attention must be one of"):
        Entry(backbone=BACKBONES["resnet18"], attention="eca", dataset=DATASETS["cifar10"], params=0)


def test_trained_rows_name_a_recipe():
    assert all(entry.trained.recipe in RECIPES for entry in ENTRIES.values() if entry.trained)
