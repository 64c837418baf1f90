"""An ONNX file of ours in 8-bit integers: onnxruntime's static quantisation, per channel."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamzoo.data import Split
from tamzoo.datasets import Dataset
from tamzoo.deploy import INT8, Deployment, Parity, as_input, write_checked
from tamzoo.onnx_export import onnx_libraries, open_session, runner
from tamzoo.progress import Progress, silent

CALIBRATION_IMAGES = 128  # of more, rarer extremes would widen the ranges, and with them the steps
BATCH = 64


def calibration_of(train: Split) -> Tensor:
    """The training images that calibrate, always the same: uint8 (n, 3, h, w)."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train.pixels[order[:CALIBRATION_IMAGES]]


class _Reader:
    """Images batch by batch, as onnxruntime's calibration asks for them."""

    def __init__(self, pixels: Tensor, dataset: Dataset, progress: Progress) -> None:
        self.dataset, self.batches = dataset, iter(progress(pixels.split(BATCH), "Calibrating"))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": as_input(batch, self.dataset).numpy()}


def quantise(source: Path, dataset: Dataset, calibration: Tensor, progress: Progress = silent) -> Any:
    """A float32 file of ours as an ONNX model of 8-bit integers, not compared with anything yet.

    Weights: signed, a scale a channel, in 7 bits: with 8, two products with an unsigned activation can
    overflow the 16 bits in which CPUs without VNNI add them. Activations: unsigned, a scale a tensor, from
    the extremes that the calibration shows. What the file tells stays, and how it was calibrated is added.

    Args:
        source: Its input is float.
        calibration: uint8 (n, 3, h, w) training images.
    Raises:
        ValueError: no such file, one of another input than float32, or no images.
    """
    onnx, _ = onnx_libraries()
    from onnxruntime import quantization as q

    if not len(calibration):
        raise ValueError("int8 needs training images to calibrate on, got none")
    session = open_session(source)
    if (found := session.get_inputs()[0].type) != "tensor(float)":
        raise ValueError(f"{source}: int8 is made from a file that takes float32 pixels, this takes {found}")
    told = session.get_modelmeta().custom_metadata_map
    with TemporaryDirectory() as folder:
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        # shapes of convolutions and classifiers are known without symbolic inference
        q.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        reader: Any = _Reader(calibration, dataset, progress)
        q.quantize_static(
            str(prepared),
            str(quantised),
            reader,
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod.MinMax,
            # those that follow no convolution: a scale a channel, which one step for all would blur
            nodes_to_exclude=[node.name for node in nodes if node.op_type == "BatchNormalization"],
        )
        model = onnx.load(quantised)
    how = {"precision": "int8", "calibration": f"{len(calibration)} training images of {dataset.title}"}
    onnx.helper.set_model_props(model, told | how)
    return model


def export_int8(
    made: Deployment, path: Path, *, source: Path, calibration: Tensor, progress: Progress = silent
) -> Parity:
    """Writes a float32 file of ours in int8, as `quantise`, and compares it with the unfolded torch model.

    Args:
        made: What the file was exported from.
    Raises:
        ValueError: as `quantise` and `write_checked`.
    """

    def write(part: Path) -> None:
        model = quantise(source, made.dataset, calibration, progress)
        part.write_bytes(model.SerializeToString())

    return write_checked(
        made,
        path,
        write,
        lambda part: runner(open_session(part)),
        program="onnxruntime in int8",
        tolerance=INT8,
        progress=progress,
    )
