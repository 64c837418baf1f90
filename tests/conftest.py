"""What several rooms' tests need."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tamzoo import hub
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
