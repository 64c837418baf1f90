"""Inference is compared in a few rounds of a small network; the figures themselves are not tested."""

import argparse
import csv
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export import benchmark, gate_study
from export.benchmark import Trainer
from export.benchmark_gate import print_rates
from export.benchmark_infer import check_load, describe, markdown
from tamzoo.attention import TAM
from tamzoo.fold import FoldReport
from tamzoo.records import Timing
from tamzoo.terminal import one_sentence
from tamzoo.tree import climb
from tests.tiny_runs import random_split

EXPORT = Path(__file__).parent.parent / "export"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line on an idle machine: exit code, standard output, standard error."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 9.0, 9.0))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark", "infer", *map(str, arguments)])
        try:
            benchmark.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def test_programs_are_compared_in_one_run_and_reported(command, tmp_path):
    programs = ("TAM folded", "int8", "torch")
    options = (
        "--model",
        "resnet20",
        "--tag",
        "cifar100",
        "--batches",
        1,
        2,
        "--rounds",
        3,
        "--csv",
        tmp_path / "x.csv",
    )
    code, out, err = command(*options, "--plot", tmp_path / "x.png", "--programs", *programs)
    assert code == 0, err
    assert "resnet20, cifar100: random weights, gates folded by their means, 9 of 9 gates folded" in out
    assert re.search("Operators of plain and folded graph alike: 9 Add, .*21 Conv", out)
    assert "| program | batch 1 | of plain (quartiles) | batch 2 | of plain (quartiles) |" in out
    assert "`python -m export.benchmark infer --model resnet20" in out and "threads: 1" in out
    assert "load 0.00 before the run" in out
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch"], row["name"]) for row in rows] == [
        (batch, name) for batch in "12" for name in ("plain", *programs)
    ]
    assert all(row["rounds"] == "3" and float(row["median_ms"]) > 0 for row in rows)
    assert all(float(row["ratio"]) == 1 for row in rows if row["name"] == "plain")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_graphs_that_differ_after_folding_all_gates_are_an_error():
    plain, folded = {"Conv": 1}, {"Conv": 1, "Sigmoid": 1}
    all_folded = FoldReport(folded={"a.se": 0.5}, kept={}, tolerance=1e-4)
    with pytest.raises(RuntimeError, match="those of the plain graph are {'Conv': 1}"):
        describe("resnet20_tam.cifar10", all_folded, plain, folded)
    some_kept = FoldReport(folded={"a.se": 0.5}, kept={"b.se": "moves"}, tolerance=1e-4)
    told = describe("wrn10_4_tam.cifar10", some_kept, plain, folded)
    assert told == "trained weights, 1 of 2 gates folded. Operators of the folded graph: 1 Conv, 1 Sigmoid"
    assert describe("resnet34_tam.cifar10", some_kept, plain, folded).startswith("random weights, gates")


def test_a_busy_machine_is_refused_unless_forced(monkeypatch, command):
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(ValueError, match="its load was 3.00 .* at most 0.50 on 2 cores"):
        check_load(force=False)
    assert check_load(force=True) == 3.0
    code, _, err = command()
    assert code == 2 and err.startswith("error: the machine is busy")


def test_bad_options_are_one_sentence(command, tmp_path):
    for options, told in {
        ("--rounds", 1, 2): "as many --rounds as --batches or one, got [1, 2] for [1, 16, 128]",
        ("--batches", 0, "--rounds", 1): "expected positive numbers",
        ("--plot", tmp_path / "x.bmp"): "expected a picture named .png, .svg or .pdf",
    }.items():
        code, _, err = command(*options)
        assert code == 2 and err.startswith("error: ") and told in err


@pytest.mark.parametrize("measure", [lambda options: Trainer("plain", options), print_rates])
def test_the_gpu_that_is_measured_is_the_one_that_is_waited_for(monkeypatch, measure):
    def set_device(device: torch.device) -> None:
        raise RuntimeError(f"chosen: {device}")

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    found = {"model": "resnet20", "tag": "cifar10", "format": "nchw", "threads": 0, "rounds": 1}
    with pytest.raises(RuntimeError, match="chosen: cuda:1"):
        measure(argparse.Namespace(device="cuda:1", **found))


def test_training_is_compared_and_its_longest_kernels_are_named():
    command = [sys.executable, "-m", "export.benchmark", "train", "--model", "resnet20", "--device", "cpu"]
    command += "--batch 2 --rounds 2 --warmup 1 --threads 1 --kernels 4".split()
    command += "--variants plain tam tam-levels tam-joined".split()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    told, columns, plain, tam, levels, joined, *kernels = filter(None, done.stdout.splitlines())
    assert "model=resnet20" in told and columns.split() == list(benchmark.COLUMNS)
    assert plain.split()[2] == plain.split()[5] == "1.0" and float(tam.split()[1]) > 0
    assert levels.split()[0] == "tam-levels" and float(levels.split()[5]) > float(tam.split()[5])
    assert joined.split()[0] == "tam-joined" and float(joined.split()[1]) > 0
    heads = [line.split() for line in kernels if "%" not in line]
    assert [head[2] for head in heads] == ["plain,", "tam,", "tam-levels,", "tam-joined,"]
    assert all(head[4:] == "ms a step in all:".split() and float(head[3]) > 0 for head in heads)
    assert len(kernels) == 20 and any("convolution_backward" in line for line in kernels[1:5])
    shares = [float(line.split("%")[0]) for line in kernels[6:10]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--model", "nosuch"], "invalid choice: 'nosuch'"),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph needs --device cuda, got cpu"),
        pytest.param(
            ["--device", "cuda"],
            "finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not there"),
        ),
    ],
)
def test_bad_options_of_a_training_benchmark_are_one_sentence(monkeypatch, capsys, options, told):
    monkeypatch.setattr(sys, "argv", ["benchmark", "train", *options])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_a_training_process_that_dies_ends_the_benchmark():
    command = [sys.executable, "-m", "export.benchmark", "train", "--model", "resnet20", "--device", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "the process of plain died; what it said is above" in done.stderr


def test_a_variant_that_cannot_begin_is_left_out():
    options = "--model wrn10_4 --batch 2 --rounds 1 --warmup 0 --device cpu --csv"
    command = [sys.executable, "-m", "export.benchmark", "train", *options.split()]
    command += ["--variants", "plain", "tam-joined", "tam"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "tam-joined: left out: the process of tam-joined died" in done.stderr
    assert [row.split(",")[0] for row in done.stdout.splitlines()] == ["variant", "plain", "tam"]


@pytest.mark.parametrize(
    ("option", "forward", "backward"),
    [("", 0.5, 0.5), ("--end", 0.75, 0.833)],  # two and three, or three and five passes beside a copy's two
)
def test_the_gate_is_timed_beside_a_copy(monkeypatch, capsys, option, forward, backward):
    def timed(programs, rounds):
        for work in programs.values():
            work()
        return [  # ten calls take 1, 2 and 3 ms
            Timing(name=name, rounds=rounds, median_ms=ms, ratio=ms, ratio_low=ms, ratio_high=ms)
            for ms, name in enumerate(programs, 1)
        ]

    monkeypatch.setattr("export.benchmark_gate.time_in_turns", timed)
    options = "--channels 4 64 --elements 81920 --rounds 3 --device cpu --precision float32"
    monkeypatch.setattr(sys, "argv", ["benchmark", "gate", *options.split(), *option.split()])
    benchmark.main()
    told, columns, *rows = capsys.readouterr().out.splitlines()
    assert "elements=81920" in told and columns.split()[:2] == ["channels", "copy"]
    wanted = [6.554, 0.2, forward, 0.3, backward]  # 655,360 bytes in 0.1 ms
    assert [[float(cell) for cell in row.split()] for row in rows] == [[4, *wanted], [64, *wanted]]


@pytest.mark.parametrize("channels", ["3", "1", "16384"])
def test_channels_that_the_product_does_not_take_are_one_sentence(monkeypatch, capsys, channels):
    monkeypatch.setattr(
        sys, "argv", ["benchmark", "gate", "--channels", channels, "--elements", "8192", "--device", "cpu"]
    )
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 2 and f"powers of two from 2 to 8192, got {channels}" in capsys.readouterr().err


def test_the_table_has_a_row_a_program():
    row = Timing(name="plain", rounds=3, median_ms=2, ratio=1, ratio_low=1, ratio_high=1)
    assert markdown({1: [row], 16: [row]}).splitlines() == [
        "| program | batch 1 | of plain (quartiles) | batch 16 | of plain (quartiles) |",
        "|---|---|---|---|---|",
        "| plain | 2.00 ms | 1.00 (1.00 to 1.00) | 2.00 ms | 1.00 (1.00 to 1.00) |",
    ]


def test_what_export_tells_of_live_trees_is_what_the_runs_hold():
    rows, errors, folded, static = list(gate_study.rows_of(EXPORT / "live_tree_runs")), [], [], []
    for setting in (setting for setting in gate_study.LIVE if setting.model == "resnet20"):
        last = [row for row in rows if (row["setting"], row["epoch"]) == (setting.name, "10")]
        errors.append(float(last[0]["error"]))
        folded.append(f"{float(last[0]['error_folded']):.2f}")
        static.append(f"{sum(float(row['width']) <= 1e-4 for row in last)} of {len(last)}")
        assert min(float(row["width"]) for row in last if row["gate"] > "layer3.1") > 0.88
    each = ", ".join(f"{error:.2f}" for error in errors)
    spread = f"{statistics.mean(errors):.2f} % | {statistics.stdev(errors):.2f}"
    told = f"| live trees | {each} % | {spread} | {', '.join(static)} | {', '.join(folded)} % |"
    assert told in (EXPORT / "README.md").read_text()


@pytest.mark.parametrize(("model", "title"), [("resnet18", "ResNet-18"), ("wrn10_4", "WRN-10-4")])
@pytest.mark.parametrize(
    ("folder", "start", "called"),
    [("live_tree_runs", "live-seed0", "live"), ("gate_study_runs", "slope0", "the paper's")],
)
def test_what_export_tells_of_wide_live_trees_is_what_the_runs_hold(model, title, folder, start, called):
    name = f"{model}-wd0.0005-{start}"
    rows = [row for row in gate_study.rows_of(EXPORT / folder) if row["setting"] == name]
    last = [row for row in rows if row["epoch"] == "6"]
    widths = [float(row["width"]) for row in last]
    static = f"{sum(width <= 1e-4 for width in widths)} of {len(widths)}"
    ends = f"{min(widths):.2f}, {max(widths):.2f}"
    errors = f"{float(last[0]['error']):.2f} %, {float(last[0]['error_folded']):.2f} %"
    told = f"| {title} | {called} | {static} | {ends} | {errors} |"
    assert told in (EXPORT / "README.md").read_text()


def test_live_trees_vary_at_every_node():
    torch.manual_seed(0)
    first, second = TAM(512), TAM(512)
    model, x = torch.nn.Sequential(first, torch.nn.Conv2d(512, 512, 1), second), torch.randn(8, 512, 8, 8)
    for slope in (0.5, 0.25):
        gate_study.set_slopes(model, slope)
        assert climb(x, first.tree).std() < 1e-2
    gate_study.enliven(model, x)
    for tree, entering in ((first.tree, x), (second.tree, model[:2](x))):
        for depth, layer in enumerate(tree):
            if isinstance(layer, torch.nn.Conv2d):
                std, mean = torch.std_mean(tree[: depth + 1](entering), dim=(0, 2, 3))
                torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-3, atol=0)
                torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
            else:
                assert (layer.weight == 0.25).all()


def test_gates_stand_still_before_training_in_the_deepest_tree_alone(monkeypatch, capsys):
    monkeypatch.setattr(gate_study, "UNTRAINED", (("resnet18", 2), ("resnet18", 64)))
    gate_study.show_untrained(random_split(8, 0), random_split(8, 1), seeds=1)
    deep, flat = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    assert deep[:2] == ["| resnet18_tam", "2"] and 3 <= int(deep[2].removesuffix(" of 8")) < 8
    assert flat[:3] == ["| resnet18_tam", "64", "0 of 8"] and 0.1 < float(flat[3].removesuffix(" |")) <= 1


@pytest.mark.parametrize(
    ("command", "table", "told"),
    [
        ("show OUT", None, "expected the CSV files of a study, found none"),
        ("show OUT", "a,b\n1,2\n", "x.csv: expected the columns setting, epoch, gate"),
        ("show OUT", ",".join(gate_study.COLUMNS) + "\n1,2\n", "x.csv: expected the columns setting, epoch"),
        ("run --data OUT --out OUT --images 1", None, "expected --images of at least 2"),
        ("run --data OUT --out OUT --train-images 0", None, "--train-images and --epochs of at least 1"),
    ],
)
def test_a_study_that_cannot_be_is_one_sentence(tmp_path, monkeypatch, capsys, command, table, told):
    if table:
        (tmp_path / "x.csv").write_text(table)
    monkeypatch.setattr(sys, "argv", ["gate_study", *command.replace("OUT", str(tmp_path)).split()])
    with pytest.raises(SystemExit) as stop:
        gate_study.main()
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_an_interrupt_is_one_word(capsys):
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
