"""A classifier that can be checked by eye: the class of a picture is its strongest colour."""

import io
import os
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image

from tamzoo.predict import Classifier

LABELS = ("red", "green", "blue")
BROKEN = b"not a picture"


def colour_classifier(folder: Path | None = None, threads: int = 1, *, seconds: float = 0.0) -> Classifier:
    """Takes `seconds` a batch; in `folder` it leaves a file named after the process that ran it."""

    def run(batch: np.ndarray) -> np.ndarray:
        if folder:
            (folder / str(os.getpid())).touch()
        time.sleep(seconds)
        return 10 * batch.mean((2, 3))  # (n, 3, h, w) -> (n, 3)

    ones = (1.0, 1.0, 1.0)
    return Classifier(run=run, labels=LABELS, input_size=(3, 8, 8), mean=ones, std=ones, sha256="colours")


def coloured(n: int) -> bytes:
    """A PNG: red, green and blue in turns, in another shade each time; every 50th is broken."""
    if n % 50 == 49:
        return BROKEN
    shade = [0, 0, 0]
    shade[n % 3] = 100 + n % 151
    file = io.BytesIO()
    Image.new("RGB", (8, 8), tuple(shade)).save(file, "PNG")
    return file.getvalue()


def colour_onnx(path: Path, kind: int = TensorProto.FLOAT, batch: int | str = "n", **metadata: str) -> Path:
    """The means of the channels as an ONNX file, with any metadata; it may take bytes."""
    raw = kind == TensorProto.UINT8
    shape = [batch, 8, 8, 3] if raw else [batch, 3, 8, 8]
    as_floats = [
        helper.make_node("Cast", ["bytes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["image"], perm=[0, 3, 1, 2]),
    ]
    graph = helper.make_graph(
        [
            *(as_floats if raw else ()),
            helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["scores"]),
        ],
        "colours",
        [helper.make_tensor_value_info("bytes" if raw else "image", kind, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT if raw else kind, [batch, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def expect_colours(rows: list[dict], n: int) -> None:
    """Sees that rows are those of the pictures 0 to n - 1, each once and in order."""
    assert len(rows) == n
    for index, row in enumerate(rows):
        if index % 50 == 49:
            assert "not a picture" in row["error"], row
            assert row["label"] is row["index"] is row["probability"] is row["top"] is None
            continue
        assert row["error"] is None and row["index"] == index % 3 and row["label"] == LABELS[index % 3]
        assert len(row["top"]) == 3 and row["top"][0]["label"] == row["label"]
        shade = 10 * (100 + index % 151) / 255
        expected = np.exp(shade) / (np.exp(shade) + 2)
        assert abs(row["probability"] - expected) < 1e-5, (row, expected)
