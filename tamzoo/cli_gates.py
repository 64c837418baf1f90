"""The commands about gates: measure them, freeze them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tamzoo.terminal import (
    Data,
    Device,
    Name,
    Sample,
    Weights,
    bar,
    device_called,
    load_model,
    print_gates,
    table,
    test_pixels,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


def gates(
    name: Name,
    data: Sample = None,
    weights: Weights = None,
    images: Annotated[int, typer.Option(min=2, help="How many.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
    device: Device = "cpu",
) -> None:
    """Measure every gate of a TAM model: does it depend on its input, or is it proven not to?"""
    from dataclasses import asdict

    from tamzoo.data import darkest_and_brightest, normalise
    from tamzoo.gates import measure_gates

    place = device_called(device)
    model, full, dataset = load_model(name, weights)
    _check_gates(model, full)
    pixels, told = test_pixels(data, dataset, images)
    found = measure_gates(
        model.to(place),
        (normalise(batch, dataset) for batch in bar(pixels.split(128), "Measuring gates")),
        ends=darkest_and_brightest(dataset),
    )
    if as_json:
        print(json.dumps([asdict(gate) for gate in found], indent=2))
    else:
        print_gates(found, told)


def _check_gates(model: nn.Module, name: str) -> None:
    from tamzoo.gates import gates_of

    if not gates_of(model):
        raise ValueError(f"{name} has no TAM gates; expected a model named *_tam")


def freeze_gates(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    data: Data = None,
    weights: Weights = None,
    images: Annotated[int, typer.Option(min=2, help="Training images to measure on.")] = 10_000,
    tolerance: Annotated[float | None, typer.Option(help="Largest width of a gate that is static.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Of the training (default: the entry's).")] = None,
    device: Device = "cpu",
) -> None:
    """Turn gates that move into constants, so that the model folds whole; errors before and after."""
    import torch
    from torch.optim.swa_utils import update_bn

    from tamzoo.attention import GATE_TOLERANCE
    from tamzoo.augment import augment, draw
    from tamzoo.catalogue import ENTRIES
    from tamzoo.checkpoint import check_output_file
    from tamzoo.data import data_directory, load_split, normalise
    from tamzoo.evaluate import evaluate
    from tamzoo.freeze import freeze_gates
    from tamzoo.gates import measure_gates, save_measured
    from tamzoo.recipes import recipe_for

    check_output_file(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: expected an output that ends in .safetensors")
    place = device_called(device)
    model, full, dataset = load_model(name, weights)
    _check_gates(model, full)
    model.to(place)
    folder = data_directory(data)
    train, test = (load_split(folder, dataset, split, bar).to(place) for split in ("train", "test"))

    entry, some = ENTRIES.get(full), train.pixels[:images].split(128)
    settings = recipe_for(
        recipe or (entry.trained.recipe if entry and entry.trained else "short"), dataset.tag
    )

    def plain() -> Iterator[Tensor]:
        return (normalise(batch, dataset) for batch in bar(some, "Measuring gates"))

    def augmented() -> Iterator[Tensor]:  # what BatchNorm saw while it was trained
        generator = torch.Generator(place).manual_seed(0)
        for batch in bar(some, "Measuring BatchNorm"):
            yield augment(batch, draw(len(batch), settings, dataset, generator), settings, dataset)

    def scored(what: str) -> tuple[str, ...]:
        score = evaluate(model, test, dataset, progress=bar)
        return what, f"{score.top1_error:.2f}", f"{score.top5_error:.2f}", f"{score.loss:.4f}"

    measured = measure_gates(model, plain())
    rows = [scored("as loaded")]
    frozen = freeze_gates(model, measured, GATE_TOLERANCE if tolerance is None else tolerance)
    if frozen:
        rows.append(scored("gates frozen"))
    update_bn(augmented(), model)
    stored = save_measured(output, model, full, plain)
    rows.append(scored("BatchNorm measured anew, as stored"))
    columns = ("weights", "top-1 error %", "top-5 error %", "loss")
    table(f"{full} on {len(test)} {dataset.title} test images", columns, rows)
    for gate, now in zip(measured, stored, strict=True):
        told = f"frozen as {now.mean:.6f}" if gate.name in frozen else f"left; as stored {now.width:.1e}"
        print(f"  {gate.name}: width {gate.width:.1e} over {gate.n} training images, {told}")
    print(f"{output}: {len(frozen)} of {len(measured)} gates frozen")
