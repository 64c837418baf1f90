"""Freezing makes the moving gates constants and nothing else."""

from dataclasses import replace

import pytest
import timm
import torch

import tamzoo
from tamzoo.checkpoint import load_weights
from tamzoo.freeze import freeze_gates
from tamzoo.gates import gates_of, measure_gates, remember_gates, save_measured


@pytest.fixture
def model(shaken):
    model = shaken(timm.create_model("resnet20_tam.cifar10"))
    for gate in gates_of(model).values():  # no fresh tree is dead enough to be static by chance
        torch.nn.init.normal_(gate.tree[-1].weight)
    torch.nn.init.zeros_(model.layer2[1].se.tree[-1].weight)
    return model


def test_frozen_gates_are_their_means_and_static_ones_stay(model):
    x = torch.randn(6, 3, 32, 32)
    measured, before = (
        measure_gates(model, x),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    frozen = freeze_gates(model, measured)
    assert set(frozen) == set(gates_of(model)) - {"layer2.1.se"}
    for gate, then in zip(measure_gates(model, torch.randn(3, 3, 32, 32) * 9), measured, strict=True):
        assert gate.width == 0
        assert gate.mean == pytest.approx(then.mean, abs=1e-6)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    last = {name: len(gate.tree) - 1 for name, gate in gates_of(model).items()}
    expected = {f"{name}.tree.{last[name]}.{kind}" for name in frozen for kind in ("weight", "bias")}
    assert changed == expected | {"layer2.1.se.measured_gate"}


def test_a_frozen_model_folds_whole(model):
    x = torch.randn(6, 3, 32, 32)
    freeze_gates(model, measure_gates(model, x))
    assert not tamzoo.reparameterize_model(model).fold_report.folded.keys() - {"layer2.1.se"}, "not measured"
    folded = tamzoo.reparameterize_model(model, measure_gates(model, x))
    assert folded.fold_report.kept == {}
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)  # float32, as for any fold


def test_a_tolerance_says_what_moves(model):
    measured = measure_gates(model, torch.randn(6, 3, 32, 32))
    widths = sorted(gate.width for gate in measured)
    assert len(freeze_gates(model, measured, tolerance=widths[4])) == 4


def test_means_that_no_bias_gives_are_refused(model):
    measured = measure_gates(model, torch.randn(6, 3, 32, 32))
    shut = [replace(gate, mean=0.0, min=0.0) for gate in measured]
    with pytest.raises(ValueError, match="layer1.0.se is 0.0 on average; expected a number between 0 and 1"):
        freeze_gates(model, shut)


def test_stored_gates_are_those_of_the_stored_weights(model, tmp_path):
    x = torch.randn(6, 3, 32, 32)
    remember_gates(model, measure_gates(model, x))
    gates = save_measured(tmp_path / "m.safetensors", model, "m", lambda: [x])
    again = timm.create_model("resnet20_tam.cifar10").eval()
    load_weights(again, tmp_path / "m.safetensors", "m")
    assert measure_gates(again, x) == gates
    for stats, gate in zip(gates, gates_of(again).values(), strict=True):
        torch.testing.assert_close(gate.measured_gate, torch.tensor([stats.mean, stats.min, stats.max]))
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]
