"""A model as one ONNX file that answers as the torch model does, or no file at all."""

import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tamzoo.datasets import Dataset
from tamzoo.deploy import (
    EXACT,
    FLOAT16,
    Deployment,
    Parity,
    Run,
    as_input,
    as_texts,
    deployment,
    told_of,
    write_checked,
)
from tamzoo.fold import FoldReport
from tamzoo.progress import Progress, silent

OPSET = 20


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


class HalfInside(nn.Module):
    """Computes in float16; takes and returns float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = deepcopy(model).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.half()).float()


def onnx_libraries() -> tuple[Any, Any]:
    """onnx and onnxruntime.

    Raises:
        ValueError: one of them, or what torch's exporter needs, is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}; pip install 'tamzoo[export]'") from error
    return onnx, onnxruntime


def open_session(path: Path, threads: int = 0, spin: bool = True) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        threads: Threads in an operator; 0 lets onnxruntime choose. With several, those of an idle session
            spin for a while and slow down whatever runs next: compare latencies with one, or without `spin`.
        spin: Whether threads wait for work busily, which makes the next run start sooner.
    Raises:
        ValueError: no file, or not an ONNX model.
    """
    _, onnxruntime = onnx_libraries()
    if not path.is_file():
        raise ValueError(
            f"{path}: expected an ONNX file, found {'a folder' if path.is_dir() else 'no such file'}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised too
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class an error code, none of them public
        raise ValueError(f"{path}: onnxruntime cannot open it ({error}); export it again") from error


def runner(session: Any) -> Run:
    """A session as what turns a tensor into logits."""
    return lambda x: torch.from_numpy(session.run(None, {"pixel_values": x.numpy()})[0])


def lacks(session: Any) -> set[str]:
    """The metadata that an export of ours has and this file has not."""
    wanted = {"entry", "labels", "mean", "std", "input_size", "input"}
    return wanted - session.get_modelmeta().custom_metadata_map.keys()


def metadata_of(session: Any) -> dict[str, Any]:
    """What an export of ours tells about itself: texts as they are, JSON lists and objects decoded.

    Raises:
        ValueError: the file is not one of ours, and what is missing; or its metadata are damaged.
    """
    found = session.get_modelmeta().custom_metadata_map
    if missing := lacks(session):
        raise ValueError(
            f"this ONNX file was not exported by tamzoo: its metadata lack {', '.join(sorted(missing))}; "
            "tamzoo predict takes --mean R G B, --std R G B and --labels FILE in their place"
        )
    encoded = ("[", "{", "null")  # other values are texts, which are stored as they are
    try:
        return {
            key: json.loads(value) if value.startswith(encoded) else value for key, value in found.items()
        }
    except ValueError as error:
        raise ValueError(f"this ONNX file's metadata are damaged ({error}); export it again") from error


def export_entry(
    model: nn.Module, path: Path | str, *, uint8: bool = False, progress: Progress = silent, **how: Any
) -> tuple[FoldReport | None, Parity]:
    """Folds a model of ours by the gates that it carries and exports it with all that its file should tell.

    Args:
        model: In eval mode on the CPU, as `timm.create_model` made it.
        how: As for `deployment`.
    Raises:
        ValueError: a path that does not end in .onnx, or as `deployment` and `write_checked`.
    """
    if Path(path).suffix != ".onnx":
        raise ValueError(f"{path}: expected a file named .onnx; other kinds are made by tamzoo export")
    made = deployment(model, **how)
    return made.report, export_deployment(made, Path(path), uint8=uint8, progress=progress)


def export_deployment(
    made: Deployment, path: Path, *, uint8: bool = False, float16: bool = False, progress: Progress = silent
) -> Parity:
    """Writes an ONNX file, which gets its name only if it agrees with the deployment's reference.

    Args:
        uint8: The file takes raw (n, h, w, 3) bytes in place of normalised float32 (n, 3, h, w).
        float16: Weights and arithmetic in half precision; input and output stay as they are.
    Raises:
        ValueError: training mode, or as `write_checked`.
    """
    onnx, _ = onnx_libraries()
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    if made.model.training:
        raise ValueError("export needs models in eval mode; call model.eval() first")
    graph = HalfInside(made.model).eval() if float16 else made.model
    if uint8:
        graph = ByteInput(graph, made.dataset).eval()
    told = made.told | told_of(made.model, made.dataset, uint8)
    told["precision"] = "float16" if float16 else "float32"

    def write(part: Path) -> None:
        program = torch.onnx.export(
            graph,
            (as_input(made.pixels[:2], made.dataset, uint8),),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # source lines, with this machine's paths
        model = program.model_proto
        onnx.helper.set_model_props(model, as_texts(told))
        onnx.checker.check_model(model, full_check=True)
        part.write_bytes(model.SerializeToString())

    return write_checked(
        made,
        path,
        write,
        lambda part: runner(open_session(part)),
        program="onnxruntime",
        uint8=uint8,
        tolerance=FLOAT16 if float16 else EXACT,
        progress=progress,
    )


def operators_of(path: Path) -> dict[str, int]:
    """How many nodes of each operator an ONNX file has."""
    onnx, _ = onnx_libraries()
    return dict(sorted(Counter(node.op_type for node in onnx.load(path).graph.node).items()))
