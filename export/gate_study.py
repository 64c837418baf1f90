"""When is a gate static, and what does it cost to fold one that nearly is?

`python -m export.gate_study run --data DIR --out DIR` trains small runs and measures every gate before and
after each epoch; `python -m export.gate_study show DIR` prints the tables of export/README.md from what it
wrote. A run that is in DIR already is not repeated. `python -m export.gate_study untrained --data DIR` counts
the gates that stand still before any training; with `--live --slope 0.25` as the runs of `LIVE` begin.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from tamzoo.attention import GATE_TOLERANCE, TAM
from tamzoo.backbones import GatedBlock
from tamzoo.card_texts import table
from tamzoo.catalogue import ENTRIES
from tamzoo.checkpoint import write_whole
from tamzoo.data import Split, data_directory, load_split, normalise
from tamzoo.datasets import DATASETS
from tamzoo.evaluate import evaluate
from tamzoo.fold import reparameterize_model
from tamzoo.gates import gates_of, measure_gates, remember_gates
from tamzoo.recipes import SHORT_CPU
from tamzoo.sweep import GROUP_SIZES
from tamzoo.terminal import one_sentence
from tamzoo.train import Run

EVERYTHING = 0.999999  # a tolerance that folds whatever moves


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run does differently."""

    model: str
    weight_decay: float
    slope: float  # of the trees' PReLUs at initialisation
    live: bool = False  # trees begin as `enliven` leaves them
    seed: int = 0

    @property
    def name(self) -> str:
        start = f"live-seed{self.seed}" if self.live else f"slope{self.slope:g}"
        return f"{self.model}-wd{self.weight_decay:g}-{start}"


SETTINGS = (
    *(
        Setting(model=model, weight_decay=decay, slope=slope)
        for model in ("resnet20", "wrn10_4")
        for decay in (5e-4, 0.0)
        for slope in (0.0, 0.25)
    ),
    Setting(model="resnet18", weight_decay=5e-4, slope=0.0),
)

# As those above, and as those of export/seed_runs, but for the trees' beginning.
LIVE = tuple(
    Setting(model=model, weight_decay=5e-4, slope=0.25, live=True, seed=seed)
    for model, seeds in (("resnet18", 1), ("wrn10_4", 1), ("resnet20", 3))
    for seed in range(seeds)
)

UNTRAINED = (("resnet50", 2), ("resnext50_32x4d", 2), *(("resnet18", size) for size in GROUP_SIZES))


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One gate after one epoch, on test images; epoch 0 is the initialisation with BatchNorm measured."""

    setting: str
    epoch: int
    gate: str
    channels: int
    mean: float
    std: float
    width: float
    bound_width: float  # by interval arithmetic
    logit_change: float  # largest, where this gate alone is folded to its mean
    changed_top1: int  # of as many images as the gates were measured on


COLUMNS = (*(field.name for field in fields(Observation)), "error", "error_folded")


def observe(model: nn.Module, setting: str, epoch: int, images: Tensor) -> list[Observation]:
    """Every gate of a model in eval mode on (n, c, h, w) images, and the cost of folding it alone."""
    found, measured = [], measure_gates(model, images)
    remember_gates(model, measured)
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in images.split(128)])
        for gate in measured:
            folded = deepcopy(model)
            block = folded.get_submodule(gate.name.rpartition(".")[0])
            assert isinstance(block, GatedBlock)
            block.reparameterize(EVERYTHING)
            logits = torch.cat([folded(batch) for batch in images.split(128)])
            found.append(
                Observation(
                    setting=setting,
                    epoch=epoch,
                    gate=gate.name,
                    channels=gates_of(model)[gate.name].channels,
                    mean=gate.mean,
                    std=gate.std,
                    width=gate.width,
                    bound_width=gate.bound_max - gate.bound_min,
                    logit_change=(logits - expected).abs().max().item(),
                    changed_top1=int((logits.argmax(1) != expected.argmax(1)).sum()),
                )
            )
    return found


def run(setting: Setting, train: Split, test: Split, options: argparse.Namespace) -> None:
    """Trains one setting and writes its observations and, last, its errors with and without gates."""
    entry = ENTRIES[f"{setting.model}_tam.cifar10"]
    recipe = replace(SHORT_CPU, epochs=options.epochs, weight_decay=setting.weight_decay)
    images = normalise(test.pixels[: options.images], entry.dataset)
    observations: list[Observation] = []

    def watch(row: dict[str, float]) -> None:
        model = deepcopy(trainer.learner.model).eval()
        observations.extend(observe(model, setting.name, int(row["epoch"]), images))
        print(f"{setting.name}, epoch {row['epoch']}: loss {row['train_loss']:.3f}", flush=True)

    with TemporaryDirectory() as folder:
        trainer = Run(
            entry,
            recipe,
            train,
            test.first(options.images),
            out=Path(folder),
            seed=setting.seed,
            precision=options.precision,
        )
        set_slopes(trainer.learner.model, setting.slope)
        if setting.live:
            enliven(trainer.learner.model, normalise(train.pixels[:250], entry.dataset))
        fresh = deepcopy(trainer.learner.model)
        update_bn(normalise(train.pixels[:1000], entry.dataset).split(125), fresh)
        observations += observe(fresh.eval(), setting.name, 0, images)
        trainer.train(report=watch)
    model = trainer.learner.model.eval()
    folded = reparameterize_model(model, measure_gates(model, images), tolerance=EVERYTHING)
    errors = [evaluate(each, test, entry.dataset).top1_error for each in (model, folded)]
    lines = [",".join(COLUMNS)]
    lines += [",".join(map(str, (*astuple(each), *errors))) for each in observations]
    write_whole(options.out / f"{setting.name}.csv", "\n".join(lines) + "\n")


def set_slopes(model: nn.Module, slope: float) -> None:
    """Has all trees' PReLUs begin with one slope."""
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, slope)


@torch.no_grad()
def enliven(model: nn.Module, images: Tensor) -> None:
    """Scales all trees' convolutions so that each node gives mean 0 and variance 1 over these images.

    That is the layer-sequential unit variance of Mishkin and Matas (2016), for nodes in place of layers.

    Args:
        model: In training mode.
        images: (n, c, h, w), normalised.
    """

    def scale(tam: TAM, inputs: tuple[Tensor]) -> None:
        (h,) = inputs
        for layer in tam.tree:
            if isinstance(layer, nn.Conv2d):
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
                std, mean = torch.std_mean(layer(h), dim=(0, 2, 3))
                layer.weight.div_(std[:, None, None, None])
                layer.bias.sub_(mean / std)
            h = layer(h)

    hooks = [tam.register_forward_pre_hook(scale) for tam in gates_of(model).values()]
    model(images)  # a tree sees what the ones before it have become
    for hook in hooks:
        hook.remove()


def load_splits(data: Path | None, tag: str) -> tuple[Split, Split]:
    """Training and test images of a data set."""
    directory, dataset = data_directory(data), DATASETS[tag]
    return load_split(directory, dataset, "train"), load_split(directory, dataset, "test")


def show_untrained(train: Split, test: Split, seeds: int, slope: float = 0.0, live: bool = False) -> None:
    """Prints how far gates move in models with random weights, once BatchNorm is measured, in Markdown.

    Raises:
        ValueError: fewer than one seed, or than two test images.
    """
    if seeds < 1:
        raise ValueError(f"expected --seeds of at least 1, got {seeds}")
    rows = [["model", "g", "static gates, seed by seed", "largest width"]]
    for backbone, size in UNTRAINED:
        entry, static, widths = ENTRIES[f"{backbone}_tam.cifar100"], [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = timm.create_model(entry.name, group_size=size)
            set_slopes(model, slope)
            if live:
                enliven(model, normalise(train.pixels, entry.dataset))
            update_bn(normalise(train.pixels, entry.dataset).split(125), model)
            gates = measure_gates(model.eval(), normalise(test.pixels, entry.dataset).split(125))
            static.append(f"{sum(gate.width <= GATE_TOLERANCE for gate in gates)} of {len(gates)}")
            widths += [gate.width for gate in gates]
        rows.append([entry.model, str(size), ", ".join(static), f"{max(widths):.0e}"])
    print(table(rows))


def rows_of(folder: Path) -> Iterator[dict[str, str]]:
    """All observations in a folder.

    Raises:
        ValueError: there are none, or a file is no such table.
    """
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise ValueError(f"{folder}: expected the CSV files of a study, found none; run it first")
    for path in paths:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or any(set(row) != set(COLUMNS) or None in row.values() for row in rows):
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; remove it and run again")
        yield from rows


def show(folder: Path) -> None:
    """Prints the study's two tables in Markdown."""
    rows = list(rows_of(folder))
    epochs = sorted({int(row["epoch"]) for row in rows})
    runs = [["run", *(f"after {epoch}" for epoch in epochs), "error, all folded"]]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = []
        for epoch in epochs:
            gates = [float(r["width"]) for r in rows if r["setting"] == setting and int(r["epoch"]) == epoch]
            static = sum(width <= GATE_TOLERANCE for width in gates)
            cells.append(f"{static}/{len(gates)}, {max(gates):.0e}" if gates else "-")
        last = next(row for row in rows if row["setting"] == setting)
        cells.append(f"{float(last['error']):.2f} %, {float(last['error_folded']):.2f} %")
        runs.append([setting, *cells])
    widths = [["width", "gates", "median bound", "median logit change", "largest", "top-1 changed, largest"]]
    decades: dict[int, list[dict[str, str]]] = {}
    for row in rows:
        width = float(row["width"])
        decades.setdefault(math.ceil(math.log10(width)) if width else -99, []).append(row)
    for decade, found in sorted(decades.items()):
        changes, bounds = ([float(row[key]) for row in found] for key in ("logit_change", "bound_width"))
        label = "0" if decade == -99 else f"1e{decade - 1} to 1e{decade}"
        flips = max(int(row["changed_top1"]) for row in found)
        told = [
            f"{value:.0e}" for value in (statistics.median(bounds), statistics.median(changes), max(changes))
        ]
        widths.append([label, str(len(found)), *told, str(flips)])
    print(f"{table(runs)}\n\n{table(widths)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m export.gate_study")
    commands = parser.add_subparsers(required=True, dest="command")
    train, untrained = commands.add_parser("run"), commands.add_parser("untrained")
    for command in (train, untrained):
        command.add_argument("--data", type=Path, help="default: $TAMZOO_DATA")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument(
        "--only", nargs="+", help="names of settings", choices=[s.name for s in SETTINGS + LIVE]
    )
    train.add_argument("--epochs", type=int, default=10)
    train.add_argument("--train-images", type=int, default=10_000)
    train.add_argument("--images", type=int, default=500, help="test images to measure gates on")
    train.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    commands.add_parser("show").add_argument("out", type=Path)
    untrained.add_argument("--seeds", type=int, default=3)
    untrained.add_argument("--slope", type=float, default=0.0, help="of the trees' PReLUs; 1: no ReLU")
    untrained.add_argument("--live", action="store_true", help="scale trees until each node varies")
    untrained.add_argument("--images", type=int, default=250, help="for BatchNorm, and to measure gates on")
    options = parser.parse_args()
    with one_sentence():
        if options.command == "show":
            show(options.out)
        elif options.command == "untrained":
            train_split, test_split = load_splits(options.data, "cifar100")
            n = options.images
            show_untrained(
                train_split.first(n), test_split.first(n), options.seeds, options.slope, options.live
            )
        else:
            run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Trains and measures the settings that have no table yet.

    Raises:
        ValueError: too few images or epochs.
    """
    if options.images < 2 or options.train_images < 1 or options.epochs < 1:
        raise ValueError("expected --images of at least 2, and --train-images and --epochs of at least 1")
    whole, test = load_splits(options.data, "cifar10")
    train_split = whole.first(options.train_images)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = (
        [setting for setting in SETTINGS + LIVE if setting.name in options.only] if options.only else SETTINGS
    )
    for setting in chosen:
        if not (options.out / f"{setting.name}.csv").exists():
            run(setting, train_split, test, options)


if __name__ == "__main__":
    main()
