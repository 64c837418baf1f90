"""The whole zoo in one command, on the shipped entry and pictures in place of a data set."""

import csv
import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from export import zoo
from tamzoo.catalogue import ENTRIES
from tamzoo.data import Split, normalise
from tamzoo.images import random_crops
from tamzoo.terminal import DEMO_ENTRY
from tests.conftest import refused

ENTRY = ENTRIES[DEMO_ENTRY]
UNTRAINED = next(entry for entry in ENTRIES.values() if not entry.trained and entry.dataset == ENTRY.dataset)
BROKEN = zoo.Format(name="broken", file="broken.bin", write=lambda *_: 1 / 0, load=zoo.FORMATS[0].load)


def split(n, seed):
    """Pictures labelled as torch labels them, so that its own accuracy is 100 %."""
    pixels = random_crops(n, 32, seed)
    model = timm.create_model(DEMO_ENTRY, pretrained=True).eval()
    with torch.inference_mode():
        return Split(pixels=pixels, labels=model(normalise(pixels, ENTRY.dataset)).argmax(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder and its report, after an entry without weights, the shipped one, and a format that fails."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / DEMO_ENTRY).mkdir()
    (folder / DEMO_ENTRY / BROKEN.file).write_text("of an earlier run")
    entries = [UNTRAINED, ENTRY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "FORMATS", (BROKEN, *zoo.FORMATS))
        patch.setattr(zoo, "load_split", lambda data, dataset, name, bar: split(256, len(name)))
        zoo.export_zoo(entries, folder, folder, rounds=2)
    with (folder / "report.csv").open() as file:
        return folder, list(csv.DictReader(file))


def test_every_format_is_written_and_measured(exported):
    folder, rows = exported
    rows = [row for row in rows if row["entry"] == DEMO_ENTRY and row["format"] != "broken"]
    assert [row["format"] for row in rows] == [form.name for form in zoo.FORMATS]
    for row in rows:
        assert row["error"] == "" and float(row["latency_ratio"]) > 0
        size = (folder / DEMO_ENTRY / row["file"]).stat().st_size
        assert float(row["size_mb"]) == pytest.approx(size / 1e6, abs=1e-3)
        assert float(row["accuracy"]) == pytest.approx(100 - float(row["lost"]), abs=2e-3)
        # the labels are torch's own answers; 1: logits in int8 can be equal, and which is first is open
        assert float(row["agreement"]) == pytest.approx(float(row["accuracy"]), abs=1)
        least = {"onnx int8": 90, "onnx float16": 99}.get(row["format"], 100)
        assert float(row["accuracy"]) >= least
    sizes = [float(row["size_mb"]) for row in rows[:3]]
    assert sizes[1] < 0.55 * sizes[0] and sizes[2] < 0.3 * sizes[0]


def test_what_fails_is_a_row_and_the_rest_goes_on(exported):
    folder, rows = exported
    broken = next(row for row in rows if row["entry"] == DEMO_ENTRY and row["format"] == "broken")
    assert broken["error"] == "ZeroDivisionError: division by zero" and broken["accuracy"] == ""
    assert not (folder / DEMO_ENTRY / BROKEN.file).exists(), "an older file would pass for a new one"
    untrained = [row["error"] for row in rows if row["entry"] == UNTRAINED.name]
    assert len(untrained) == 1 + len(zoo.FORMATS)
    assert all(f"{UNTRAINED.name} has no trained weights yet" in error for error in untrained)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TAMZOO_DATA"), reason="needs TAMZOO_DATA with CIFAR-10")
def test_int8_loses_at_most_a_third_of_a_point_on_the_real_test_split(tmp_path):
    rows = zoo.export_zoo([ENTRY], tmp_path, None, rounds=1)
    lost = {row.format: row.lost for row in rows if row.lost is not None}
    assert len(lost) == len(zoo.FORMATS)
    assert lost.pop("onnx int8") <= 0.3 and lost.pop("onnx float16") <= 0.1
    assert all(abs(points) <= 0.02 for points in lost.values()), "two images may change sides by rounding"


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command line: exit code, standard output, standard error."""
    monkeypatch.delenv("TAMZOO_DATA", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            zoo.main()
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(("error", "code"), [("", 0), ("ValueError: no", 1)])
def test_the_exit_code_tells_of_failed_rows(command, monkeypatch, tmp_path, error, code):
    row = zoo.Row(entry=DEMO_ENTRY, format="onnx int8", file="x.onnx", accuracy=90.0, error=error)
    monkeypatch.setattr(zoo, "load_split", lambda *_: None)
    monkeypatch.setattr(zoo, "export_formats", lambda *_: [row])
    found, out, err = command("--out", tmp_path / "out", "--data", tmp_path, "--only", DEMO_ENTRY)
    assert found == code and "onnx int8" in out and (error in err)
    assert (tmp_path / "out" / "report.csv").read_text() == zoo.report([row])


def test_the_report_keeps_the_rows_of_other_entries(command, monkeypatch, tmp_path):
    other = zoo.Row(entry="a", format="onnx int8", file="x.onnx", accuracy=90.5, latency_ratio=1.25)
    failed = zoo.Row(entry="a", format="torch.export", file="x.pt2", error='RuntimeError: "a", b')
    old, new = (zoo.Row(entry=DEMO_ENTRY, format="f", file="x", lost=lost) for lost in (1.0, 2.0))
    path = tmp_path / "report.csv"
    path.write_text(zoo.report([other, old, failed]))
    monkeypatch.setattr(zoo, "load_split", lambda *_: None)
    monkeypatch.setattr(zoo, "export_formats", lambda *_: [new])
    common = ("--out", tmp_path, "--data", tmp_path, "--only", DEMO_ENTRY)
    assert command(*common)[0] == 0
    assert zoo.read_report(path) == [other, failed, new]
    for text in ("entry,format\na,b\n", "another table"):
        path.write_text(text + "\n1,2\n")
        refused(command(*common), "report.csv: expected a report of an earlier run")


def test_bad_input_is_one_sentence(command, monkeypatch, tmp_path):
    common = ("--out", tmp_path / "out", "--data", tmp_path)
    refused(command(*common, "--only", "vgg*"), "no entry with weights matches 'vgg*'", DEMO_ENTRY)
    refused(command(*common), f"{tmp_path}")
    refused(command("--out", tmp_path / "out"), "pass --data DIR or set TAMZOO_DATA")
    refused(command("--out", tmp_path / "out", "--data", tmp_path / "no"), "found no such directory")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(command(*common), "ONNX needs onnxruntime; pip install 'tamzoo[export]'")


def test_a_folder_that_cannot_be_written_is_refused(command, monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "load_split", lambda *_: None)
    (tmp_path / "file").write_text("x")
    out = ("--out", tmp_path / "file" / "out", "--data", tmp_path)
    refused(command(*out), f"cannot make the folder {tmp_path / 'file' / 'out'}: Not a directory")


def test_a_full_disk_ends_the_run(command, monkeypatch, tmp_path):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zoo, "load_split", lambda *_: split(256, 0))
    monkeypatch.setattr(zoo, "FORMATS", (replace(BROKEN, write=fill),))
    told = "No space left on device; free some space and run again"
    refused(command("--out", tmp_path, "--data", tmp_path), told)
    assert [path.name for path in Path(tmp_path).rglob("*") if path.is_file()] == ["report.csv"]


def test_no_rounds_are_refused_before_anything_is_exported(tmp_path):
    with pytest.raises(ValueError, match="expected at least one of --rounds, got 0"):
        zoo.export_zoo([ENTRY], tmp_path / "out", None, rounds=0)
    assert not (tmp_path / "out").exists()
