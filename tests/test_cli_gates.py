"""Freezing gates from the command line."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from tamzoo import data
from tamzoo.augment import augment, draw
from tamzoo.catalogue import ENTRIES
from tamzoo.checkpoint import save_weights
from tamzoo.datasets import DATASETS
from tamzoo.gates import gates_of, measure_gates
from tamzoo.recipes import RECIPES
from tests.conftest import refused
from tests.tiny_runs import random_split

ENTRY = "resnet20_tam.cifar10"


@pytest.fixture
def moving(tmp_path, monkeypatch, shaken):
    """Weights whose gates move, and a data set of a few random images."""
    model = shaken(timm.create_model(ENTRY))
    for gate in gates_of(model).values():
        torch.nn.init.normal_(gate.tree[-1].weight)
    save_weights(tmp_path / "moving.safetensors", model.state_dict())
    splits = {"train": random_split(20, 0), "test": random_split(12, 1)}
    monkeypatch.setattr(data, "load_split", lambda folder, dataset, split, progress: splits[split])
    return tmp_path / "moving.safetensors"


def test_freezing_tells_errors_before_and_after_and_stores_static_gates(tamzoo, moving, tmp_path):
    path = tmp_path / "static.safetensors"
    code, out, err = tamzoo("freeze-gates", ENTRY, "--weights", moving, "--data", tmp_path, "-o", path)
    assert code == 0, err
    for words in ("as loaded", "gates frozen", "measured anew", "frozen as 0.", "9 of 9 gates frozen"):
        assert words in out
    model = timm.create_model(ENTRY).eval()
    model.load_state_dict(load_file(path))
    measured = measure_gates(model, torch.randn(4, 3, 32, 32))
    assert [gate.width for gate in measured] == [0.0] * 9
    for stats, gate in zip(measured, gates_of(model).values(), strict=True):
        assert gate.measured_gate.tolist() == pytest.approx([stats.mean] * 3, abs=1e-6)
        assert f"  {stats.name}: width " in out and f", frozen as {stats.mean:.6f}" in out
    # the stem's BatchNorm comes before any gate: as of the training images, augmented by the entry's recipe
    train, dataset, recipe = random_split(20, 0), DATASETS["cifar10"], RECIPES[ENTRIES[ENTRY].trained.recipe]
    draws = draw(20, recipe, dataset, torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.conv1(augment(train.pixels, draws, recipe, dataset))
    torch.testing.assert_close(model.bn1.running_mean, features.mean((0, 2, 3)), atol=2e-3, rtol=2e-3)


def test_what_cannot_be_frozen_is_refused(tamzoo, moving, tmp_path, monkeypatch):
    plain = tmp_path / "plain.safetensors"
    save_weights(plain, timm.create_model("resnet20_plain.cifar10").state_dict())
    out = tmp_path / "static.safetensors"
    options = ("--data", tmp_path, "-o", out)
    monkeypatch.setattr(data, "load_split", None)  # all is seen before any work
    refused(
        tamzoo("freeze-gates", "resnet20_plain.cifar10", "--weights", plain, *options), "has no TAM gates"
    )
    assert not out.exists()
    missing = tmp_path / "no" / "static.safetensors"
    for wrong, told in (
        (missing, f"there is no folder {missing.parent}"),
        (tmp_path, "found a folder"),
        (tmp_path / "static.onnx", "expected an output that ends in .safetensors"),
    ):
        common = ("--weights", moving, "--data", tmp_path)
        refused(tamzoo("freeze-gates", ENTRY, *common, "-o", wrong), told)
