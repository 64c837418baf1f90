"""The command that exports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tamzoo.terminal import Name, Sample, Weights, bar, load_model, test_pixels

if TYPE_CHECKING:
    from tamzoo.datasets import Dataset
    from tamzoo.deploy import Deployment, Parity


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
    precision: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="Of the arithmetic in an .onnx file; int8 needs --data, to calibrate."),
    ] = "float32",
    data: Sample = None,
    weights: Weights = None,
    labels: Annotated[
        Path | None, typer.Option(help="A class name a line, where --weights are of other classes.")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest width of a gate that is folded.")] = None,
) -> None:
    """Fold a model and write one file that was checked against it."""
    from tamzoo.attention import GATE_TOLERANCE
    from tamzoo.catalogue import ENTRIES
    from tamzoo.checkpoint import check_output_file, sha256_of
    from tamzoo.data import data_directory
    from tamzoo.deploy import PARITY_IMAGES, deployment
    from tamzoo.onnx_export import export_deployment
    from tamzoo.predict import read_labels
    from tamzoo.program_export import exporter_for

    check_output_file(output)
    if keep_gates and tolerance is not None:
        raise ValueError("--tolerance is of gates that are folded; leave it out, or --keep-gates")
    write = exporter_for(output)
    if precision != "float32" and write is not export_deployment:
        raise ValueError(f"{output}: --precision {precision} is of .onnx files; leave it out, or name one")
    if precision == "int8":
        if uint8:
            raise ValueError("an int8 file takes float32 pixels; leave out --uint8, or --precision int8")
        data_directory(data)  # refuses before any work
    model, full, dataset = load_model(name, weights)
    trained = ENTRIES[full].trained if full in ENTRIES else None
    made = deployment(
        model,
        pixels=test_pixels(data, dataset, PARITY_IMAGES)[0],
        weights_sha256=sha256_of(weights) if weights else trained.sha256 if trained else "",
        keep_gates=keep_gates,
        tolerance=GATE_TOLERANCE if tolerance is None else tolerance,
        labels=read_labels(labels) if labels else None,
    )
    if precision == "int8":
        parity = _write_int8(made, output, data, dataset)
    else:
        how = {"float16": True} if precision == "float16" else {}
        parity = write(made, output, uint8=uint8, progress=bar, **how)
    if made.report:
        print(made.report)
    print(parity)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def _write_int8(made: Deployment, output: Path, data: Path | None, dataset: Dataset) -> Parity:
    from tempfile import TemporaryDirectory

    from tamzoo.data import data_directory, load_split
    from tamzoo.onnx_export import export_deployment
    from tamzoo.quantise import calibration_of, export_int8

    calibration = calibration_of(load_split(data_directory(data), dataset, "train", bar))
    with TemporaryDirectory() as folder:
        source = Path(folder) / "float32.onnx"
        export_deployment(made, source, progress=bar)
        return export_int8(made, output, source=source, calibration=calibration, progress=bar)
