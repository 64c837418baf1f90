"""The command that predicts."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tamzoo.terminal import DEMO_ENTRY, Weights, bar, load_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from tamzoo.predict import Classifier

    Load = Callable[[int], Classifier]  # from a number of threads, 0 for the runtime's own choice

Triple = tuple[float, float, float]


def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, folders (with their subfolders), globs; with --out also parquet files."
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model or entry.", show_default=DEMO_ENTRY)
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="An ONNX file in place of the model; its output must be logits.")
    ] = None,
    weights: Weights = None,
    top: Annotated[int, typer.Option(min=1, help="Classes a picture.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A parquet file to write; goes on after a kill.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="With --out: pictures a forward pass.", show_default="64")
    ] = None,
    column: Annotated[str | None, typer.Option(help="With --out: the parquet files' image column.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="With --out: run on a Ray cluster, ADDRESS or local.")
    ] = None,
    mean: Annotated[
        Triple | None, typer.Option(help="Of pixels scaled to 0..1, for an ONNX file that is not ours.")
    ] = None,
    std: Annotated[Triple | None, typer.Option(help="As --mean.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="With --onnx: a class name a line, in place of those in the file.")
    ] = None,
) -> None:
    """Classify pictures; with --out, any number of them."""
    if onnx is None and (mean or std or labels):
        raise ValueError("--mean, --std and --labels are for an ONNX file; pass --onnx FILE too")
    if onnx and (model or weights):
        raise ValueError("--onnx is in place of a model; leave out either it or --model and --weights")
    if out is None and (batch or column or ray):
        raise ValueError("--batch, --column and --ray are for an output file; pass --out FILE.parquet too")
    if out and as_json:
        raise ValueError("--json is of answers that are printed; leave out either it or --out")
    from tamzoo.predict import open_classifier

    load: Load = partial(_torch, model or DEMO_ENTRY, weights)
    if onnx:
        load = partial(open_classifier, onnx, mean=mean, std=std, labels=labels)
    if out is None:
        _print_answers(images, load, top, as_json)
    else:
        _run_job(images, out, load, top=top, batch=batch or 64, column=column, ray=ray)


def _torch(name: str, weights: Path | None, threads: int) -> Classifier:
    import torch

    from tamzoo.fold import reparameterize_model
    from tamzoo.predict import torch_classifier

    if threads:
        torch.set_num_threads(threads)
    return torch_classifier(reparameterize_model(load_model(name, weights)[0]))


def _print_answers(given: list[str], load: Load, top: int, as_json: bool) -> None:
    from tamzoo.parts import files_of, is_parquet
    from tamzoo.predict import predict as classify

    paths = list(map(Path, files_of(given)))
    for path in paths:
        if is_parquet(str(path)):
            raise ValueError(f"{path}: parquet files need an output; pass --out FILE.parquet too")
    wrong: dict[Path, str] = {}

    def refuse(path: Path, error: Exception) -> None:
        if len(paths) == 1:
            raise error
        wrong[path] = str(error)

    answers = classify(load(0), paths, top, bar, refuse)
    if as_json:
        print(json.dumps(list(map(partial(_as_json, wrong), paths, answers)), indent=2))
    else:
        for path, answer in zip(paths, answers, strict=True):
            told = ", ".join(f"{label} {100 * p:.1f} %" for label, p in answer)
            print(wrong.get(path) or f"{path}: {told}", file=sys.stderr if path in wrong else sys.stdout)
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(paths)} pictures have no answer, for the reasons above")


def _as_json(wrong: dict[Path, str], path: Path, answer: list[tuple[str, float]]) -> dict[str, Any]:
    if path in wrong:
        return {"image": str(path), "error": wrong[path]}
    return {"image": str(path), "top": [{"label": label, "probability": p} for label, p in answer]}


def _run_job(
    given: list[str],
    out: Path,
    load: Load,
    *,
    top: int,
    batch: int,
    column: str | None,
    ray: str | None,
) -> None:
    from tamzoo.answers import Here, workers_and_threads
    from tamzoo.batch import Job, check_output, run_job
    from tamzoo.batch_ray import OnRay
    from tamzoo.parts import list_parts

    check_output(out)
    parts = list_parts(given, out, column)
    workers, threads = workers_and_threads()
    classifier = load(threads)
    job = Job(model=classifier.sha256, parts=parts, top=top, out=out)
    if ray:
        engine = OnRay(ray, load, classifier.sha256, batch, top, bar)
    else:
        engine = Here(classifier=classifier, workers=workers, batch=batch, top=top, progress=bar)
    done = run_job(job, engine)
    first = f"; the first: {done.first_error}" if done.errors else ""
    print(f"{out}: {done.rows} rows, {done.errors} of them errors{first}")
    if done.predicted:
        print(
            f"{done.predicted} rows in {done.seconds:.1f} s, {done.predicted / done.seconds:.1f} a second, "
            f"on {engine.workers} workers"
        )
    if 0 < done.rows == done.errors:
        raise typer.Exit(1)
