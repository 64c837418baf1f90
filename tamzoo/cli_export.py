"""The command that exports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tamzoo.terminal import Name, Sample, Weights, bar, load_model, test_pixels


def export(
    name: Name,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="What to write: .onnx, .safetensors (plain backbone) or .pt2 (torch.export).",
        ),
    ],
    keep_gates: Annotated[bool, typer.Option(help="Export without folding.")] = False,
    uint8: Annotated[
        bool, typer.Option(help="Take raw (n, h, w, 3) bytes and normalise in the graph.")
    ] = False,
    data: Sample = None,
    weights: Weights = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest width of a gate that is folded.")] = None,
) -> None:
    """Fold a model and write one file that was checked against it."""
    from tamzoo.attention import GATE_TOLERANCE
    from tamzoo.catalogue import ENTRIES
    from tamzoo.checkpoint import check_output_file, sha256_of
    from tamzoo.deploy import PARITY_IMAGES, deployment
    from tamzoo.program_export import exporter_for

    check_output_file(output)
    write = exporter_for(output)
    model, full, dataset = load_model(name, weights)
    trained = ENTRIES[full].trained if full in ENTRIES else None
    made = deployment(
        model,
        pixels=test_pixels(data, dataset, PARITY_IMAGES)[0],
        weights_sha256=sha256_of(weights) if weights else trained.sha256 if trained else "",
        keep_gates=keep_gates,
        tolerance=GATE_TOLERANCE if tolerance is None else tolerance,
    )
    parity = write(made, output, uint8=uint8, progress=bar)
    if made.report:
        print(made.report)
    print(parity)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
