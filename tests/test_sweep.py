"""One run a group size: each says its own, none is trained twice, none is mistaken for another."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tamzoo.checkpoint import sha256_of
from tamzoo.distributed import World
from tamzoo.gates import gates_of
from tamzoo.progress import Voice
from tamzoo.records import Record, read_record
from tamzoo.session import Order
from tamzoo.subjects import subject
from tamzoo.sweep import GROUP_SIZES, attentions, group_sizes, summary
from tamzoo.sweep import sweep as sweep_through
from tests.tiny_runs import random_split

NAME = "resnet20_tam.cifar10"
ORDER = Order(recipe="short-cpu", epochs=1)


@pytest.fixture
def trained_through(tmp_path, monkeypatch):
    """Trains variants on twenty random images."""
    monkeypatch.setattr("tamzoo.session.load_split", lambda *args: random_split(20, 0))

    def run(variants, order, budget=math.inf, say=print):
        world, voice = World(device=torch.device("cpu")), Voice(say=say)
        return sweep_through(variants, order, tmp_path, tmp_path / "out", budget, world, voice)

    return run


@pytest.fixture
def sweep(trained_through):
    """Sweeps over group sizes: what was found, and what was said."""

    def run(*sizes, order=ORDER, budget=math.inf, name=NAME):
        said = []
        return trained_through(group_sizes(name, sizes, order.seed), order, budget, said.append), said

    return run


def static(record: Record) -> int:
    return sum(gate.max - gate.min <= 1e-4 for gate in record.gates)


def test_every_run_has_its_group_size_and_says_it(sweep, tmp_path):
    found, said = sweep(32, 2)
    assert [record.model_args for record in found] == [{"group_size": 2}, {"group_size": 32}, {}]
    for record in found[:2]:
        size = record.model_args["group_size"]
        folder = tmp_path / "out" / f"group_size_{size}"
        assert json.loads((folder / "run.json").read_text())["model_args"] == {"group_size": size}
        assert record == read_record(folder / "record.json") and record.score.n == 20
        assert record.sha256 == sha256_of(folder / "model.safetensors")
        gates = gates_of(subject(str(folder)).load()).values()
        assert {gate.group_size for gate in gates} == {size}
    assert 0 < static(found[0]) < 9 and static(found[1]) == 0
    assert "group size 2: 0 of 9 trees are one convolution over all channels" in said
    # 32 exceeds the first stage's 16 channels, equals the second's 32 and halves the third's 64
    assert "group size 32: 6 of 9 trees are one convolution over all channels" in said


def test_runs_that_ended_are_not_repeated_and_others_go_on(sweep, tmp_path):
    sweep(2)
    weights = tmp_path / "out" / "group_size_2" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert sweep(2, 4, budget=0.0)[0] == []  # no time even to look
    found, said = sweep(2, 4)
    assert [record.model_args for record in found] == [{"group_size": 2}, {"group_size": 4}, {}]
    assert weights.stat().st_mtime_ns == before
    assert any(line.startswith(f"{NAME}: done") for line in said)


def test_the_network_without_attention_is_trained_alike(sweep, tmp_path):
    found, _ = sweep(64, name="wrn10_4_tam.cifar10")
    assert [(record.model_args, record.entry, len(record.gates)) for record in found] == [
        ({"group_size": 64}, "wrn10_4_tam.cifar10", 3),
        ({}, "wrn10_4_plain.cifar10", 0),
    ]
    names = ("group_size_64", "plain")
    assert found == [read_record(tmp_path / "out" / name / "record.json") for name in names]
    assert found[0].recipe == found[1].recipe


def test_every_attention_is_trained_with_every_seed(trained_through, tmp_path):
    variants = attentions("resnet20", ["tam", "plain"], "cifar10", 2)
    assert [(variant.entry, variant.seed) for variant in variants] == [
        ("resnet20_tam.cifar10", 0),
        ("resnet20_plain.cifar10", 0),
        ("resnet20_tam.cifar10", 1),
        ("resnet20_plain.cifar10", 1),
    ]
    found = trained_through(variants, ORDER)
    assert len({record.sha256 for record in found}) == 4
    for variant, record in zip(variants, found, strict=True):
        assert record == read_record(tmp_path / "out" / variant.folder / "record.json")
        assert (record.entry, record.seed, record.model_args) == (variant.entry, variant.seed, {})
    assert [len(record.gates) for record in found] == [9, 0, 9, 0] and static(found[0]) > 0
    erring = [
        replace(found[0], score=replace(found[0].score, top1_error=error)) for error in (10.0, 11.0, 13.0)
    ]
    plain = found[1].score.top1_error
    assert summary([erring[0], found[1], *erring[1:]]) == [
        "resnet20_tam.cifar10: top-1 error 11.33 %, standard deviation 1.53 (10.00, 11.00, 13.00)",
        f"resnet20_plain.cifar10: top-1 error {plain:.2f} % ({plain:.2f})",
    ]


def test_attentions_without_a_row_or_a_spread_are_refused():
    with pytest.raises(ValueError, match="no entry 'resnet18_scalar.cifar10'"):
        attentions("resnet18", ["plain", "scalar"], "cifar10", 3)
    with pytest.raises(ValueError, match="seeds must be at least 2, for a spread, got 1"):
        attentions("resnet20", ["plain"], "cifar10", 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 2}, "recipe's epochs"),
        ({"seed": 1}, "seed: 0, not 1"),
        ({"precision": "bfloat16"}, "precision: float32, not bfloat16"),
    ],
)
def test_a_run_of_another_order_is_not_counted(sweep, change, told):
    sweep(2)
    with pytest.raises(ValueError, match=rf"group_size_2 holds another run \({told}.*choose another --out"):
        sweep(2, order=replace(ORDER, **change))


def test_what_cannot_be_swept_is_refused(sweep):
    with pytest.raises(ValueError, match="resnet18_se.cifar10: expected an entry with TAM"):
        sweep(2, name="resnet18_se.cifar10")
    with pytest.raises(ValueError, match="group_size must be an integer of at least 2, got 1"):
        sweep(1)


@pytest.fixture
def command(trained_through, tmp_path):
    """Runs `tamzoo sweep` of one epoch; its exit code and output."""
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from tamzoo.cli import app

    common = [
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--recipe",
        "short-cpu",
        "--epochs",
        "1",
    ]

    def run(*words):
        found = CliRunner().invoke(app, ["sweep", *words, *common])
        return found.exit_code, found.output

    return run


def drawn(folder: Path) -> bool:
    return (folder / "sweep.png").read_bytes().startswith(b"\x89PNG") and (folder / "sweep.svg").is_file()


def test_the_command_draws_error_against_group_size(command, tmp_path):
    code, output = command("group-size", "8", "2", "--model", "wrn10_4")
    assert code == 0, output
    assert drawn(tmp_path / "out")
    assert command("group-size", "1")[0] == 2


def test_the_command_tells_and_draws_errors_over_seeds(command, tmp_path):
    code, output = command("attention", "--seeds", "2")
    assert code == 0, output
    names = [f"resnet20_{name}.cifar10-seed-{seed}" for name in ("plain", "scalar", "tam") for seed in (0, 1)]
    records = [read_record(tmp_path / "out" / name / "record.json") for name in names]
    assert output.splitlines()[-3:] == summary(records)
    assert drawn(tmp_path / "out")
    assert command("attention", "--seeds", "1")[0] == 2


EXPORT = Path(__file__).parent.parent / "export"


def shipped(folder: str, names: Iterable[str]) -> list[Record]:
    """Records of a sweep that export holds, and no others."""
    records = [read_record(EXPORT / folder / name / "record.json") for name in names]
    assert len(records) == len(list((EXPORT / folder).glob("*/record.json")))
    return records


def tells(*cells: object) -> bool:
    return f"| {' | '.join(map(str, cells))} |" in (EXPORT / "README.md").read_text()


def test_what_export_tells_of_group_sizes_is_what_the_records_hold():
    names = [*(f"group_size_{size}" for size in GROUP_SIZES), "plain"]
    for size, record in zip([*GROUP_SIZES, None], shipped("group_size_runs", names), strict=True):
        assert record.model_args == ({"group_size": size} if size else {})
        gates = f"{static(record)} of {len(record.gates)}" if size else "no gates"
        errors = f"{record.score.top1_error:.2f} %", f"{record.score.top5_error:.2f} %"
        assert tells(size or "no attention", *errors, gates)


def test_what_export_tells_of_seeds_is_what_the_records_hold():
    variants = attentions("resnet20", ["plain", "scalar", "tam"], "cifar10", 3)
    records = shipped("seed_runs", (variant.folder for variant in variants))
    assert [(record.entry, record.seed) for record in records] == [
        (variant.entry, variant.seed) for variant in variants
    ]
    for entry in dict.fromkeys(record.entry for record in records):
        mine = [record for record in records if record.entry == entry]
        errors = np.array([record.score.top1_error for record in mine])
        each = ", ".join(f"{error:.2f}" for error in errors)
        gates = ", ".join(f"{static(record)} of {len(record.gates)}" for record in mine if record.gates)
        spread = f"{errors.mean():.2f} %", f"{errors.std(ddof=1):.2f}"
        assert tells(f"`{entry}`", f"{each} %", *spread, gates or "no gates")
