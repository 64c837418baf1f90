"""A card's table of how the weights were trained, and by which commands again."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from tamzoo.card_texts import table
from tamzoo.records import Record


def training(record: Record) -> str:
    """The table, in Markdown."""
    recipe = record.recipe
    rows = [
        ("recipe", _recipe(record)),
        (
            "optimizer",
            f"SGD, momentum {recipe.get('momentum'):g}{' (Nesterov)' if recipe.get('nesterov') else ''}, "
            f"weight decay {recipe.get('weight_decay'):g}",
        ),
        ("learning rate", _learning_rate(recipe)),
        ("regularisation", _regularisation(recipe)),
        ("data", ", then ".join(dict.fromkeys(map(_data, record.runs)))),
        ("selection", record.selection),
        ("seed", str(record.seed)),
        ("precision", record.precision),
        ("hardware", f"{record.hardware}, {_hours(record)}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("commit", f"`{record.commit}`"),
        ("weights", f"SHA-256 `{record.sha256}`"),
        ("repeat", ", then ".join(f"`{command}`" for command in _commands(record))),
    ]
    if record.start:
        rows.insert(1, ("began with", ", then ".join(_earlier(record))))
    return table([("", ""), *rows])


def _data(run: Record) -> str:
    return f"{run.data}, {run.n_train:,} images{_after(run.data_note)}"


def _hours(record: Record) -> str:
    hours, last = sum(run.seconds for run in record.runs) / 3600, record.seconds / 3600
    return f"{hours:.2f} hours" + (
        f" in {len(record.runs)} runs, the last {last:.2f}" if record.start else ""
    )


def _recipe(record: Record) -> str:
    recipe = record.recipe
    return (
        f"{recipe.get('name', '')}, {record.epochs} epochs, batch {recipe.get('batch_size')}{_small(recipe)}"
    )


def _learning_rate(recipe: dict[str, Any]) -> str:
    points = ", ".join(f"{multiple * recipe['lr']:g} at {at:.0%}" for at, multiple in recipe["lr_points"])
    return f"{points} of the training, linear between"


def _regularisation(recipe: dict[str, Any]) -> str:
    """Of which the paper has crops and flips only."""
    padding, cutout = recipe.get("crop_padding"), recipe.get("cutout")
    smoothing, decay = recipe.get("label_smoothing"), recipe.get("ema_decay")
    told = (
        f"crops of images padded by {padding} pixels" if padding else "",
        "flips" if recipe.get("flip") else "",
        f"squares of {cutout} pixels cut out" if cutout else "",
        f"labels smoothed by {smoothing:g}" if smoothing else "",
        f"weights averaged over steps (decay {decay:g})" if decay else "",
    )
    return ", ".join(filter(None, told)) or "none"


def _earlier(record: Record) -> Iterable[str]:
    for run, following in pairwise(record.runs):
        head = ", but for the head," if run.entry != following.entry else ""
        other = f"{run.entry}, " if run.entry != record.entry else ""
        yield (
            f"the weights{head} of a run of {other}{_recipe(run)} (top-1 error {run.score.top1_error:.2f} %, "
            f"commit `{run.commit}`, SHA-256 `{run.sha256}`)"
        )


def _commands(record: Record) -> Iterable[str]:
    """What repeats each run: where one began with another's weights, DIR1 is the other's folder."""
    for index, run in enumerate(record.runs):
        out = f"DIR{index + 1}" if record.start else f"runs/{run.entry}"
        start = f" --initial-checkpoint DIR{index}" if run.start else ""
        yield (
            f"tamzoo train {run.entry} --recipe {run.recipe.get('name', '')} --epochs {run.epochs} "
            f"--seed {run.seed} --precision {run.precision}{start} --data DIR --out {out}"
        )


def _small(recipe: dict[str, Any]) -> str:
    until = recipe.get("small_until")
    return f", the first {until:.0%} on images of {recipe['small_side']} pixels" if until else ""


def _after(note: str) -> str:
    return f"; {note}" if note else ""
