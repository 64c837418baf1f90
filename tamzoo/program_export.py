"""A folded model for other runtimes than ONNX's: plain safetensors, or a torch.export program."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import save

from tamzoo.checkpoint import HEAD, load_weights
from tamzoo.deploy import Deployment, Parity, Run, as_input, as_texts, told_of, write_checked
from tamzoo.fold import plain_name
from tamzoo.onnx_export import ByteInput, export_deployment
from tamzoo.progress import Progress, silent

TOLD = "tamzoo.json"  # in a .pt2 archive: what ONNX files hold as metadata


def export_plain(made: Deployment, path: Path, *, uint8: bool = False, progress: Progress = silent) -> Parity:
    """Writes float32 safetensors that load strictly into the plain architecture of as many classes.

    Raises:
        ValueError: an attention is left, uint8 is asked for, or as `write_checked`.
    """
    if uint8:
        raise ValueError(f"{path}: weights take no bytes; export to .onnx or .pt2 for uint8 input")
    plain = plain_name(made.name)
    if made.report is None:
        raise ValueError(f"{path}: a plain checkpoint cannot keep gates; export to .onnx or .pt2")
    if made.report.kept:
        name, reason = next(iter(made.report.kept.items()))
        raise ValueError(
            f"{made.name} does not become a {plain} checkpoint: {len(made.report.kept)} of its attentions "
            f"stay (first: {name}, {reason}); export to .onnx or .pt2, which can hold them, or "
            "freeze them with `tamzoo freeze-gates` where they are TAM's"
        )
    state = {key: value.detach().contiguous() for key, value in made.model.state_dict().items()}
    told = {"format": "pt", "architecture": plain} | made.told | told_of(made.model, made.dataset)

    def load(part: Path) -> Run:
        classes = made.dataset.num_classes if HEAD & state.keys() else 0
        model = timm.create_model(plain, num_classes=classes).eval()
        load_weights(model, part, plain)
        return model

    return write_checked(
        made,
        path,
        lambda part: part.write_bytes(save(state, metadata=as_texts(told))),
        load,
        program=plain,
        progress=progress,
    )


def export_program(
    made: Deployment, path: Path, *, uint8: bool = False, progress: Progress = silent
) -> Parity:
    """Writes a torch.export program with a free batch size, and what ONNX files tell in its `tamzoo.json`.

    `torch.export.load` can run code that a file holds, so load only files that you made or trust. Ours
    hold no pickled weights.

    Raises:
        ValueError: as `write_checked`.
    """
    graph = ByteInput(made.model, made.dataset).eval() if uint8 else made.model
    told = made.told | told_of(made.model, made.dataset, uint8)

    def write(part: Path) -> None:
        example = as_input(torch.zeros_like(made.pixels[:2]), made.dataset, uint8)
        with torch.no_grad():
            program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # source lines, with this machine's paths
        archive = io.BytesIO()
        torch.export.save(program, archive, extra_files={TOLD: json.dumps(told)})
        part.write_bytes(archive.getvalue())

    return write_checked(
        made,
        path,
        write,
        load_program,
        program="torch.export program",
        uint8=uint8,
        progress=progress,
    )


def load_program(path: Path) -> Run:
    """A `.pt2` file of ours as what turns a tensor into logits; not for files of unknown origin."""
    module = torch.export.load(path).module()
    return lambda x: module(x)  # not the module itself, which says that it is in training mode


EXPORTERS: dict[str, Callable[..., Parity]] = {
    ".onnx": export_deployment,
    ".safetensors": export_plain,
    ".pt2": export_program,
}


def exporter_for(path: Path) -> Callable[..., Parity]:
    """What writes a deployment into a file of this name.

    Raises:
        ValueError: another suffix than those of `EXPORTERS`.
    """
    if path.suffix.lower() not in EXPORTERS:
        raise ValueError(f"{path}: expected a file named {', '.join(EXPORTERS)}")
    return EXPORTERS[path.suffix.lower()]
