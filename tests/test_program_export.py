import io
import json
import zipfile
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tamzoo.data import normalise
from tamzoo.datasets import DATASETS
from tamzoo.deploy import EXACT, FLOAT16, INT8, Parity, as_input, deployment, told_of
from tamzoo.images import random_crops
from tamzoo.program_export import EXPORTERS, export_plain, export_program, exporter_for, load_program

ENTRY = "wrn10_4_tam.cifar10"
CIFAR10 = DATASETS["cifar10"]
PIXELS = random_crops(256, 32)


@pytest.fixture(scope="module")
def made():
    return deployment(timm.create_model(ENTRY, pretrained=True).eval(), pixels=PIXELS)


def logits(model, pixels=PIXELS[:8]):
    with torch.no_grad():
        return model(normalise(pixels, CIFAR10))


def test_the_plain_checkpoint_loads_strictly_into_the_plain_architecture(made, tmp_path):
    path = tmp_path / "plain.safetensors"
    parity = export_plain(made, path)
    assert parity.same_top1 == 256 and parity.max_difference <= 1e-3
    plain = timm.create_model("wrn10_4_plain.cifar10").eval()
    plain.load_state_dict(load_file(path), strict=True)
    torch.testing.assert_close(logits(plain), logits(made.reference), rtol=1e-3, atol=1e-3)
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    assert told["format"] == "pt" and told["architecture"] == "wrn10_4_plain.cifar10"
    assert told["entry"] == ENTRY and json.loads(told["labels"])[3] == "cat"


def test_a_compiled_model_deploys_as_itself(made):
    compiled = deployment(torch.compile(made.reference), pixels=PIXELS)
    assert compiled.told == made.told and compiled.report == made.report and made.report.proven


@pytest.mark.parametrize("classes", [5, 0])
def test_a_plain_checkpoint_has_the_classes_of_its_model(classes, tmp_path):
    model = timm.create_model(ENTRY, pretrained=True, num_classes=classes).eval()
    export_plain(deployment(model, pixels=PIXELS), tmp_path / "plain.safetensors")
    plain = timm.create_model("wrn10_4_plain.cifar10", num_classes=classes).eval()
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"), strict=True)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("resnet18"), "expected a model of tamzoo .* ResNet of tag 'a1_in1k'"),
        (lambda: torch.nn.ReLU(), "expected a model of tamzoo .* ReLU of tag None"),
        (lambda: timm.create_model(ENTRY).to("meta"), "takes a model on the CPU, got one on meta"),
        (lambda: timm.create_model(ENTRY, in_chans=1), "pictures of 3 channels.* this model takes 1"),
        (lambda: timm.create_model(ENTRY, features_only=True), "expected a model of tamzoo"),
        (lambda: timm.create_model(ENTRY).half(), "takes a float32 model, got one in torch.float16"),
        (
            lambda: timm.create_model("wrn10_4_plain.cifar10").double(),
            "got one in torch.float64; pass model.f",
        ),
        (
            lambda: timm.create_model(ENTRY, pretrained_cfg_overlay={"input_size": (3, 32, 64)}),
            r"to check it on are \(3, 64, 64\), the model's configuration says \(3, 32, 64\)",
        ),
    ],
)
def test_what_is_not_a_model_of_the_zoo_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        deployment(model().eval())


def test_images_of_another_size_are_refused(made):
    with pytest.raises(ValueError, match=r"are \(3, 48, 48\), the model's configuration says \(3, 32, 32\)"):
        deployment(made.reference, pixels=random_crops(256, 48))


def test_a_file_tells_the_names_of_classes_that_its_model_has():
    names = list("abcde")
    of_the_model = {"pretrained_cfg_overlay": {"label_names": names}}
    model = timm.create_model(ENTRY, num_classes=5, **of_the_model).eval()
    assert deployment(model).dataset.class_names == tuple(names)
    assert deployment(model, labels="vwxyz").dataset.class_names == tuple("vwxyz")
    with pytest.raises(ValueError, match="a model of 5 classes got 4 labels"):
        deployment(model, labels="abcd")
    assert deployment(timm.create_model(ENTRY, num_classes=4).eval()).dataset.class_names is None


def test_a_head_that_was_replaced_decides_how_many_classes_there_are(tmp_path):
    model = timm.create_model(ENTRY, pretrained=True).eval()
    model.fc = torch.nn.Linear(model.num_features, 5)
    assert deployment(model).dataset.class_names is None
    assert deployment(model, labels="abcde").dataset.class_names == tuple("abcde")
    with pytest.raises(ValueError, match="a model of 5 classes got 10 labels"):
        deployment(model, labels="abcdefghij")
    export_plain(deployment(model), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="call model.eval"):
        deployment(model.train(), keep_gates=True)


def test_not_every_gate_that_folds_is_proven():
    """Nor is one whose constant is not what the proof is of."""
    report = deployment(timm.create_model("wrn16_8_tam.cifar100", pretrained=True).eval()).report
    assert report and len(report.folded) == 6 and 0 < len(report.proven or ()) < 6
    model = timm.create_model(ENTRY, pretrained=True).eval()
    with torch.no_grad():
        model.layer3[0].se.tree[-1].bias += 0.03
    report = deployment(model, tolerance=0.01).report
    assert report and len(report.folded) == 3 and report.proven == ("layer1.0.se", "layer2.0.se")


def test_proofs_are_of_the_inputs_that_the_model_takes():
    """Of a large standard deviation these hardly differ, and all six gates are proven, not four."""
    like = {"pretrained_cfg_overlay": {"std": (1e6,) * 3}}
    report = deployment(timm.create_model("wrn16_8_tam.cifar100", pretrained=True, **like).eval()).report
    assert report and len(report.folded) == len(report.proven or ()) == 6


@pytest.mark.parametrize("uint8", [False, True])
def test_a_program_answers_for_any_batch_and_tells_what_an_onnx_file_tells(made, tmp_path, uint8):
    path = tmp_path / "model.pt2"
    export_program(made, path, uint8=uint8)
    extra = {"tamzoo.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for n in (1, 3, 8):
        found = program(as_input(PIXELS[:n], CIFAR10, uint8))
        torch.testing.assert_close(found, logits(made.reference, PIXELS[:n]), rtol=1e-3, atol=1e-3)
    told = json.loads(extra["tamzoo.json"])
    assert told["entry"] == ENTRY and told["input"] == ("uint8 NHWC" if uint8 else "float32 NCHW")
    assert not any("sigmoid" in str(node.target) for node in program.graph.nodes), "the gates are gone"


def test_a_program_file_holds_no_pickle_that_could_run_code(made, tmp_path):
    export_program(made, tmp_path / "model.pt2")
    archive = zipfile.ZipFile(tmp_path / "model.pt2")
    configs = [name for name in archive.namelist() if name.endswith("_config.json")]
    assert configs
    for name in configs:
        rows = json.loads(archive.read(name))["config"].values()
        assert not any(row["use_pickle"] for row in rows)
    (sample,) = (name for name in archive.namelist() if "sample_inputs" in name)
    torch.load(io.BytesIO(archive.read(sample)), weights_only=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2"])
def test_a_file_that_disagrees_is_not_written(made, tmp_path, suffix):
    wrong = torch.nn.Sequential(made.reference, torch.nn.Hardtanh(-1, 1)).eval()
    with pytest.raises(ValueError, match="is not written, the export disagrees with the model"):
        EXPORTERS[suffix](replace(made, reference=wrong), tmp_path / f"x{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_become_a_plain_checkpoint_is_refused(made, tmp_path):
    path = tmp_path / "x.safetensors"
    unmeasured = deployment(timm.create_model("resnet20_tam.cifar10").eval(), pixels=PIXELS)
    with pytest.raises(
        ValueError,
        match="become a resnet20_plain.cifar10 checkpoint: 9 of its attentions stay .first: layer1.0.se",
    ):
        export_plain(unmeasured, path)
    se = deployment(timm.create_model("resnet20_se.cifar10").eval(), pixels=PIXELS)
    with pytest.raises(ValueError, match="SEModule depends on its input by design.; export to .onnx or .pt2"):
        export_plain(se, path)
    with pytest.raises(ValueError, match="a plain checkpoint cannot keep gates"):
        export_plain(deployment(made.reference, pixels=PIXELS, keep_gates=True), path)
    with pytest.raises(ValueError, match="weights take no bytes"):
        export_plain(made, path, uint8=True)
    assert list(tmp_path.iterdir()) == []


def test_gates_may_stay_in_a_program(tmp_path):
    kept = deployment(timm.create_model(ENTRY, pretrained=True).eval(), pixels=PIXELS, keep_gates=True)
    assert kept.model is kept.reference and len(told_of(kept.model, kept.dataset)["gates_left"]) == 3
    export_program(kept, tmp_path / "x.pt2")
    found = load_program(tmp_path / "x.pt2")(as_input(PIXELS[:8], CIFAR10))
    torch.testing.assert_close(found, logits(kept.reference), rtol=1e-4, atol=1e-4)


def test_a_file_passes_by_its_logits_and_by_its_answers():
    def passes(tolerance, max_difference, same_top1):
        found = Parity(
            program="x", n=200, max_difference=max_difference, same_top1=same_top1, tolerance=tolerance
        )
        return found.passed

    for tolerance, least in ((EXACT, 200), (FLOAT16, 198), (INT8, 180)):
        assert passes(tolerance, tolerance.difference, least)
        assert not passes(tolerance, 0.0, least - 1)
        assert not passes(tolerance, 1.01 * tolerance.difference, 200)
        assert not passes(tolerance, float("nan"), 200)


def test_a_folder_cannot_be_the_file(made, tmp_path):
    with pytest.raises(ValueError, match="expected the name of a file, found a folder"):
        export_plain(made, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x.pth: expected a file named .onnx, .safetensors, .pt2"):
        exporter_for(tmp_path / "x.pth")
