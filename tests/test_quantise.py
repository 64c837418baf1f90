from dataclasses import replace

import numpy as np
import onnx
import pytest
import timm
import torch

from tamzoo.data import Split
from tamzoo.deploy import as_input, deployment
from tamzoo.images import random_crops
from tamzoo.onnx_export import export_deployment, metadata_of, open_session, operators_of, runner
from tamzoo.quantise import calibration_of, export_int8

ENTRY = "wrn10_4_tam.cifar10"  # wide: one BatchNorm a block follows no convolution
PIXELS, CALIBRATION = random_crops(256, 32), random_crops(64, 32, seed=1)


@pytest.fixture(scope="module")
def made():
    return deployment(timm.create_model(ENTRY, pretrained=True).eval(), pixels=PIXELS)


@pytest.fixture(scope="module")
def source(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("float32") / "model.onnx"
    export_deployment(made, path)
    return path


def test_the_calibration_images_are_always_the_same_and_of_the_whole_split():
    train = Split(pixels=torch.arange(5000).view(-1, 1, 1, 1), labels=torch.zeros(5000, dtype=torch.int64))
    chosen = calibration_of(train).flatten().tolist()
    assert chosen == calibration_of(train).flatten().tolist() and len(set(chosen)) == 128
    assert chosen[:3] == [1044, 2591, 4111] and max(chosen) > 4900


def weights_of(path):
    return {row.name: onnx.numpy_helper.to_array(row) for row in onnx.load(path).graph.initializer}


def test_int8_agrees_and_its_weights_have_seven_bits_and_a_scale_a_channel(made, source, tmp_path):
    path = tmp_path / "int8.onnx"
    parity = export_int8(made, path, source=source, calibration=CALIBRATION)
    assert parity.n == 256 and parity.same_top1 >= 0.9 * 256
    assert path.stat().st_size < 0.3 * source.stat().st_size
    told = metadata_of(open_session(path))
    assert told["entry"] == ENTRY and told["precision"] == "int8" and told["labels"][3] == "cat"
    assert told["calibration"] == "64 training images of CIFAR-10"
    session = runner(open_session(path))
    for n in (1, 3):
        assert session(as_input(PIXELS[:n], made.dataset)).shape == (n, 10)

    before, after = weights_of(source), weights_of(tmp_path / "int8.onnx")
    convolutions = {
        name: value for name, value in after.items() if value.dtype == np.int8 and value.ndim == 4
    }
    assert len(convolutions) == operators_of(source)["Conv"] == 10
    for name, value in convolutions.items():
        assert abs(value.astype(int)).max() <= 64, "products of two must fit 16 bits"
        scale = after[name.replace("_quantized", "_scale")]
        assert scale.shape == (len(value),)
        original = before[name.removesuffix("_quantized")]
        np.testing.assert_allclose(
            value * scale.reshape(-1, 1, 1, 1), original, atol=0.51 * scale.max(), rtol=0
        )
    assert after["bn2.weight"].dtype == np.float32, "a BatchNorm without a convolution keeps its scales"


def test_float16_halves_the_file_and_takes_and_returns_float32(made, source, tmp_path):
    path = tmp_path / "float16.onnx"
    parity = export_deployment(made, path, float16=True)
    assert parity.same_top1 == 256 and parity.max_difference < 0.1
    assert path.stat().st_size < 0.55 * source.stat().st_size
    assert all(value.dtype != np.float32 for value in weights_of(path).values())
    assert metadata_of(open_session(path))["precision"] == "float16"
    x = as_input(PIXELS[:4], made.dataset)
    found = runner(open_session(path))(x)
    assert found.dtype == torch.float32 and made.model(x).dtype == torch.float32, "the model is as it was"


def test_what_cannot_be_quantised_is_refused(made, source, tmp_path):
    path = tmp_path / "int8.onnx"
    with pytest.raises(ValueError, match="int8 needs training images to calibrate on, got none"):
        export_int8(made, path, source=source, calibration=CALIBRATION[:0])
    with pytest.raises(ValueError, match="expected an ONNX file, found no such file"):
        export_int8(made, path, source=tmp_path / "missing.onnx", calibration=CALIBRATION)
    bytes_in = tmp_path / "bytes.onnx"
    export_deployment(made, bytes_in, uint8=True)
    with pytest.raises(ValueError, match=r"takes float32 pixels, this takes tensor\(uint8\)"):
        export_int8(made, path, source=bytes_in, calibration=CALIBRATION)
    bytes_in.unlink()
    other = timm.create_model("wrn10_4_plain.cifar10").eval()
    with pytest.raises(ValueError, match="is not written, the export disagrees with the model"):
        export_int8(replace(made, reference=other), path, source=source, calibration=CALIBRATION)
    assert list(tmp_path.iterdir()) == []
