"""The checkpoint that the clone and the wheel carry."""

import sys
from pathlib import Path

import pytest
import timm
import torch

import tamzoo
from tamzoo.cli import main
from tamzoo.data import normalise
from tamzoo.datasets import DATASETS
from tamzoo.gates import gates_of
from tamzoo.images import PICTURES, random_crops
from tamzoo.predict import open_classifier, predict, torch_classifier
from tamzoo.results import record_of
from tamzoo.terminal import DEMO_ENTRY

CIFAR10 = DATASETS["cifar10"]


@pytest.fixture(scope="module")
def model():
    return timm.create_model(DEMO_ENTRY, pretrained=True).eval()


def test_a_cat_is_a_cat(model):
    ((best, *_),) = predict(torch_classifier(model), [PICTURES / "cat.jpg"])
    assert best[0] == "cat"


def test_it_folds_without_data_and_answers_as_before(model):
    folded = tamzoo.reparameterize_model(model)
    assert folded.fold_report.kept == {}
    x = normalise(random_crops(64, 32), CIFAR10)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-3)


def test_its_gates_measure_as_the_record_says(model):
    recorded = record_of(tamzoo.catalogue.ENTRIES[DEMO_ENTRY]).gates
    measured = tamzoo.measure_gates(model, normalise(random_crops(64, 32), CIFAR10))
    for a, b in zip(measured, recorded, strict=True):
        assert a.name == b.name and a.mean == pytest.approx(b.mean, abs=1e-4)


@pytest.mark.parametrize(
    "changes", [{"num_classes": 3}, {"in_chans": 1}, {"features_only": True}, {"global_pool": "max"}]
)
def test_its_weights_fit_adapted_models(changes):
    model = timm.create_model(DEMO_ENTRY, pretrained=True, **changes).eval()
    fresh = timm.create_model(DEMO_ENTRY, **changes).eval()
    x = torch.randn(2, changes.get("in_chans", 3), 32, 32)
    found, other = model(x), fresh(x)
    same = found.shape == other.shape if isinstance(found, torch.Tensor) else len(found) == len(other)
    assert same
    assert gates_of(model) and all(gate.measured_gate[1] > 0 for gate in gates_of(model).values())


def test_demo_shows_the_main_job(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tamzoo", "demo"])
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    out = capsys.readouterr().out
    for words in (
        "cat.jpg        cat",
        "8 of 8 gates folded, 8 of them proven",
        "same top-1 on 256",
        "TAM folded",
        "of plain",
    ):
        assert words in out, out


def test_the_readmes_python_runs(monkeypatch, capsys, tmp_path):
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    text = (root / "README.md").read_text()
    space = {"images": torch.randn(8, 3, 32, 32)}
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 5
    for block in blocks:
        exec(block.replace('"mine.onnx"', repr(f"{tmp_path}/mine.onnx")), space)
    assert list(open_classifier(tmp_path / "mine.onnx").labels or ()) == ["a", "b", "c", "d", "e"]
    assert "8 of 8 gates folded" in capsys.readouterr().out
