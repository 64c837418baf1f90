"""One command from weights to numbers, pictures and card; one sentence where there is nothing to analyse."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tamzoo import card_texts, subjects
from tamzoo.analysis import analyse
from tamzoo.cards import render_card
from tamzoo.catalogue import ENTRIES
from tamzoo.checkpoint import save_weights, sha256_of
from tamzoo.findings import ANALYSIS, Analysis, read_analysis
from tamzoo.gates import measure_gates
from tamzoo.journal import LOG_FIELDS
from tamzoo.learner import set_cudnn
from tamzoo.records import read_record
from tamzoo.staging import stage
from tamzoo.verify import verify_folder, write_cards
from tests.conftest import refused
from tests.standins import a_record, draw, stand_in
from tests.tiny_runs import random_split

N = 20
SPLIT = random_split(N, 3)


def finished_run(folder: Path, name: str, errors: tuple[float, ...] = (60.0, 40.0)) -> Path:
    """A folder as a run leaves it, with random weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    sha256 = save_weights(folder / "model.safetensors", timm.create_model(name).state_dict())
    entry = replace(ENTRIES["resnet20_tam.cifar10"], attention=name.split(".")[0].split("_")[-1])
    (folder / "record.json").write_text(replace(a_record(entry, sha256), entry=name).to_json())
    rows = [f"{epoch},0.1,1.0,{error},100.0,1.0" for epoch, error in enumerate(errors, start=1)]
    (folder / "log.csv").write_text("\n".join([",".join(LOG_FIELDS), *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    names = [f"resnet20_{attention}.cifar10" for attention in ("tam", "se", "cbam", "plain")]
    return {name.split("_")[1].split(".")[0]: finished_run(root / name, name) for name in names}


@pytest.fixture(scope="module")
def found(runs) -> Analysis:
    peers = [subjects.subject(str(runs[attention])) for attention in ("se", "cbam")]
    return analyse(subjects.subject(str(runs["tam"])), peers, SPLIT)


@pytest.fixture
def twenty_images(monkeypatch) -> None:
    """Random test images in place of any data set, and no peers but those given."""
    monkeypatch.setattr(subjects, "entry_folder", lambda name: None)
    monkeypatch.setattr("tamzoo.data.load_split", lambda *args: SPLIT)


def test_an_analysis_holds_every_study(found, runs):
    assert (found.entry, found.n) == ("resnet20_tam.cifar10", N)
    assert found.sha256 == sha256_of(runs["tam"] / "model.safetensors")
    assert len(found.gates) == len(found.lesions) == 9
    kinds = [row.kind for row in found.spreads]
    assert [kinds.count(kind) for kind in ("TAM", "SE", "CBAM channel", "CBAM spatial")] == [9] * 4
    assert all(sum(images for *_, images in row.cells) == row.n == N for row in found.spreads)
    assert {row.model for row in found.weights} == {f"resnet20_{a}.cifar10" for a in ("tam", "se", "cbam")}
    assert found.absent == ["plain"] and [len(curve.top1_errors) for curve in found.curves] == [2, 2, 2]
    gates, lesions, straightened = found.passes
    assert gates.blocks == gates.blocks_naive == 9
    assert (lesions.blocks, lesions.blocks_naive) == (9 + 45, 10 * 9)
    assert straightened.blocks < straightened.blocks_naive == (len(found.straightened) + 1) * 9
    assert found.peak_memory_mb is None or found.peak_memory_mb > 50


@pytest.mark.gpu
def test_gpu_finds_the_same(found, runs):
    set_cudnn()  # as the command does
    peers = [subjects.subject(str(runs[attention])) for attention in ("se", "cbam")]
    there = analyse(subjects.subject(str(runs["tam"])), peers, SPLIT.to(torch.device("cuda")))
    assert [row.name for row in there.lesions] == [row.name for row in found.lesions]
    assert [gate.mean for gate in there.gates] == pytest.approx([gate.mean for gate in found.gates], abs=1e-5)
    changes = [[row.logit_change for row in each.straightened] for each in (there, found)]
    assert changes[0] == pytest.approx(changes[1], abs=1e-3)


def test_its_gates_are_those_that_measuring_gives(found, runs):
    from tamzoo.data import normalise
    from tamzoo.datasets import DATASETS

    model = subjects.subject(str(runs["tam"])).load()
    for a, b in zip(
        found.gates, measure_gates(model, normalise(SPLIT.pixels, DATASETS["cifar10"])), strict=True
    ):
        assert (a.name, a.block, a.mean) == (b.name, b.block, pytest.approx(b.mean, abs=1e-6))


def test_an_analysis_survives_json_and_a_damaged_one_is_named(found, tmp_path):
    assert Analysis.from_json(found.to_json()) == found
    path = tmp_path / ANALYSIS
    for text in (
        "",
        "[]",
        "{}",
        "[" * 100_000,
        found.to_json()[:-10],
        found.to_json().replace('"lesions"', '"lesion"'),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="analysis.json: expected what `tamzoo analyze` writes"):
            read_analysis(path)


def test_every_figure_is_drawn_small_and_the_same_each_time(found, tmp_path):
    pytest.importorskip("matplotlib")
    from tamzoo.plots_analysis import FIGURES, plot_analysis

    assert list(FIGURES) == found.figures == list(card_texts.FIGURES)
    paths = plot_analysis(found, tmp_path)
    assert {path.name for path in paths} == {f"{name}.png" for name in found.figures}
    for path in paths:
        assert 5_000 < path.stat().st_size < 150_000
        with Image.open(path) as picture:
            assert picture.width >= 1000
    for kind in (".png", ".svg"):
        first, again = tmp_path / f"lesions{kind}", tmp_path / f"again{kind}"
        FIGURES["lesions"](found, first)
        FIGURES["lesions"](found, again)
        assert first.read_bytes() == again.read_bytes()


def test_beside_a_record_gates_are_drawn_as_that_has_them(found, tmp_path):
    pytest.importorskip("matplotlib")
    from tamzoo.plots import plot_gates
    from tamzoo.plots_analysis import plot_analysis

    gates = [replace(gate, n=10_000) for gate in found.gates]
    plot_gates(gates, tmp_path / "all.png")
    for sha256, same in ((found.sha256, True), ("0" * 64, False)):
        record = replace(a_record(ENTRIES[found.entry], sha256), gates=gates)
        (tmp_path / "record.json").write_text(record.to_json())
        plot_analysis(found, tmp_path)
        drawn, wanted = ((tmp_path / name).read_bytes() for name in ("gates.png", "all.png"))
        assert (drawn == wanted) == same


def test_no_log_is_no_curve(found, tmp_path):
    pytest.importorskip("matplotlib")
    from tamzoo.plots_analysis import plot_analysis

    bare = replace(found, curves=[], spreads=[row for row in found.spreads if row.kind == "TAM"])
    assert "curves.png" not in {path.name for path in plot_analysis(bare, tmp_path)}


def test_the_command_writes_numbers_and_pictures(tamzoo, twenty_images, runs, tmp_path):
    pytest.importorskip("matplotlib")
    weights, out = runs["tam"] / "model.safetensors", tmp_path / "new" / "folder"
    arguments = ("--weights", weights, "--data", tmp_path, "--out", out, "--images", 8, "--kind", "png")
    code, told, error = tamzoo("analyze", "resnet20_tam.cifar10", *arguments, "--peer", runs["se"])
    assert code == 0, error
    again = tamzoo("analyze", "resnet20_tam.cifar10", *arguments, *("--peer", runs["se"]) * 2)
    assert again[0] == 0, "a peer named twice is one"
    found = read_analysis(out / ANALYSIS)
    assert found.n == 8 and found.absent == ["plain", "cbam"]
    assert "not compared with plain, cbam" in told and "54 block passes in place of 90" in told
    assert {path.name for path in out.iterdir()} == {ANALYSIS, *(f"{name}.png" for name in found.figures)}


def draw_all(analysis: Analysis, folder: Path) -> list[Path]:
    paths = [folder / f"{name}.png" for name in analysis.figures]
    for path in paths:
        draw([], path)
    return paths


def test_a_card_shows_the_pictures_and_a_missing_one_is_found_out(found, tmp_path):
    entry = stand_in(tmp_path)
    assert entry.trained is not None
    folder, mine = tmp_path / entry.name, replace(found, sha256=entry.trained.sha256)
    (folder / ANALYSIS).write_text(mine.to_json())
    assert write_cards(tmp_path, [entry], draw, draw_all)
    assert verify_folder(entry, folder) == [] and write_cards(tmp_path, [entry], draw, draw_all) == []
    text = (folder / "README.md").read_text()
    for name in found.figures:
        assert text.count(f"]({name}.png)") == 1
    assert "Not compared with plain: these had no weights then." in text
    (staged := tmp_path / "staged").mkdir()
    files = stage(entry, folder, staged).files
    assert {ANALYSIS, *(f"{name}.png" for name in found.figures)} <= files.keys()
    (folder / "lesions.png").unlink()
    assert verify_folder(entry, folder) == ["lesions.png is missing"]
    assert folder / "lesions.png" in write_cards(tmp_path, [entry], draw, draw_all)
    (folder / ANALYSIS).write_text(found.to_json())  # of other weights
    assert "analysis.json: SHA-256 is" in verify_folder(entry, folder)[0]
    with pytest.raises(ValueError, match="the analysis is of resnet18_tam"):
        render_card(entry, a_record(entry), analysis=replace(mine, entry="resnet18_tam.cifar10"))


def test_the_shipped_weights_are_peers_of_their_backbone():
    main = subjects.Subject(label="mine", entry="wrn10_4_se.cifar10", weights=Path("x"))
    assert "wrn10_4_tam.cifar10" in [peer.label for peer in subjects.known_peers(main)]


def test_a_run_with_another_group_size_loads_as_it_was_trained(tmp_path):
    folder = finished_run(tmp_path / "run", "resnet20_tam.cifar10")
    weights = timm.create_model("resnet20_tam.cifar10", group_size=4).state_dict()
    sha256 = save_weights(folder / "model.safetensors", weights)
    record = read_record(folder / "record.json")
    record = replace(record, model_args={"group_size": 4}, sha256=sha256)
    (folder / "record.json").write_text(record.to_json())
    assert subjects.subject(str(folder)).load().layer1[0].se.group_size == 4
    (folder / "record.json").write_text(replace(record, entry="resnet20_plain.cifar10").to_json())
    with pytest.raises(ValueError, match=r"safetensors: resnet20_plain.cifar10 cannot be made with .*group"):
        subjects.subject(str(folder)).load()


# Bad input: one sentence, exit code 2, nothing written.


def test_what_cannot_be_analysed_is_refused(tamzoo, twenty_images, runs, tmp_path, monkeypatch):
    monkeypatch.delenv("TAMZOO_DATA", raising=False)
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()

    def analyze(name, *arguments, weights="tam"):
        given = ("--weights", runs[weights] / "model.safetensors")
        return tamzoo("analyze", name, *given, "--out", out, *arguments)

    tam, data = "resnet20_tam.cifar10", ("--data", empty)
    refused(analyze("resnet20_plain.cifar10", *data, weights="plain"), "has no TAM gates")
    refused(analyze(tam), "pass --data DIR or set TAMZOO_DATA")
    refused(analyze(tam, *data, "--peer", "resnet20_tamm"), "no model 'resnet20_tamm'; nearest: resnet20_tam")
    refused(
        analyze(tam, *data, "--peer", "resnet20_cbam.cifar100"),
        "no entry 'resnet20_cbam.cifar100'; nearest:",
    )
    refused(analyze(tam, *data, "--peer", "resnet18_se.cifar10"), "no trained weights yet")
    refused(analyze(tam, *data, "--peer", empty), "expected a finished run")
    twin = finished_run(tmp_path / "twin" / runs["se"].name, "resnet20_se.cifar10")
    refused(analyze(tam, *data, "--peer", runs["se"], "--peer", twin), "two of the models are called")
    refused(analyze(tam, *data, "--kind", "bmp"), "expected a picture named .png, .svg or .pdf")
    other = finished_run(tmp_path / "other", "wrn10_4_se.cifar10")
    refused(analyze(tam, *data, "--peer", other), "expected the backbone and data set of resnet20_tam")
    record = json.loads((twin / "record.json").read_text())
    (twin / "record.json").write_text(json.dumps(record | {"entry": "resnet21_se.cifar10"}))
    refused(analyze(tam, *data, "--peer", twin), "no model 'resnet21_se.cifar10'; nearest: resnet20_se")
    refused(analyze("resnet50_tam.cifar10", *data), "these weights are not of resnet50_tam.cifar10")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(analyze(tam, *data), "drawing needs matplotlib; pip install 'tamzoo[plots]'")
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_refused_before_any_study(
    tamzoo, twenty_images, runs, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("tamzoo.analysis.analyse", None)
    (tmp_path / "file").write_text("x")
    given = ("--weights", runs["tam"] / "model.safetensors", "--data", tmp_path)
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        refused(
            tamzoo("analyze", "resnet20_tam.cifar10", *given, "--out", out),
            f"cannot make the folder {out}",
        )


def test_weights_that_are_not_numbers_are_refused(tamzoo, twenty_images, runs, tmp_path):
    weights = load_file(runs["tam"] / "model.safetensors")
    weights["layer2.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    arguments = ("--weights", tmp_path / "nan.safetensors", "--data", tmp_path, "--out", tmp_path / "out")
    refused(
        tamzoo("analyze", "resnet20_tam.cifar10", *arguments),
        "nan.safetensors: layer2.0.conv1.weight holds NaN or infinity",
    )
    assert not (tmp_path / "out").exists()


def test_one_image_is_too_few(runs):
    with pytest.raises(ValueError, match="1 images cannot show whether a gate is static"):
        analyse(subjects.subject(str(runs["tam"])), [], random_split(1, 0))


def test_an_empty_data_directory_is_refused(tamzoo, runs, tmp_path):
    arguments = ("--weights", runs["tam"] / "model.safetensors", "--data", tmp_path)
    refused(
        tamzoo("analyze", "resnet20_tam.cifar10", *arguments),
        "expected test-*.parquet",
        "found none; to download them pass --data hub",
    )
