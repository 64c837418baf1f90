import csv
import dataclasses
import json
import os
from pathlib import Path

import pytest

from tamzoo.catalogue import ENTRIES
from tamzoo.checkpoint import sha256_of
from tamzoo.hub import entry_folder
from tamzoo.records import Record, read_record
from tamzoo.results import (
    README_MARKS,
    record_of,
    result_row,
    results_csv,
    results_markdown,
    with_results,
    write_results,
)
from tests.standins import full_disk

ROOT = Path(__file__).parent.parent
TRAINED = [entry for entry in ENTRIES.values() if entry.trained]


def test_results_csv_comes_from_rows_and_records():
    text = results_csv()
    assert (ROOT / "results.csv").read_text() == text, "run: tamzoo results"
    rows = {row["entry"]: row for row in csv.DictReader(text.splitlines())}
    assert list(rows) == list(ENTRIES)
    assert rows["resnet50_tam.cifar100"]["paper_params_m"] == "24.01"
    assert rows["resnet50_tam.cifar100"]["params_m"] == "23.766"


def test_a_row_counts_all_runs_that_made_the_weights(monkeypatch):
    record = record_of(TRAINED[0])
    assert record
    first = dataclasses.replace(record, epochs=3, seconds=630, hardware="a CPU", start=None)
    chain = dataclasses.replace(first, epochs=5, seconds=90, hardware="a GPU", start=first)
    monkeypatch.setattr("tamzoo.results.record_of", lambda entry: chain)
    row, name = result_row(TRAINED[0]), record.recipe["name"]
    assert (row["epochs"], row["recipe"]) == (8, f"{name} + {name}")
    assert (row["training_minutes"], row["hardware"]) == (12, "a CPU + a GPU")
    assert Record.from_json(chain.to_json()) == chain
    assert not row["pretraining"] and " after " not in results_markdown()
    noted = dataclasses.replace(first, entry="a.svhn", data="SVHN train", data_note="some from JPEG")
    chain = dataclasses.replace(first, data_note="", start=noted)
    assert result_row(TRAINED[0])["data_note"].startswith("SVHN train: some from JPEG")


def test_a_row_whose_weights_were_not_kept_says_so():
    lines = {line.split("`")[1]: line for line in results_markdown().splitlines() if "`" in line}
    kept = {name: "(weights not kept)" not in line for name, line in lines.items()}
    assert kept == {name: ENTRIES[name].trained is not None for name in lines} and not all(kept.values())


def test_epochs_on_another_data_set_are_told_apart(monkeypatch):
    record = record_of(TRAINED[0])
    assert record
    chain = None
    for entry, epochs in (("a.cifar10", 7), ("a.svhn", 2), ("a.svhn", 3), ("a.cifar10", 1), ("a.cifar10", 4)):
        chain = dataclasses.replace(record, entry=entry, epochs=epochs, start=chain)
    monkeypatch.setattr("tamzoo.results.record_of", lambda entry: chain)
    row = result_row(TRAINED[0])
    assert (row["epochs"], row["pretraining"]) == (5, "7 epochs of a.cifar10, then 5 epochs of a.svhn")
    assert "| 5 epochs after 7 epochs of a.cifar10, then 5 epochs of a.svhn, " in results_markdown()


@pytest.mark.skipif(os.name != "posix", reason="limits of file size are POSIX's")
def test_a_full_disk_leaves_the_readme_whole(tmp_path):
    start, end = README_MARKS
    before = f"before {start} old {end} after"
    (tmp_path / "README.md").write_text(before)
    with full_disk(100), pytest.raises(OSError, match="cannot write .*README.md"):
        write_results(tmp_path)
    assert (tmp_path / "README.md").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_the_readmes_table_comes_from_them_too():
    readme = (ROOT / "README.md").read_text()
    assert with_results(readme) == readme, "run: tamzoo results"
    with pytest.raises(ValueError, match="the README lacks the marks"):
        with_results("# nothing")
    start, end = README_MARKS
    assert with_results(f"a\n{start}\nold\n{end}\nb").startswith(f"a\n{start}\n| entry |")


@pytest.mark.parametrize("entry", TRAINED, ids=lambda entry: entry.name)
def test_row_record_and_file_of_a_trained_entry_agree(entry):
    record = record_of(entry)
    assert record and record.entry == entry.name and record.selection == "last epoch"
    assert record.sha256 == entry.trained.sha256 and record.recipe["name"] == entry.trained.recipe
    folder = entry_folder(entry.name)
    assert folder and sha256_of(folder / "model.safetensors") == record.sha256
    assert "dirty" not in record.commit and record.score.n == 10_000
    assert all(gate.n == 10_000 for gate in record.gates)


def test_a_record_survives_json_and_a_damaged_one_is_named(tmp_path):
    record = record_of(TRAINED[0])
    assert record and Record.from_json(record.to_json()) == record
    path = tmp_path / "record.json"
    told = json.loads(record.to_json())
    damaged = [json.dumps(told | {key: None}) for key in ("entry", "sha256", "recipe")]
    for arguments in ({"checkpoint_path": "x.pth"}, {"group_size": "2"}, ["group_size"]):
        damaged.append(json.dumps(told | {"model_args": arguments}))
    damaged += [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        record.to_json()[:-10],
        record.to_json().replace('"seed"', '"sed"'),
    ]
    for text in damaged:
        path.write_text(text)
        with pytest.raises(ValueError, match="record.json: expected a training record"):
            read_record(path)
    assert dataclasses.replace(record, seed=1) != record
