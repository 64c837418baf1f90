"""A model as one ONNX file that answers as the torch model does, or no file at all."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamzoo import __version__
from tamzoo.attention import GATE_TOLERANCE
from tamzoo.catalogue import DATASETS, ENTRIES, Dataset
from tamzoo.checkpoint import whole_file
from tamzoo.data import normalise
from tamzoo.fold import FoldReport, reparameterize_model, report_of
from tamzoo.gates import gates_of
from tamzoo.images import random_crops
from tamzoo.progress import Progress, silent

OPSET = 20
PARITY_IMAGES = 256  # at least
PARITY_TOLERANCE = 1e-3  # largest absolute logit difference


@dataclass(frozen=True, kw_only=True)
class Parity:
    """onnxruntime on an exported file against the torch model it came from."""

    n: int
    max_difference: float  # absolute, logits
    same_top1: int

    @property
    def passed(self) -> bool:
        return self.same_top1 == self.n and self.max_difference <= PARITY_TOLERANCE

    def __str__(self) -> str:
        return (
            f"onnxruntime against unfolded torch on {self.n} images: largest logit difference "
            f"{self.max_difference:.2g} (at most {PARITY_TOLERANCE:g}), same top-1 on {self.same_top1}"
        )


class ByteInput(nn.Module):
    """Raw uint8 (n, h, w, 3) pixels in, logits out: the normalisation is part of the graph."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, dataset: Dataset) -> None:
        super().__init__()
        self.model = model
        mean, std = (torch.tensor(row).view(1, 3, 1, 1) for row in (dataset.mean, dataset.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values.permute(0, 3, 1, 2).float()  # (n, h, w, c) -> (n, c, h, w)
        return self.model(x * self.scale + self.shift)


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ValueError(f"ONNX export needs {error.name}; pip install 'tamzoo[export]'") from error
    return onnx, onnxruntime


def open_session(path: Path, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        threads: Threads in an operator; 0 lets onnxruntime choose. With several, those of an idle session
            spin for a while and slow down whatever runs next: compare latencies with one.
    Raises:
        ValueError: no file, or not an ONNX model.
    """
    _, onnxruntime = _libraries()
    if not path.is_file():
        raise ValueError(
            f"{path}: expected an ONNX file, found {'a folder' if path.is_dir() else 'no such file'}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class an error code, none of them public
        raise ValueError(f"{path}: onnxruntime cannot open it ({error}); export it again") from error


def metadata_of(session: Any) -> dict[str, Any]:
    """What an export of ours tells about itself: texts as they are, JSON lists and objects decoded.

    Raises:
        ValueError: the file is not one of ours; names what is missing.
    """
    found = session.get_modelmeta().custom_metadata_map
    missing = {"entry", "labels", "mean", "std", "input_size", "input"} - found.keys()
    if missing:
        raise ValueError(
            f"this ONNX file was not exported by tamzoo: its metadata lack {', '.join(sorted(missing))}; "
            "tamzoo predict takes --mean R G B, --std R G B and --labels FILE in their place"
        )
    encoded = ("[", "{", "null")  # other values are texts, which are stored as they are
    return {key: json.loads(value) if value.startswith(encoded) else value for key, value in found.items()}


def export_entry(
    model: nn.Module,
    path: Path,
    *,
    pixels: Tensor | None = None,
    weights_sha256: str | None = None,
    keep_gates: bool = False,
    uint8: bool = False,
    tolerance: float = GATE_TOLERANCE,
    progress: Progress = silent,
) -> tuple[FoldReport | None, Parity]:
    """Folds a model of ours by the gates that it carries and exports it with all that its file should tell.

    Args:
        model: In eval mode on the CPU, as `timm.create_model` made it.
        pixels: Images for the parity check, as for `export_onnx`; by default crops of the shipped pictures.
        weights_sha256: Of the model's weights file; by default the catalogue's.
        keep_gates: Export without folding; there is no fold report then.
    Raises:
        ValueError: as `reparameterize_model` and `export_onnx`.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    name, dataset = f"{cfg['architecture']}.{cfg['tag']}", DATASETS[cfg["tag"]]
    entry, report, deployed = ENTRIES.get(name), None, model
    if not keep_gates:
        deployed = reparameterize_model(model, tolerance=tolerance)
        report = report_of(deployed)
    if weights_sha256 is None:
        weights_sha256 = entry.trained.sha256 if entry and entry.trained else ""
    metadata = {
        "entry": name,
        "version": __version__,
        "weights_sha256": weights_sha256,
        "gates": report.folded if report else {},
        "fold_report": str(report) if report else "exported with its gates",
    }
    pixels = random_crops(PARITY_IMAGES, dataset.input_size[-1]) if pixels is None else pixels
    parity = export_onnx(
        deployed,
        path,
        reference=model,
        dataset=dataset,
        pixels=pixels,
        metadata=metadata,
        uint8=uint8,
        progress=progress,
    )
    return report, parity


def export_onnx(
    deployed: nn.Module,
    path: Path,
    *,
    reference: nn.Module,
    dataset: Dataset,
    pixels: Tensor,
    metadata: dict[str, Any],
    uint8: bool = False,
    progress: Progress = silent,
) -> Parity:
    """Exports a model and compares the file with a reference before it gets its name.

    Args:
        deployed: What the file computes, in eval mode on the CPU, for instance a folded model.
        reference: What it must agree with, the unfolded model.
        pixels: uint8 (n, 3, h, w) images to compare on, n >= 256.
        metadata: Texts, lists and objects, stored in the file beside the data set's.
        uint8: The file takes raw (n, h, w, 3) bytes in place of normalised float32 (n, 3, h, w).
    Raises:
        ValueError: too few images, training mode, or the parity fails: then there is no file.
    """
    onnx, _ = _libraries()
    if len(pixels) < PARITY_IMAGES:
        raise ValueError(f"the parity check needs at least {PARITY_IMAGES} images, got {len(pixels)}")
    if deployed.training or reference.training:
        raise ValueError("export needs models in eval mode; call model.eval() first")
    graph = ByteInput(deployed, dataset).eval() if uint8 else deployed
    example = _as_input(pixels[:2], dataset, uint8)
    with whole_file(path) as part:
        program = torch.onnx.export(
            graph,
            (example,),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
        told = metadata | {
            "labels": dataset.class_names,
            "mean": dataset.mean,
            "std": dataset.std,
            "input_size": tuple(pixels.shape[1:]),
            "input": "uint8 NHWC" if uint8 else "float32 NCHW",
            "gates_left": list(gates_of(deployed)),
        }
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
        onnx.helper.set_model_props(model, texts)
        onnx.checker.check_model(model, full_check=True)
        part.write_bytes(model.SerializeToString())
        parity = check_parity(open_session(part), reference, dataset, pixels, uint8, progress)
        if not parity.passed:
            raise ValueError(f"{path} is not written, the export disagrees with the model: {parity}")
    return parity


def check_parity(
    session: Any,
    reference: nn.Module,
    dataset: Dataset,
    pixels: Tensor,
    uint8: bool = False,
    progress: Progress = silent,
) -> Parity:
    """Compares a session's logits with a torch model's on uint8 (n, 3, h, w) images."""
    largest, same = 0.0, 0
    for batch in progress(pixels.split(64), "Checking parity"):
        with torch.inference_mode():
            expected = reference(normalise(batch, dataset)).numpy()
        (found,) = session.run(None, {"pixel_values": _as_input(batch, dataset, uint8).numpy()})
        largest = max(largest, float(np.abs(found - expected).max()))
        same += int((found.argmax(1) == expected.argmax(1)).sum())
    return Parity(n=len(pixels), max_difference=largest, same_top1=same)


def _as_input(pixels: Tensor, dataset: Dataset, uint8: bool) -> Tensor:
    """uint8 (n, 3, h, w) -> what a file takes."""
    return pixels.permute(0, 2, 3, 1).contiguous() if uint8 else normalise(pixels, dataset)


def operators_of(path: Path) -> dict[str, int]:
    """How many nodes of each operator an ONNX file has."""
    onnx, _ = _libraries()
    kinds: list[str] = [node.op_type for node in onnx.load(path).graph.node]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
