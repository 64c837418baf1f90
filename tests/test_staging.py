"""What is staged is right, and is what a repository will hold."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from tamzoo.catalogue import ENTRIES
from tamzoo.data import Split
from tamzoo.evaluate import evaluate
from tamzoo.staging import check_sample, stage
from tests.standins import stand_in

NAME = "resnet20_tam.cifar10"


def test_only_what_is_right_is_staged(tmp_path):
    with pytest.raises(ValueError, match=r"resnet18_se\.cifar10 has no trained weights yet"):
        stage(replace(ENTRIES["resnet18_se.cifar10"], trained=None), tmp_path, tmp_path)
    entry = stand_in(tmp_path)
    (tmp_path / NAME / "log.csv").unlink()
    with pytest.raises(ValueError, match=r"cannot be published: log\.csv is missing"):
        stage(entry, tmp_path / NAME, tmp_path / "staged")


def test_a_failed_export_stops_the_staging(tmp_path):
    def export(model, path, weights_sha256):
        assert weights_sha256 == entry.trained.sha256
        raise ValueError("the ONNX file differs by 0.5")

    entry = stand_in(tmp_path)
    (tmp_path / "staged").mkdir()
    with pytest.raises(ValueError, match="differs"):
        stage(entry, tmp_path / NAME, tmp_path / "staged", export=export)


def test_the_sample_tells_other_weights_from_the_records(tmp_path):
    entry = stand_in(tmp_path)
    (tmp_path / "staged").mkdir()
    generator = np.random.default_rng(0)
    split = Split(
        pixels=torch.from_numpy(generator.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)),
        labels=torch.from_numpy(generator.integers(0, 10, 40)),
    )
    model = timm.create_model(f"local-dir:{tmp_path / NAME}", pretrained=True).eval()
    score = evaluate(model, split, entry.dataset)
    assert score.top1_error > 50
    check_sample(model, entry, split, score)
    with pytest.raises(ValueError, match=r"the record says 5\.2 %; evaluate them again"):
        stage(entry, tmp_path / NAME, tmp_path / "staged", test_split={entry.dataset: split}.__getitem__)


def test_the_owners_variable_changes_what_is_published_and_not_what_lies_here(tmp_path):
    code = """
import sys
from pathlib import Path
from tamzoo.catalogue import ENTRIES
from tamzoo.staging import stage
from tamzoo.hub import CARDS
from tamzoo.results import results_csv

entry = ENTRIES["wrn10_4_tam.cifar10"]
staged = stage(entry, CARDS / entry.name, Path(sys.argv[1]))
assert staged.repo_id == entry.hub_id == f"me/{entry.name}"
assert f"hf-hub:me/{entry.name}" in (staged.folder / "README.md").read_text()
assert (CARDS.parent / "results.csv").read_text() == results_csv()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env=os.environ | {"TAMZOO_HUB_OWNER": "me"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
