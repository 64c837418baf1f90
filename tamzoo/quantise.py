"""An ONNX file of ours in 8-bit integers: onnxruntime's static quantisation, per channel."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from tamzoo.catalogue import Dataset
from tamzoo.deploy import INT8, Deployment, Parity, as_input, write_checked
from tamzoo.onnx_export import metadata_of, onnx_libraries, open_session, runner
from tamzoo.progress import Progress, silent

CALIBRATION_IMAGES = 512  # their extremes set the ranges of activations
BATCH = 64


class _Reader:
    """Images batch by batch, as onnxruntime's calibration asks for them."""

    def __init__(self, pixels: Tensor, dataset: Dataset, progress: Progress) -> None:
        self.dataset, self.batches = dataset, iter(progress(pixels.split(BATCH), "Calibrating"))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": as_input(batch, self.dataset).numpy()}


def _quantise(source: Path, folder: Path, reader: Any) -> Any:
    import onnx
    from onnxruntime import quantization as q

    prepared, quantised = folder / "prepared.onnx", folder / "quantised.onnx"
    # shapes of convolutions and classifiers are known without symbolic inference
    q.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
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
        # those that no convolution stands before: a scale a channel, which one for all would blur
        nodes_to_exclude=[
            node.name for node in onnx.load(prepared).graph.node if node.op_type == "BatchNormalization"
        ],
    )
    return onnx.load(quantised)


def export_int8(
    made: Deployment, path: Path, *, source: Path, calibration: Tensor, progress: Progress = silent
) -> Parity:
    """Quantises a float32 file of ours and compares it with the unfolded torch model.

    Weights: signed, a scale a channel, in 7 bits: with 8, two products with an unsigned activation can
    overflow the 16 bits in which CPUs without VNNI add them. Activations: unsigned, a scale a tensor.

    Args:
        made: What the file was exported from.
        source: The float32 file, float input.
        calibration: uint8 (n, 3, h, w) training images.
    Raises:
        ValueError: no such file, no images, or as `write_checked`.
    """
    onnx, _ = onnx_libraries()
    if not len(calibration):
        raise ValueError("int8 needs training images to calibrate on, got none")
    session = open_session(source)
    told: dict[str, str] = session.get_modelmeta().custom_metadata_map
    metadata_of(session)  # one of ours
    how = {"precision": "int8", "calibration": f"{len(calibration)} training images of {made.dataset.title}"}

    def write(part: Path) -> None:
        with TemporaryDirectory() as folder:
            model = _quantise(source, Path(folder), _Reader(calibration, made.dataset, progress))
        onnx.helper.set_model_props(model, told | how)
        onnx.checker.check_model(model, full_check=True)
        part.write_bytes(model.SerializeToString())

    return write_checked(
        path,
        write,
        lambda part: runner(open_session(part)),
        reference=made.reference,
        dataset=made.dataset,
        pixels=made.pixels,
        program="onnxruntime in int8",
        tolerance=INT8,
        progress=progress,
    )
