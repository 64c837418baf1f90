"""Every trained entry: published by one command, then loaded by several loaders where nothing is cached."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tamzoo.catalogue import ENTRIES
from tamzoo.cli import app
from tests.hub_server import loopback

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # raised inside httpx
ROOT = Path(__file__).parent.parent
TRAINED = [name for name, entry in ENTRIES.items() if entry.trained]

# Runs where the package has no weights of its own and the cache is empty; prints what each loader answers.
LOADERS = """
import json, sys
import numpy, onnxruntime, timm, torch
from huggingface_hub import hf_hub_download
from transformers import TimmWrapperForImageClassification
from tamzoo import hub
hub.CARDS = None
import tamzoo

name = sys.argv[1]
repo = tamzoo.registry.ENTRIES[name].hub_id
image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
answers = {}
with torch.inference_mode():
    answers["timm"] = timm.create_model(name, pretrained=True).eval()(image)
    answers["hf-hub"] = timm.create_model(f"hf-hub:{repo}", pretrained=True).eval()(image)
    model, tag = name.split(".")
    loaded = torch.hub.load(sys.argv[2], model, source="local", pretrained=True, tag=tag)
    answers["torch.hub"] = loaded.eval()(image)
    session = onnxruntime.InferenceSession(hf_hub_download(repo, "onnx/model.onnx"))
    answers["onnxruntime"] = session.run(None, {"pixel_values": image.numpy()})[0]
    # which would compute in the file's float16
    wrapped = TimmWrapperForImageClassification.from_pretrained(repo).float().eval()
    answers["transformers"] = wrapped(image).logits
answers["labels"] = list(wrapped.config.id2label.values())
print(json.dumps({k: v if isinstance(v, list) else numpy.asarray(v)[0].tolist() for k, v in answers.items()}))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A loopback Hub after `tamzoo publish --all`, and an environment that has it as the only Hub."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, loopback(folder, patch) as server:
        patch.setenv("HF_TOKEN", "hf_writer")
        patch.delenv("TAMZOO_DATA", raising=False)
        told = CliRunner().invoke(app, ["publish", "--all"])
        assert told.exit_code == 0, told.output + repr(told.exception)
        assert sorted(server.store.repos()) == sorted(ENTRIES[name].hub_id for name in TRAINED)
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        yield environment | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("name", TRAINED)
def test_every_loader_gives_the_golden_logits(name, published, tmp_path):
    environment = published | {"HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LOADERS, name, str(ROOT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    golden = json.loads((ROOT / "model_cards" / name / "config.json").read_text())["golden_logits"]
    class_names = ENTRIES[name].dataset.class_names
    assert class_names and tuple(answers.pop("labels")) == class_names
    assert set(answers) == {"timm", "hf-hub", "torch.hub", "onnxruntime", "transformers"}
    for loader, logits in answers.items():
        assert logits == pytest.approx(golden, abs=1e-3), loader  # the parity that an export promises
    assert list(tmp_path.rglob("model.safetensors")), "it came from the Hub"
