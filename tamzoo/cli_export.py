"""The command that exports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tamzoo.terminal import Data, Name, Weights, bar, load_model, test_pixels

if TYPE_CHECKING:
    from torch import nn

    from tamzoo.catalogue import Dataset


def export(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    keep_gates: Annotated[bool, typer.Option(help="Export without folding.")] = False,
    uint8: Annotated[
        bool, typer.Option(help="Take raw (n, h, w, 3) bytes and normalise in the graph.")
    ] = False,
    data: Data = None,
    weights: Weights = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest width of a gate that is folded.")] = None,
) -> None:
    """Fold a model and write one ONNX file that was checked against it."""
    model, full, dataset = load_model(name, weights)
    print(export_model(model, full, dataset, output, keep_gates, uint8, data, tolerance, weights))
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def export_model(
    model: nn.Module,
    full: str,
    dataset: Dataset,
    output: Path,
    keep_gates: bool = False,
    uint8: bool = False,
    data: Path | None = None,
    tolerance: float | None = None,
    weights: Path | None = None,
) -> str:
    """Folds, exports and checks; returns what to tell."""
    from tamzoo import __version__
    from tamzoo.attention import GATE_TOLERANCE
    from tamzoo.catalogue import ENTRIES
    from tamzoo.checkpoint import sha256_of
    from tamzoo.fold import reparameterize_model
    from tamzoo.onnx_export import PARITY_IMAGES, export_onnx

    deployed, told, gates = model, "exported with its gates", {}
    if not keep_gates:
        deployed = reparameterize_model(model, tolerance=GATE_TOLERANCE if tolerance is None else tolerance)
        told, gates = str(deployed.fold_report), deployed.fold_report.folded  # pyright: ignore
    entry = ENTRIES.get(full)
    stored = entry.trained.sha256 if entry and entry.trained else ""
    metadata = {
        "entry": full,
        "version": __version__,
        "weights_sha256": sha256_of(weights) if weights else stored,
        "gates": gates,
        "fold_report": told,
    }
    pixels, _ = test_pixels(data, dataset, PARITY_IMAGES)
    parity = export_onnx(
        deployed,
        output,
        reference=model,
        dataset=dataset,
        pixels=pixels,
        metadata=metadata,
        uint8=uint8,
        progress=bar,
    )
    return f"{told}\n{parity}"
