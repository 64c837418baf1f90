"""What several rooms' tests need."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tamzoo import hub
from tamzoo.cli import main
from tests.hub_server import loopback


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shaken() -> Callable[[nn.Module], nn.Module]:
    """Gives a model BatchNorm values that a wrong fold trips over, and gates that vary."""

    def shake(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
                nn.init.normal_(module.running_mean, 0.0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            elif isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, -0.2, 0.9)
        return model.eval()

    return shake


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback Hub, for a package that has no weights of its own."""
    monkeypatch.setattr(hub, "CARDS", None)
    with loopback(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def tamzoo(monkeypatch, capsys):
    """Runs a command line: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tamzoo", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return run


def refused(answer, *words):
    """Sees that a command line ended with one sentence and exit code 2."""
    code, out, err = answer
    assert code == 2, (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
