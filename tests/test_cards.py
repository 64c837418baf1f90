"""Model cards: rendered from rows and records only, valid, and what timm's own loaders take."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml, parse_eval_result_entries
from timm.models import get_pretrained_cfg

from tamzoo import hub
from tamzoo.cards import card_files, config_json, eval_results, render_card
from tamzoo.catalogue import ENTRIES
from tamzoo.records import read_record
from tamzoo.verify import stored_analysis, stored_golden, stored_run, verify_folder, write_cards
from tests.hub_server import client_validates_anywhere, running_hub
from tests.standins import a_record, draw, stand_in

NAMES = list(ENTRIES)
TRAINED = [name for name, entry in ENTRIES.items() if entry.trained]
CARDS = Path(__file__).parent.parent / "model_cards"


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_there_is_a_folder_for_every_entry_and_no_other():
    assert {path.name for path in CARDS.iterdir() if path.is_dir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_card_equals_its_rendering(name):
    folder, record = CARDS / name, None
    if ENTRIES[name].trained:
        record = read_record(folder / "record.json")
    analysis, run = stored_analysis(folder), stored_run(ENTRIES[name], folder)
    files = card_files(ENTRIES[name], record, stored_golden(folder), analysis=analysis, run=run)
    for path, text in files.items():
        assert (CARDS / name / path).read_bytes() == text.encode()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_its_model_and_agrees_with_timm(name):
    entry, config = ENTRIES[name], json.loads((CARDS / name / "config.json").read_text())
    with torch.device("meta"):
        model = timm.create_model(f"local-dir:{CARDS / name}")
    assert (model.num_classes, model.num_features) == (config["num_classes"], config["num_features"])
    assert model.conv1.stride == (1, 1) and config["architecture"] == entry.model
    cfg = json.loads(json.dumps(get_pretrained_cfg(name).to_dict(remove_source=True)))  # pyright: ignore
    ours = config["pretrained_cfg"] | {key: config[key] for key in ("label_names", "architecture")}
    assert cfg.pop("pool_size") is None  # timm's own default, always listed
    assert ours == cfg


@client_validates_anywhere
def test_every_card_is_valid_on_the_hub(tmp_path, monkeypatch):
    with running_hub(tmp_path) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        for name in NAMES:
            ModelCard(render_card(ENTRIES[name])).validate()
            ModelCard(render_card(ENTRIES[name], a_record(ENTRIES[name]))).validate()


@pytest.mark.parametrize("name", [name for name in NAMES if not (CARDS / name / "record.json").exists()])
def test_an_untrained_card_says_so_first_and_claims_nothing(name):
    text = (CARDS / name / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    assert body.split("\n\n")[1].startswith("**Not trained.**")
    front = front_matter(text)
    assert "untrained" in front["tags"]
    assert not {"model-index", "metrics", "datasets"} & front.keys()
    assert "pretrained=True" not in text and "hf-hub:" not in text


def test_a_card_without_weights_tells_of_the_run_that_had_some(tmp_path):
    entry = ENTRIES["resnet50_se.cifar10"]
    folder, run = tmp_path / entry.name, a_record(entry)
    write_cards(tmp_path, [entry])
    (folder / "record.json").write_text(run.to_json())
    assert verify_folder(entry, folder) == ["README.md is not what the catalogue and the record render to"]
    assert write_cards(tmp_path, [entry]) == [folder / "README.md"] and verify_folder(entry, folder) == []
    text = (folder / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    assert body.split("\n\n")[1].startswith("**No weights.**") and "5.25 % top-1 and 0.25 % top-5" in body
    assert f"tamzoo train {entry.name} --recipe short --epochs 30" in body and "pretrained=True" not in text
    (folder / "record.json").write_text("{}")
    assert "expected a training record" in verify_folder(entry, folder)[0]
    with pytest.raises(ValueError, match="the run is of"):
        render_card(ENTRIES["resnet50_se.cifar100"], run=run)


@pytest.mark.parametrize("name", ["resnet50_cbam.cifar100", "wrn16_8_tam.svhn", "wrn10_4_tam.cifar10"])
def test_a_trained_card_shows_ours_beside_the_papers(name):
    entry = ENTRIES[name]
    text = render_card(entry, a_record(entry))
    data = ModelCard(text).data  # huggingface_hub's own reading of model-index
    assert isinstance(data, ModelCardData)
    results = data.eval_results
    assert results is not None and results[0].metric_value == 94.75
    assert results[0].dataset_type == entry.dataset.hub_id
    assert "5.25 %" in text and "last epoch" in text and "23 of 10000 test images" in text
    if entry.paper:
        assert f"| paper, Table {entry.paper.table} | {entry.paper.top1_error:.2f} % |" in text
    assert ("non-commercial" in text) == (entry.dataset.tag == "svhn")
    assert ("## Gates" in text) == (entry.attention == "tam")
    assert ("parameters more than its Eq. 2 has" in text) == (name == "resnet50_tam.cifar100")
    assert "$" not in text


def test_a_card_tells_of_schedule_and_regularisation():
    entry = ENTRIES["resnet50_tam.cifar100"]
    short, paper = (render_card(entry, a_record(entry, recipe=recipe)) for recipe in ("short", "paper"))
    assert "| learning rate | 0.06 at 0%, 0.6 at 20%, 0 at 100% of the training, linear" in short
    assert (
        "| regularisation | crops of images padded by 4 pixels, flips, squares of 8 pixels cut out, labels "
        "smoothed by 0.1, weights averaged over steps (decay 0.995) |" in short
    )
    assert "| learning rate | 0.1 at 0%, 0.1 at 50%, 0.01 at 50%, 0.01 at 75%, 0.001 at 75%" in paper
    assert "| regularisation | crops of images padded by 4 pixels, flips |" in paper


def test_a_card_tells_of_training_on_small_images():
    entry = ENTRIES["resnet50_tam.cifar100"]
    text = render_card(entry, a_record(entry, recipe="progressive-cpu"))
    assert "| recipe | progressive-cpu, 30 epochs, batch 128, the first 70% on images of 24 pixels |" in text
    assert "| recipe | short, 30 epochs, batch 512 |" in render_card(entry, a_record(entry))


def test_a_card_tells_of_the_run_whose_weights_it_began_with():
    entry = ENTRIES["resnet18_tam.cifar10"]
    first, second = a_record(entry, "1" * 64, "short-cpu"), a_record(entry, recipe="restart-cpu")
    text = render_card(entry, replace(second, epochs=5, start=first))
    assert "| began with | the weights of a run of short-cpu, 30 epochs, batch 128 (top-1 error" in text
    assert f"SHA-256 `{'1' * 64}`) |" in text
    same = "--seed 0 --precision float32"
    assert (
        f"`tamzoo train {entry.name} --recipe short-cpu --epochs 30 {same} --data DIR --out DIR1`, "
        f"then `tamzoo train {entry.name} --recipe restart-cpu --epochs 5 {same} "
        "--initial-checkpoint DIR1 --data DIR --out DIR2`" in text
    )
    assert "began with" not in render_card(entry, first)
    other = a_record(ENTRIES["resnet18_tam.cifar100"], recipe="short")
    text = render_card(entry, replace(second, start=other))
    assert (
        "| began with | the weights, but for the head, of a run of resnet18_tam.cifar100, short, 30" in text
    )
    assert "`tamzoo train resnet18_tam.cifar100 --recipe short" in text
    assert "datasets:\n- uoft-cs/cifar100\n- uoft-cs/cifar10\nmetrics" in text
    assert "Trained on CIFAR-100, then CIFAR-10; one of" in text
    assert (
        "- CIFAR-100 is published without a licence; ask its authors before commercial use. CIFAR-10 is"
        in text
    )


def test_the_owner_is_the_one_that_publishes():
    entry = ENTRIES[NAMES[0]]
    text = render_card(entry, a_record(entry), owner="someone")
    assert f'"hf-hub:someone/{entry.name}"' in text
    told = 'import os\n\nos.environ["TAMZOO_HUB_OWNER"] = "someone"  # before tamzoo is imported\n\nimport t'
    assert text.count(told) == 2
    assert (
        "github.com/someone/tamzoo" in text and "tamzoo/tamzoo" not in text
    )  # whose code is fetched and run
    assert "TAMZOO_HUB_OWNER" not in render_card(entry, a_record(entry))


def test_a_record_of_another_entry_is_refused():
    with pytest.raises(ValueError, match=r"resnet50_se\.cifar10: the record is of resnet18_tam\.cifar10"):
        render_card(ENTRIES["resnet50_se.cifar10"], a_record(ENTRIES["resnet18_tam.cifar10"]))


def test_evaluation_results_are_in_the_hubs_form():
    entry = ENTRIES["resnet18_tam.cifar100"]
    text = eval_results(entry, a_record(entry))
    (found,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (found.dataset_id, found.value) == ("uoft-cs/cifar100", 94.75)
    assert eval_result_entries_to_yaml([found]) == yaml.safe_load(text)


def test_a_trained_folder_loads_with_gates_and_golden_logits(tmp_path):
    entry = stand_in(tmp_path)
    folder = tmp_path / entry.name
    assert verify_folder(entry, folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert len(config["golden_logits"]) == 10 and config["gates"][0]["name"] == "layer1.0.se"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert cast(dict, model.pretrained_cfg)["label_names"][0] == "airplane"
    assert write_cards(tmp_path, [entry], draw) == []
    text = config_json(entry, golden=[1.0])
    assert json.loads(text)["golden_logits"] == [1.0]


def test_the_picture_of_the_gates_follows_the_weights(tmp_path):
    entry, drawn = stand_in(tmp_path), []
    write_cards(tmp_path, [entry], lambda gates, path: drawn.append(path))
    assert drawn == []
    other = stand_in(tmp_path / "other", seed=1)
    for path in ("model.safetensors", "record.json"):
        (tmp_path / "other" / entry.name / path).replace(tmp_path / entry.name / path)
    write_cards(tmp_path, [other], lambda gates, path: drawn.append(path))
    assert drawn == [tmp_path / other.name / "gates.png"]


def test_a_drawing_that_failed_is_drawn_by_the_next_call(tmp_path):
    entry, drawn = stand_in(tmp_path), []
    config = tmp_path / entry.name / "config.json"
    config.write_text(config.read_text().replace('"mean"', '"Mean"'))  # as of other weights
    with pytest.raises(ZeroDivisionError):
        write_cards(tmp_path, [entry], lambda gates, path: 1 / 0)
    write_cards(tmp_path, [entry], lambda gates, path: drawn.append(path))
    assert drawn == [tmp_path / entry.name / "gates.png"] and verify_folder(entry, config.parent) == []


@pytest.mark.parametrize(
    ("path", "change", "problem"),
    [
        ("README.md", lambda text: text + b" ", "README.md is not what"),
        ("config.json", lambda text: text.replace(b"0.4914", b"0.4915"), "config.json is not what"),
        ("config.json", lambda text: re.sub(rb'_logits": \[\n +', b"\\g<0>9", text), "golden logits are off"),
        (
            "config.json",
            lambda text: re.sub(rb'(_logits": \[\n +)[^,]+', rb"\1NaN", text),
            "golden logits are off",
        ),
        (
            "config.json",
            lambda text: re.sub(rb"\S+(\n +\]\n\}\n)$", rb"NaN\1", text),
            "golden logits are off",
        ),
        ("config.json", lambda text: b"[]", "config.json is not what"),
        ("config.json", lambda text: b'{"golden_logits": 3}', "config.json is not what"),
        ("record.json", lambda text: b"{}", "expected a training record"),
        (".eval_results/cifar10.yaml", None, "cifar10.yaml is not what"),
        ("log.csv", None, "log.csv is missing"),
        ("gates.png", None, "gates.png is missing"),
        ("model.safetensors", lambda text: text[:-1] + b"\x00", "model.safetensors: SHA-256 is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_folder_is_found_out(tmp_path, path, change, problem):
    entry = stand_in(tmp_path)
    file = tmp_path / entry.name / path
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    assert problem in "; ".join(verify_folder(entry, tmp_path / entry.name))


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_snippets(entry, folder: Path, monkeypatch, tmp_path) -> None:
    """Executes a card's snippets, the Hub's files served from `folder`."""
    from tamzoo.images import PICTURES
    from tamzoo.onnx_export import export_entry

    monkeypatch.chdir(tmp_path)
    shutil.copy(PICTURES / "coffee.jpg", "photo.png")  # wider than high: preprocessing shows
    file, clone = tmp_path / "model.onnx", str(Path(__file__).parent.parent)
    export_entry(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), file)
    for code in snippets((folder / "README.md").read_text()):
        code = code.replace(f'"hf-hub:{entry.hub_id}"', repr(f"local-dir:{folder}"))
        code = code.replace('"tamzoo/tamzoo"', repr(clone))
        code = code.replace("trust_repo=True", "source='local', trust_repo=True")
        code = re.sub(r"hf_hub_download\(.*?\)", repr(str(file)), code)
        exec(compile(code, f"card of {entry.name}", "exec"), {})


@pytest.mark.parametrize("name", [*TRAINED[:1], None])
def test_every_snippet_of_a_trained_card_runs(name, tmp_path, monkeypatch, capsys):
    if name is None:  # a stand-in, so that the test is one before any entry is trained
        entry = stand_in(tmp_path / "cards")
        monkeypatch.setattr(hub, "CARDS", tmp_path / "cards")
        monkeypatch.setitem(ENTRIES, entry.name, entry)
        cfg = get_pretrained_cfg(entry.name)
        monkeypatch.setitem(
            timm.models._registry._model_pretrained_cfgs,
            entry.name,
            replace(cfg, hf_hub_id=f"{entry.hub_id}@{entry.trained.revision}"),  # pyright: ignore
        )
        folder = tmp_path / "cards" / entry.name
    else:
        entry, folder = ENTRIES[name], CARDS / name
    run_snippets(entry, folder, monkeypatch, tmp_path)
    assert len(snippets((folder / "README.md").read_text())) == 4
    label, probability, same_label, same_probability = capsys.readouterr().out.split()
    assert float(same_probability) == pytest.approx(float(probability), abs=1e-3)
    assert label == same_label and label in entry.dataset.class_names and 0 < float(probability) <= 1


def test_the_snippet_of_an_untrained_card_runs():
    entry = ENTRIES["resnet18_se.cifar10"]
    (code,) = snippets(render_card(entry))
    with torch.device("meta"):
        exec(code, {})
