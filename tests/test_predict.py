import os
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, numpy_helper
from PIL import Image
from timm.data import create_transform
from torch import nn

from tamzoo.answers import answer
from tamzoo.datasets import DATASETS
from tamzoo.deploy import as_texts, deployment, told_of
from tamzoo.images import PICTURES, open_picture
from tamzoo.predict import Classifier, open_classifier, predict, read_labels, torch_classifier
from tests.colours import LABELS, colour_classifier, colour_onnx

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
OURS = {"entry": "x", "labels": "null", "mean": "[0, 0, 0]", "std": "[1, 1, 1]", "input": "float32 NCHW"}


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("size", [(32, 32), (40, 70), (20, 9)])
def test_pictures_become_what_timms_transform_makes_of_them(size, crop_pct):
    seen = []
    classifier = Classifier(
        run=lambda batch: seen.append(batch) or np.zeros((len(batch), 2), np.float32),
        labels=None,
        input_size=(3, 32, 32),
        mean=MEAN,
        std=STD,
        crop_pct=crop_pct,
    )
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    classifier.best(np.stack([classifier.pixels(picture)]), 1)
    transform = create_transform((3, 32, 32), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=crop_pct)
    assert torch.equal(torch.from_numpy(seen[0][0]), transform(picture))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_file_that_is_not_ours_is_used_with_what_it_does_not_tell(tmp_path, kind):
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    path = colour_onnx(tmp_path / "x.onnx", kind)
    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / "x.png")
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    classifier = open_classifier(path, mean=zeros, std=ones, labels=tmp_path / "labels.txt")
    ((best, *_),) = predict(classifier, [tmp_path / "x.png"])
    scores = np.exp(np.array([10, 200, 30]) / 255)
    assert best[0] == "green" and best[1] == pytest.approx(scores[1] / scores.sum(), abs=1e-3)
    classifier = open_classifier(path, mean=zeros, std=ones)
    assert predict(classifier, [tmp_path / "x.png"])[0][0][0] == "1"


def test_a_file_that_is_not_ours_says_what_is_missing_and_how_to_pass_it(tmp_path):
    path = colour_onnx(tmp_path / "x.onnx", entry="x")
    with pytest.raises(
        ValueError,
        match=r"lack input, input_size, labels, mean, std; .*--mean R G B, --std R G B and --labels",
    ):
        open_classifier(path)
    with pytest.raises(ValueError, match="--mean and --std belong together"):
        open_classifier(path, mean=MEAN)


def test_mean_and_std_are_of_graphs_that_need_them(tmp_path):
    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / "x.png")
    path = colour_onnx(tmp_path / "bytes.onnx", TensorProto.UINT8)
    assert predict(open_classifier(path), [tmp_path / "x.png"])[0][0][0] == "1"
    with pytest.raises(ValueError, match="this one takes bytes; leave them out"):
        open_classifier(path, mean=MEAN, std=STD)
    ours = colour_onnx(tmp_path / "ours.onnx", **OURS, input_size="[3, 8, 8]")
    with pytest.raises(ValueError, match="this one tells its own; leave them out"):
        open_classifier(ours, mean=MEAN, std=STD)


def test_graphs_that_do_not_fit_are_refused(tmp_path):
    other = colour_onnx(tmp_path / "size.onnx", **OURS, input_size="[3, 32, 32]")
    with pytest.raises(ValueError, match=r"graph takes \(3, 8, 8\) as float, its metadata say \(3, 32, 32\)"):
        open_classifier(other)
    one = colour_onnx(tmp_path / "one.onnx", batch=1)
    with pytest.raises(ValueError, match=r"any batch size.*image: tensor\(float\) \[1, 3, 8, 8\]"):
        open_classifier(one, mean=MEAN, std=STD)
    (tmp_path / "labels.txt").write_text("a\nb\n")
    path = colour_onnx(tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="has 3 classes, but there are 2 labels"):
        open_classifier(path, mean=MEAN, std=STD, labels=tmp_path / "labels.txt")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("mean", "null", "None, expected three numbers"),
        ("mean", "[0.1, 0.2]", "[0.1, 0.2], expected three numbers"),
        ("std", "[0, 0, 0]", "[0, 0, 0], expected three positive numbers"),
        ("input", '["a"]', "['a'], expected a text"),
        ("labels", "[0, 1, 2]", "[0, 1, 2], expected a list of texts"),
        ("labels", '{"0": 1}', "{'0': 1}, expected a list of texts"),
        ("crop_pct", "none", "'none', expected a positive number"),
    ],
)
def test_damaged_metadata_are_refused(tmp_path, key, value, told):
    path = colour_onnx(tmp_path / "x.onnx", **(OURS | {"input_size": "[3, 8, 8]", key: value}))
    with pytest.raises(ValueError, match=re.escape(f"x.onnx: {key} in its metadata is {told}")):
        open_classifier(path)


def test_metadata_that_are_no_json_are_refused(tmp_path):
    path = colour_onnx(tmp_path / "x.onnx", **(OURS | {"input_size": "[3, 8,"}))
    with pytest.raises(ValueError, match=r"this ONNX file's metadata are damaged \(.*; export it again"):
        open_classifier(path)


def test_logits_that_are_no_numbers_are_no_answer(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")

    def run(batch: np.ndarray) -> np.ndarray:
        logits = batch.mean((2, 3))
        return np.where(logits[:, 2:] > 0, np.nan, logits)

    classifier = replace(colour_classifier(), run=run, mean=(0.0, 0.0, 0.0))
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    with pytest.raises(ValueError, match=r"blue.png: the model's logits for it hold NaN or infinity"):
        predict(classifier, paths)
    rows = answer(classifier, [(path.name, path) for path in paths]).to_pylist()
    assert rows[0]["label"] == "red" and rows[0]["error"] is None
    assert rows[1]["label"] is rows[1]["top"] is None and "blue.png: the model's logits" in rows[1]["error"]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ([1, 3], "x.onnx: onnxruntime cannot run it on a batch of 3 .*free batch axis"),
        ([1, -1], r"x.onnx: expected .* logits \(n, classes\) of any batch size n, got \(1, 9\) for a batch"),
        ([2, -1], "x.onnx: onnxruntime cannot run it on a batch of 3"),
        ([-1], r"x.onnx: expected .* got \(9,\) for a batch of 3"),
        ([0, -1], "x.onnx: the ONNX graph has 3 classes, but there are 2 labels"),
    ],
)
def test_what_a_graph_does_not_declare_is_found_out_on_opening(tmp_path, to, message):
    path = colour_onnx(tmp_path / "x.onnx")
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(to), "to"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["scores", "to"], ["shaped"]))
    model.graph.output[0].CopyFrom(onnx.helper.make_empty_tensor_value_info("shaped"))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, path)
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=message) as refusal:
        open_classifier(path, mean=MEAN, std=STD, labels=tmp_path / "labels.txt")
    assert "\n" not in str(refusal.value)


def test_a_graph_without_inputs_is_refused(tmp_path):
    path = colour_onnx(tmp_path / "x.onnx")
    model = onnx.load(path)
    image = onnx.numpy_helper.from_array(np.zeros((1, 3, 8, 8), np.float32), "image")
    model.graph.initializer.append(image)
    del model.graph.input[:]
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"expected an ONNX graph with one input .* got none"):
        open_classifier(path, mean=MEAN, std=STD)


def test_a_batch_that_fails_later_names_the_file(tmp_path):
    classifier = open_classifier(colour_onnx(tmp_path / "x.onnx"), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="x.onnx: onnxruntime cannot run it on a batch of 2 "):
        classifier.run(np.zeros((2, 3, 9, 9), np.float32))


@pytest.mark.parametrize(
    ("mean", "std"),
    [(MEAN, (0.0, 0.0, 0.0)), ((123.0, 116.0, 103.0), (58.0, 57.0, 57.0)), ((np.nan, 0.5, 0.5), STD)],
)
def test_mean_and_std_are_of_pixels_from_0_to_1(tmp_path, mean, std):
    path = colour_onnx(tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="of pixels scaled to 0..1: .*divide those of 0..255 by 255"):
        open_classifier(path, mean=mean, std=std)


def test_labels_that_are_not_utf_8_are_named(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels.txt: expected a class name a line in UTF-8"):
        open_classifier(colour_onnx(tmp_path / "x.onnx"), mean=MEAN, std=STD, labels=labels)


def test_a_file_crops_as_its_model_does(tmp_path):
    model = timm.create_model("resnet20_plain.untrained_in1k").eval()
    told = {"entry": "x"} | told_of(model, replace(DATASETS["untrained_in1k"], input_size=(3, 8, 8)))
    path = colour_onnx(tmp_path / "x.onnx", **as_texts(told | {"labels": LABELS}))
    assert open_classifier(path).crop_pct == torch_classifier(model).crop_pct == 0.875
    assert open_classifier(colour_onnx(tmp_path / "y.onnx"), mean=MEAN, std=STD).crop_pct == 1


def test_a_file_tells_of_its_models_own_pixels():
    own = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 64, 64)}
    made = deployment(
        timm.create_model("resnet20_tam.cifar10", pretrained_cfg_overlay=own).eval(), keep_gates=True
    )
    told = told_of(made.model, made.dataset)
    assert {key: told[key] for key in own} == own and made.pixels.shape[1:] == (3, 64, 64)
    assert told["labels"][3] == "cat"


def test_a_model_of_other_classes_does_not_get_the_data_sets_names():
    model = timm.create_model("resnet20_tam.cifar10", num_classes=5).eval()
    made = deployment(model, keep_gates=True)
    assert told_of(made.model, made.dataset)["labels"] is torch_classifier(model).labels is None
    assert made.told["weights_sha256"] == "", "the catalogue's weights are others"
    named = deployment(model, keep_gates=True, labels="abcde")
    assert told_of(named.model, named.dataset)["labels"] == tuple("abcde")
    with pytest.raises(ValueError, match="a model of 5 classes got 3 labels; pass one for each"):
        deployment(model, labels="abc")
    assert torch_classifier(timm.create_model("resnet20_tam.cifar10").eval()).labels[3] == "cat"


def test_a_stem_of_two_convolutions_deploys():
    model = timm.create_model("resnet20_tam.cifar10").eval()
    model.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1))
    assert deployment(model, keep_gates=True).model.conv1 is model.conv1
    model.conv1, model.in_chans = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1)), 4
    with pytest.raises(ValueError, match="pictures of 3 channels, as its data set has; this model takes 4"):
        deployment(model, keep_gates=True)


def test_pictures_are_prepared_as_the_models_configuration_says():
    ours, picture = {"crop_mode": "squash", "interpolation": "bilinear"}, open_picture(PICTURES / "cat.jpg")
    picture = picture.crop((0, 0, 200, 100))
    model = timm.create_model("resnet20_tam.cifar10", pretrained_cfg_overlay=ours).eval()
    wanted = picture.resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(torch_classifier(model).pixels(picture), np.asarray(wanted))
    for key, value in ours.items():
        other = timm.create_model("resnet20_tam.cifar10", pretrained_cfg_overlay={key: value}).eval()
        with pytest.raises(
            ValueError, match=f"prepared by {key} .*, the model's configuration says '{value}'"
        ):
            deployment(other, keep_gates=True)


def test_a_file_in_onnxruntimes_own_format_is_told(tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "x.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(colour_onnx(tmp_path / "x.onnx"), options)
    with pytest.raises(ValueError, match="x.ort: expected an ONNX file, not one in onnxruntime's own format"):
        open_classifier(tmp_path / "x.ort", mean=MEAN, std=STD)


def test_models_are_told_apart(tmp_path):
    path = colour_onnx(tmp_path / "x.onnx")
    zeros = (0.0, 0.0, 0.0)
    first, same = (open_classifier(path, mean=zeros, std=STD).sha256 for _ in range(2))
    assert first == same != open_classifier(path, mean=MEAN, std=STD).sha256
    assert open_classifier(colour_onnx(path, a="b"), mean=zeros, std=STD).sha256 != first
    model = timm.create_model("resnet20_tam.cifar10").eval()
    first, same = (torch_classifier(model).sha256 for _ in range(2))
    torch.nn.init.zeros_(model.fc.bias[3:4])
    assert first == same != torch_classifier(model).sha256


def test_shipped_pictures_may_be_of_any_size(tmp_path):
    path = colour_onnx(tmp_path / "x.onnx")
    answers = predict(open_classifier(path, mean=MEAN, std=STD), sorted(PICTURES.glob("*.jpg")))
    assert len(answers) == 5 and all(sum(p for _, p in answer) == pytest.approx(1) for answer in answers)
    assert open_picture(PICTURES / "cat.jpg").size != (8, 8)


def test_weights_beside_an_onnx_file_are_part_of_what_it_is(tmp_path):
    model = onnx.load(colour_onnx(tmp_path / "x.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "weights"))
    path = tmp_path / "y.onnx"
    onnx.save(model, path, save_as_external_data=True, location="y.data", size_threshold=0)
    before = open_classifier(path, mean=MEAN, std=STD).sha256
    (tmp_path / "y.data").write_bytes(np.zeros(3, np.float32).tobytes())
    assert open_classifier(path, mean=MEAN, std=STD).sha256 != before


@pytest.mark.parametrize("kind", ["absolute", "above", "pipe", "missing"])
def test_weights_elsewhere_than_beside_an_onnx_file_are_not_read(tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(12))
    name = {"absolute": str(tmp_path / "secret"), "above": "../secret"}.get(kind, "weights")
    if kind == "pipe":
        os.mkfifo(folder / name)  # who opens it waits
    model = onnx.load(colour_onnx(tmp_path / "x.onnx"))
    unused = TensorProto(name="unused", data_type=TensorProto.FLOAT, dims=[3])
    unused.data_location = TensorProto.EXTERNAL
    unused.external_data.add(key="location", value=name)
    model.graph.initializer.append(unused)
    (folder / "y.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"y.onnx: expected its weights in a file beside it, not in '.*'"):
        open_classifier(folder / "y.onnx", mean=MEAN, std=STD)


def test_labels_of_a_windows_editor_are_read(tmp_path):
    (tmp_path / "labels.txt").write_bytes("\ufeffcat\r\nsea\u2028lion\r\n".encode())
    assert read_labels(tmp_path / "labels.txt") == ["cat", "sea\u2028lion"]
