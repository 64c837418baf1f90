import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tamzoo.catalogue import ENTRIES
from tamzoo.checkpoint import save_weights
from tamzoo.data import Split
from tamzoo.datasets import DATASETS
from tamzoo.evaluate import evaluate
from tamzoo.images import PICTURES, random_crops
from tamzoo.onnx_export import metadata_of, open_session
from tamzoo.results import README_MARKS, record_of
from tests.colours import colour_onnx
from tests.conftest import refused
from tests.standins import a_record


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    save_weights(path, timm.create_model("resnet20_tam.cifar10").state_dict())
    return path


def test_list_shows_every_row_and_patterns_narrow_it(tamzoo):
    code, out, _ = tamzoo("list")
    assert code == 0 and all(name in out for name in ENTRIES)
    code, out, _ = tamzoo("list", "resnet50*.svhn")
    assert code == 0 and "resnet50_tam.svhn" in out and "cifar" not in out
    record = record_of(ENTRIES["resnet18_tam.cifar10"])
    code, out, _ = tamzoo("list", "resnet18_tam.cifar10")  # all epochs, where one run began with another
    assert record and f"{record.spans[-1][1]} │    here" in out
    code, out, _ = tamzoo("list", "--all", "wrn28_10*")
    assert code == 0 and len(out.split()) == 5 * 4
    code, out, err = tamzoo("list", "vgg*")
    assert code == 2 and not out and "nothing matches 'vgg*'" in err


def test_list_tells_weights_that_are_not_in_this_installation(tamzoo, monkeypatch):
    monkeypatch.setattr("tamzoo.hub.CARDS", None)
    code, out, _ = tamzoo("list", "resnet18_*.cifar100")
    weights = {
        line.split("│")[1].strip(): line.split("│")[-2].strip()
        for line in out.splitlines()
        if "resnet" in line
    }
    assert (
        code == 0
        and weights["resnet18_tam.cifar100"] == "in a clone"
        and weights["resnet18_se.cifar100"] == "no"
    )


def test_the_package_runs_as_a_command():
    command = [sys.executable, "-m", "tamzoo", "list", "vgg*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "nothing matches 'vgg*'" in done.stderr


def test_info_tells_the_papers_cell(tamzoo):
    code, out, _ = tamzoo("info", "resnet50_tam.cifar100")
    told = json.loads(out)
    assert code == 0 and told["paper"]["top1_error"] == 22.42 and told["parameters"] == 23_765_588


def test_predict_gives_probabilities(tamzoo, weights):
    common = ("-m", "resnet20_tam.cifar10", "--weights", weights, "--json")
    code, out, err = tamzoo("predict", PICTURES / "cat.jpg", PICTURES / "horse.jpg", *common, "--top", 10)
    assert code == 0, err
    found = json.loads(out)
    assert [answer["image"] for answer in found] == [str(PICTURES / "cat.jpg"), str(PICTURES / "horse.jpg")]
    assert sum(row["probability"] for row in found[0]["top"]) == pytest.approx(1, abs=1e-5)
    for given in (PICTURES, PICTURES.parent, f"{PICTURES}/*.jpg"):  # a folder, one above it, a glob
        code, out, _ = tamzoo("predict", given, *common)
        assert code == 0 and len(json.loads(out)) == 5


def test_a_wrong_picture_among_others_costs_no_other(tamzoo, tmp_path, weights):
    wrong_pictures(tmp_path)
    shutil.copy(PICTURES / "cat.jpg", tmp_path)
    common = ("predict", tmp_path, "-m", "resnet20_tam.cifar10", "--weights", weights)
    code, out, err = tamzoo(*common)
    assert code == 2 and out.startswith(f"{tmp_path / 'cat.jpg'}: ") and out.count("\n") == 1
    assert f"{tmp_path / 'moving.gif'}: animated, 2 frames" in err
    assert "6 of 7 pictures have no answer, for the reasons above" in err
    code, out, err = tamzoo(*common, "--json")
    found = {Path(each["image"]).name: each for each in json.loads(out)}
    assert code == 2 and len(found) == 7 and len(found["cat.jpg"]["top"]) == 5
    assert found["tiny.png"] == {
        "image": str(tmp_path / "tiny.png"),
        "error": f"{tmp_path / 'tiny.png'}: 1x1 pixels; expected at least 8x8",
    }


def test_a_large_picture_is_answered_without_a_warning(tamzoo, weights, monkeypatch):
    cat = PICTURES / "cat.jpg"
    with Image.open(cat) as picture:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", picture.width * picture.height - 1)
    code, out, err = tamzoo("predict", cat, "-m", "resnet20_tam.cifar10", "--weights", weights)
    assert (code, err) == (0, "") and out.startswith(str(cat))


def test_version(tamzoo):
    assert tamzoo("--version") == (0, f"tamzoo {version('tamzoo')}\n", "")


@pytest.mark.parametrize("flag", [None, "--uint8", "--keep-gates"])
def test_an_exported_file_predicts_what_the_model_predicts(tamzoo, tmp_path, flag):
    path = tmp_path / "model.onnx"
    flags = [flag] if flag else []
    code, out, err = tamzoo("export", "wrn10_4_tam.cifar10", "-o", path, *flags)
    assert code == 0, err
    assert "same top-1 on 256" in out and path.is_file()
    told = metadata_of(open_session(path))
    assert told["input"] == ("uint8 NHWC" if flag == "--uint8" else "float32 NCHW")
    assert len(told["gates_left"]) == (3 if flag == "--keep-gates" else 0)
    answers = []
    for source in (("--onnx", path), ("-m", "wrn10_4_tam.cifar10")):
        code, out, _ = tamzoo("predict", PICTURES / "cat.jpg", "--json", *source)
        answers.append(json.loads(out)[0]["top"])
    assert [row["label"] for row in answers[0]] == [row["label"] for row in answers[1]]
    for a, b in zip(*answers, strict=True):
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-3)


def test_weights_of_other_classes_and_group_sizes_are_exported(tamzoo, tmp_path):
    weights, out = tmp_path / "model.safetensors", tmp_path / "x.onnx"
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    made = {"num_classes": 5, "group_size": 4}
    sha256 = save_weights(weights, timm.create_model("resnet20_tam.cifar10", **made).state_dict())
    command = ("export", "resnet20_tam.cifar10", "--weights", weights, "-o", out)
    refused(tamzoo(*command), "these weights are not of resnet20_tam.cifar10")
    record = a_record(ENTRIES["resnet20_tam.cifar10"], sha256)
    (tmp_path / "record.json").write_text(replace(record, model_args={"group_size": 4}).to_json())
    plain = ("export", "resnet20_plain.cifar10", "--weights", weights, "-o", out)
    refused(tamzoo(*plain), "resnet20_plain.cifar10 cannot be made with", "'group_size': 4")
    code, _, err = tamzoo(*command, "--labels", tmp_path / "names.txt")
    assert code == 0, err
    assert metadata_of(open_session(out))["labels"] == list("abcde")
    code, told, _ = tamzoo("predict", PICTURES / "cat.jpg", "--json", "--onnx", out)
    assert code == 0 and {row["label"] for row in json.loads(told)[0]["top"]} == set("abcde")


def test_a_model_of_other_classes_has_no_score(tamzoo, tmp_path, monkeypatch):
    split = Split(pixels=random_crops(256, 32), labels=torch.zeros(256, dtype=torch.int64))
    monkeypatch.setattr("tamzoo.data.load_split", lambda *where: split)
    weights = tmp_path / "model.safetensors"
    save_weights(weights, timm.create_model("resnet20_tam.cifar10", num_classes=5).state_dict())
    command = ("evaluate", "resnet20_tam.cifar10", "--weights", weights, "--data", tmp_path)
    refused(tamzoo(*command), "expected a model of 10 classes, as CIFAR-10 has, got one of 5")


def test_the_command_evaluates_as_the_function_does(tamzoo, tmp_path, monkeypatch):
    split = Split(pixels=random_crops(20, 32), labels=torch.arange(20) % 10, note="a note")
    monkeypatch.setattr("tamzoo.data.load_split", lambda *where: split)
    code, out, err = tamzoo("evaluate", "wrn10_4_tam.cifar10", "--data", tmp_path)
    model = timm.create_model("wrn10_4_tam.cifar10", pretrained=True).eval()
    score = evaluate(model, split, DATASETS["cifar10"])
    assert code == 0 and json.loads(out) == {"entry": "wrn10_4_tam.cifar10"} | asdict(score), err


def holds_a_path_of_this_machine(path):
    places, content = (Path(__file__).parents[1], Path(torch.__file__).parents[1]), path.read_bytes()
    return any(str(place).encode() in content for place in places)


def test_the_suffix_chooses_what_is_exported(tamzoo, tmp_path):
    for suffix in ("safetensors", "pt2"):
        path = tmp_path / f"model.{suffix}"
        code, out, err = tamzoo("export", "wrn10_4_tam.cifar10", "-o", path)
        assert code == 0 and "3 of 3 gates folded, 3 of them proven" in out and "same top-1 on 256" in out, (
            err
        )
        assert not holds_a_path_of_this_machine(path)
    other = (
        "predict",
        PICTURES / "cat.jpg",
        "-m",
        "wrn10_4_plain.cifar100",
        "--weights",
        tmp_path / "model.safetensors",
    )
    refused(tamzoo(*other), "it is of wrn10_4_plain.cifar10, not of wrn10_4_plain.cifar100")
    refused(tamzoo("export", "wrn10_4_tam.cifar10", "-o", tmp_path / "x.h5"), "a file named .onnx, .safeten")


def test_an_onnx_file_has_the_precision_asked_for(tamzoo, tmp_path, monkeypatch):
    split = Split(pixels=random_crops(256, 32), labels=torch.zeros(256, dtype=torch.int64))
    monkeypatch.setattr("tamzoo.data.load_split", lambda *where: split)
    monkeypatch.delenv("TAMZOO_DATA", raising=False)
    common, sizes = ("export", "wrn10_4_tam.cifar10", "-o"), {}
    for precision, data in {"float32": (), "float16": (), "int8": ("--data", tmp_path)}.items():
        path = tmp_path / f"{precision}.onnx"
        code, out, err = tamzoo(*common, path, "--precision", precision, *data)
        assert code == 0 and "onnxruntime" in out, err
        assert metadata_of(open_session(path))["precision"] == precision
        assert not holds_a_path_of_this_machine(path)
        sizes[precision] = path.stat().st_size
    assert sizes["int8"] < 0.6 * sizes["float16"] < 0.36 * sizes["float32"]
    new = tmp_path / "new.onnx"
    refused(tamzoo(*common, new, "--precision", "int8"), "pass --data DIR or set TAMZOO_DATA")
    refused(tamzoo(*common, new, "--precision", "int8", "--uint8"), "an int8 file takes float32 pixels")
    refused(tamzoo(*common, tmp_path / "new.pt2", "--precision", "float16"), "is of .onnx files")
    assert not list(tmp_path.glob("new.*"))


def test_gates_are_measured_on_the_shipped_pictures(tamzoo, weights):
    arguments = ("gates", "resnet20_tam.cifar10", "--weights", weights, "--images", 8)
    code, out, _ = tamzoo(*arguments, "--json")
    assert code == 0 and [gate["n"] for gate in json.loads(out)] == [8] * 9
    assert all(gate["proven_min"] is not None for gate in json.loads(out))
    code, out, _ = tamzoo(*arguments)
    assert code == 0 and "layer3.2.se" in out and "8 crops of the shipped pictures and noise" in out


# Bad input: one sentence, exit code 2, nothing written.


def test_unknown_names_are_refused_with_the_nearest(tamzoo):
    refused(tamzoo("info", "resnet50_tamm"), "no model 'resnet50_tamm'; nearest: resnet50_tam")
    refused(tamzoo("predict", PICTURES, "-m", "resnet50_tam.cifar11"), "resnet50_tam has no tag 'cifar11'")
    refused(tamzoo("gates", "resnet152_tam"), "resnet152_tam.cifar100 has no trained weights yet")


def test_wrong_weights_are_refused(tamzoo, tmp_path, weights):
    path = tmp_path / "x.safetensors"
    command = ("predict", PICTURES, "-m", "resnet20_tam.cifar10", "--weights", path)
    refused(tamzoo(*command), "expected a safetensors file, found nothing")
    torch.save({"a": torch.zeros(1)}, path)
    refused(tamzoo(*command), "expected safetensors, got a pickle")
    path.write_bytes(weights.read_bytes()[:5000])
    refused(tamzoo(*command), "not a whole safetensors file")
    save_file({"a": torch.zeros(1)}, path)
    refused(tamzoo(*command), "these weights are not of resnet20_tam.cifar10")


def test_weights_that_are_not_numbers_are_refused(tamzoo, tmp_path, weights):
    path, state = tmp_path / "nan.safetensors", load_file(weights)
    state["fc.bias"][3] = torch.nan
    save_file(state, path)
    common, told = ("resnet20_tam.cifar10", "--weights", path), "nan.safetensors: fc.bias holds NaN"
    refused(tamzoo("predict", PICTURES, "-m", *common), told)
    refused(tamzoo("export", *common, "-o", tmp_path / "x.onnx"), told)
    refused(tamzoo("gates", *common), told)
    assert not (tmp_path / "x.onnx").exists()


def wrong_pictures(folder):
    new = Image.new
    new("RGB", (1, 1)).save(folder / "tiny.png")
    new("I;16", (32, 32)).save(folder / "deep.png")
    new("RGBA", (32, 32)).save(folder / "transparent.png")
    new("CMYK", (32, 32)).save(folder / "press.jpg")
    new("RGB", (32, 32)).save(
        folder / "moving.gif", save_all=True, append_images=[new("RGB", (32, 32), "red")]
    )
    (folder / "text.jpg").write_text("text")


@pytest.mark.parametrize(
    "name", ["tiny.png", "deep.png", "transparent.png", "press.jpg", "moving.gif", "text.jpg"]
)
def test_wrong_pictures_are_refused(tamzoo, tmp_path, weights, name):
    wrong_pictures(tmp_path)
    refused(tamzoo("predict", tmp_path / name, "-m", "resnet20_tam.cifar10", "--weights", weights), name)


def test_an_empty_folder_is_refused(tamzoo, tmp_path):
    (tmp_path / "._cat.jpg").write_text("a Mac's notes on cat.jpg")
    refused(tamzoo("predict", tmp_path), "an empty folder; expected .jpg")


def test_an_output_that_cannot_be_written_is_refused(tamzoo, tmp_path, weights):
    arguments = ("export", "resnet20_tam.cifar10", "--weights", weights, "-o")
    refused(tamzoo(*arguments, tmp_path / "missing" / "x.onnx"), "cannot write", "there is no folder")
    (tmp_path / "folder.onnx").mkdir()
    refused(tamzoo(*arguments, tmp_path / "folder.onnx"), "folder.onnx: expected the name of a file, found a")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--onnx", "x.onnx", "-m", "wrn10_4_tam"), "leave out either it or --model and --weights"),
        (("--onnx", "x.onnx", "--weights", "x.safetensors"), "leave out either it or --model and --weights"),
        (("--ray", "local"), "pass --out FILE.parquet too"),
        (("--batch", 64), "pass --out FILE.parquet too"),
        (("--column", "image"), "pass --out FILE.parquet too"),
        (("--labels", "x.txt"), "pass --onnx FILE too"),
        (("--json", "--out", "x.parquet"), "leave out either it or --out"),
        (("*.jpg",), "*.jpg: matches nothing"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tamzoo, given, told):
    refused(tamzoo("predict", PICTURES, *given), told)


def test_options_that_another_makes_needless_are_refused(tamzoo, tmp_path):
    export = ("export", "wrn10_4_tam.cifar10", "-o", tmp_path / "x.onnx", "--keep-gates")
    refused(tamzoo(*export, "--tolerance", 0.5), "leave it out, or --keep-gates")
    predict = ("predict", PICTURES, "--out", tmp_path / "x.parquet", "--column", "image")
    refused(tamzoo(*predict), "column 'image' is of parquet files, and there are none")
    assert not list(tmp_path.iterdir())


def test_parquet_files_need_an_output(tamzoo, tmp_path):
    (tmp_path / "shard.parquet").touch()
    refused(tamzoo("predict", tmp_path), "shard.parquet: parquet files need an output; pass --out FILE.parq")


def test_a_pattern_without_the_queue_is_refused(tamzoo, tmp_path):
    given = ("train", "resnet20_tam.cifar10", "--only", "*_tam.*", "--out", tmp_path / "run")
    refused(tamzoo(*given), "--only chooses from the queue: pass --queue too")


@pytest.mark.parametrize("budget", ["-5", "nan"])
def test_a_budget_that_is_no_time_is_refused(tamzoo, tmp_path, budget):
    given = ("train", "resnet20_tam.cifar10", "--time-budget", budget, "--out", tmp_path / "run")
    refused(tamzoo(*given), "--time-budget must be a number of seconds from 0 on, got")
    assert not (tmp_path / "run").exists()


def test_processes_that_torchrun_did_not_start_are_refused(tamzoo, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RANK", "0")
    given = ("train", "resnet20_tam.cifar10", "--out", tmp_path / "run")
    refused(tamzoo(*given), "WORLD_SIZE is '2', but LOCAL_RANK is '', not a number; start several processes")


def test_verify_finds_that_an_entry_is_not_there(tamzoo, tmp_path, monkeypatch):
    monkeypatch.setattr("tamzoo.hub.CARDS", tmp_path)
    code, out, _ = tamzoo("verify", "resnet18_tam.cifar10", "--no-remote")
    assert code == 1 and "resnet18_tam.cifar10: here: README.md is missing" in out
    monkeypatch.setattr("tamzoo.hub.CLONED", False)
    code, out, _ = tamzoo("verify", "resnet34_tam.svhn")
    assert code == 1 and "nowhere: nothing to check" in out


def test_the_queue_does_not_begin_with_one_entrys_weights(tamzoo, tmp_path):
    given = ("--queue", "--initial-checkpoint", tmp_path, "--out", tmp_path / "runs")
    refused(tamzoo("train", *given), "--initial-checkpoint is of one entry: pass its name")
    assert not (tmp_path / "runs").exists()


def test_results_outside_a_clone_are_refused_and_nothing_is_written(tamzoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tamzoo("results"), "expected a clone of tamzoo, found no README.md")
    (tmp_path / "README.md").write_text("another project's")
    refused(tamzoo("results"), "the README lacks the marks")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_results_are_not_written_from_the_records_of_another_installation(tamzoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(" ".join(README_MARKS))
    (tmp_path / "model_cards").mkdir()
    refused(tamzoo("results"), "reads its records from", "install this clone")
    assert (tmp_path / "README.md").read_text() == " ".join(README_MARKS)


def test_a_name_that_the_terminal_cannot_show_costs_no_answer(tmp_path):
    for name in ("a.png", "\N{SNOWMAN}.png", "z.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    onnx = colour_onnx(tmp_path / "x.onnx")
    command = [sys.executable, "-m", "tamzoo", "predict", tmp_path, "--onnx", onnx]
    command += "--mean 0 0 0 --std 1 1 1".split()
    told = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert told.returncode == 0, told.stderr.decode()
    assert [name in told.stdout for name in (b"a.png", b"\\u2603.png", b"z.png")] == [True] * 3


def test_a_command_that_is_told_to_end_leaves_nothing_half_written(tmp_path):
    script = (
        "import os, signal, time, tamzoo.cli\n"
        "from pathlib import Path\n"
        "from tamzoo.checkpoint import whole_file\n"
        "def work():\n"
        "    with whole_file(Path('x.onnx')):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "tamzoo.cli.app = work\n"
        "tamzoo.cli.main()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path).returncode == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "gates", "analyze"])
def test_a_device_that_is_not_there_is_told(tamzoo, tmp_path, command):
    for device in ("gpu", "meta", "cuda:99"):
        asked = (command, "resnet20_tam.cifar10", "--data", tmp_path, "--device", device)
        refused(tamzoo(*asked), f"cannot compute on '{device}'")


def test_missing_data_is_told(tamzoo, tmp_path, monkeypatch):
    monkeypatch.delenv("TAMZOO_DATA", raising=False)
    refused(tamzoo("evaluate", "resnet20_tam.cifar10"), "pass --data DIR or set TAMZOO_DATA")
    refused(tamzoo("evaluate", "resnet20_tam.cifar10", "--data", tmp_path / "x"), "found no such directory")
    refused(tamzoo("gates", "resnet20_plain.cifar10"), "no trained weights")
