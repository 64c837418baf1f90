import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tamzoo.registry import MODELS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A clone where torch.hub keeps those that it fetched from GitHub."""
    clone = tmp_path / "OWNER_tamzoo_main"
    clone.mkdir()
    shutil.copy(ROOT / "hubconf.py", clone)
    shutil.copytree(ROOT / "tamzoo", clone / "tamzoo", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return "OWNER/tamzoo:main"


def test_the_list_is_the_models_and_nothing_else(downloaded):
    assert sorted(torch.hub.list(downloaded, trust_repo=True, verbose=False)) == sorted(MODELS)


def test_help_names_the_arguments(downloaded):
    text = torch.hub.help(downloaded, "resnet50_tam", trust_repo=True)
    assert "ResNet-50" in text and all(word in text for word in ("pretrained:", "tag:", "num_classes:"))


def test_loading_takes_a_tag_and_a_number_of_classes(downloaded):
    model = torch.hub.load(downloaded, "resnet18_tam", tag="svhn", trust_repo=True, verbose=False)
    assert model.num_classes == 10 and model.pretrained_cfg["tag"] == "svhn"
    model = torch.hub.load(str(ROOT), "resnet18_tam", source="local", num_classes=7)
    assert model.num_classes == 7
    with pytest.raises(ValueError, match="has no tag 'cifar11'"):
        torch.hub.load(str(ROOT), "resnet18_tam", source="local", tag="cifar11")


def test_a_missing_dependency_is_named(tmp_path):
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "timm": raise ModuleNotFoundError("No module named 'timm'", name=name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "timm" else found(name, *rest)
import torch
torch.hub.load({str(ROOT)!r}, "resnet18_tam", source="local")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode and "tamzoo needs timm; pip install timm" in found.stderr
