"""The training loop: seeded, resumable at any epoch, last epoch kept.

Everything random is a function of (seed, step), so a checkpoint needs no generator state: a run that
was stopped and resumed ends with the very weights of one that was not.
"""

import csv
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tamzoo.catalogue import Entry
from tamzoo.checkpoint import load_weights, save_weights, whole_file, write_whole
from tamzoo.data import Split, augment
from tamzoo.evaluate import evaluate
from tamzoo.progress import Progress, silent
from tamzoo.recipes import Recipe
from tamzoo.records import Record

LOG_FIELDS = ("epoch", "lr", "train_loss", "test_top1_error", "seconds")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class Run:
    """One training run in one folder: `log.csv`, `checkpoint.safetensors`, at the end weights and record.

    Args:
        entry: What is trained.
        train: Training split, on the device that trains.
        test: Test split, watched but never selected on.
        precision: "float32", or "bfloat16" for autocast.
        out: Folder of the run; made where missing. A run that is there already is resumed.
    Raises:
        ValueError: the folder holds a run with another recipe, seed or entry.
    """

    def __init__(
        self,
        entry: Entry,
        recipe: Recipe,
        train: Split,
        test: Split,
        *,
        out: Path,
        seed: int = 0,
        precision: str,
    ) -> None:
        self.entry, self.recipe, self.seed, self.precision, self.out = entry, recipe, seed, precision, out
        self.train_split, self.test_split = train, test
        self.device = train.labels.device
        torch.manual_seed(seed)
        self.model = timm.create_model(entry.name).to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.steps_per_epoch = -(-len(train) // recipe.batch_size)
        self.epoch, self.seconds = 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        self._identify()
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"

    def _identify(self) -> None:
        wanted = {"entry": self.entry.name, "seed": self.seed, "recipe": asdict(self.recipe)}
        wanted = json.loads(json.dumps(wanted))
        path = self.out / "run.json"
        if not path.exists():
            write_whole(path, json.dumps(wanted, indent=2) + "\n")
        elif (found := json.loads(path.read_text())) != wanted:
            raise ValueError(
                f"{self.out} holds another run ({found['entry']}, seed {found['seed']}); choose another --out"
            )

    def _momenta(self) -> dict[str, Tensor]:
        return {
            f"momentum.{name}": self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
        }

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = {
            f"model.{name}": value for name, value in self.model.state_dict().items()
        } | self._momenta()
        told = {"epoch": str(self.epoch), "seconds": str(self.seconds)}
        with whole_file(self.checkpoint) as part:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata=told)

    def _resume(self) -> None:
        try:
            with safe_open(self.checkpoint, framework="pt", device=str(self.device)) as file:
                told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{self.checkpoint}: damaged ({error}); delete it to start again") from error
        self.model.load_state_dict(
            {
                name.removeprefix("model."): value
                for name, value in tensors.items()
                if name.startswith("model.")
            }
        )
        for name, parameter in self.model.named_parameters():
            # clone: the optimizer's kernels want memory laid out as the parameter is
            self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                tensors[f"momentum.{name}"]
            )
        self.epoch, self.seconds = int(told["epoch"]), float(told["seconds"])

    def train(
        self,
        time_budget: float = float("inf"),
        progress: Progress = silent,
        report: Callable[[dict], None] = lambda row: None,
    ) -> bool:
        """Trains until the recipe's end, or until the budget does not hold another epoch.

        Args:
            time_budget: Seconds of wall time.
            report: Called with each epoch's row of the log.
        Returns:
            Whether the recipe's end is reached.
        """
        started = time.monotonic()
        while self.epoch < self.recipe.epochs:
            began = time.monotonic()
            loss = self._epoch(progress)
            self.epoch += 1
            self.seconds += time.monotonic() - began
            self.save()
            self.model.eval()
            error = evaluate(self.model, self.test_split, self.entry.dataset).top1_error
            lr = self.recipe.lr_at((self.epoch * self.steps_per_epoch - 1) / self._total_steps)
            row = dict(zip(LOG_FIELDS, (self.epoch, lr, loss, error, round(self.seconds, 1)), strict=True))
            self._log(row)
            report(row)
            left = time_budget - (time.monotonic() - started)
            if self.epoch < self.recipe.epochs and left < 1.1 * (time.monotonic() - began):
                return False
        return True

    @property
    def _total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def _epoch(self, progress: Progress) -> float:
        """Trains one epoch and returns its mean loss."""
        self.model.train()
        order = torch.Generator().manual_seed(_mix(self.seed, self.epoch, salt=1))
        permutation = torch.randperm(len(self.train_split), generator=order).to(self.device)
        generator = torch.Generator(self.device)
        total = torch.zeros((), device=self.device)
        first = self.epoch * self.steps_per_epoch
        chunks = list(permutation.split(self.recipe.batch_size))
        for step, chosen in enumerate(
            progress(chunks, f"Epoch {self.epoch + 1}/{self.recipe.epochs}"), start=first
        ):
            generator.manual_seed(_mix(self.seed, step, salt=2))
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr_at(step / self._total_steps)
            pixels, labels = self.train_split.pixels[chosen], self.train_split.labels[chosen]
            x = augment(pixels, self.recipe, self.entry.dataset, generator)
            dtype = PRECISIONS[self.precision]
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits = self.model(x)
            loss = cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach() * len(chosen)
        mean = total.item() / len(self.train_split)
        if mean != mean:
            raise ValueError(
                f"the loss of epoch {self.epoch + 1} is NaN; the checkpoint of the epoch before is kept"
            )
        return mean

    def _log(self, row: dict) -> None:
        path = self.out / "log.csv"
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
        with whole_file(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, row])

    def finish(self, progress: Progress = silent) -> Record:
        """Stores the weights in float16, evaluates that very file, and writes the record."""
        path = self.out / "model.safetensors"
        sha256 = save_weights(path, self.model.state_dict())
        model: nn.Module = timm.create_model(self.entry.name)
        load_weights(model, path, self.entry.name)
        model = model.to(self.device, memory_format=torch.channels_last).eval()
        score = evaluate(model, self.test_split, self.entry.dataset, progress=progress)
        record = Record(
            entry=self.entry.name,
            data=f"{self.entry.dataset.title} train",
            data_note=self.train_split.note,
            n_train=len(self.train_split),
            seed=self.seed,
            recipe=asdict(self.recipe),
            epochs=self.recipe.epochs,
            selection="last epoch",
            precision=self.precision,
            hardware=_hardware(self.device),
            seconds=round(self.seconds, 1),
            commit=_commit(),
            versions={name: version(name) for name in ("torch", "torchvision", "timm", "tamzoo")},
            sha256=sha256,
            score=score,
        )
        write_whole(self.out / "record.json", record.to_json())
        return record


def _mix(seed: int, index: int, salt: int) -> int:
    """A generator seed for each (seed, index, salt); far apart, so that neighbours share no stream."""
    return (seed * 1_000_003 + index) * 10 + salt


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        if cpuinfo.exists()
        else []
    )
    return f"CPU, {os.cpu_count()} cores ({names[0] if names else platform.machine()})"


def _commit() -> str:
    """The repository's commit, with `-dirty` where files differ from it; `unknown` outside a repository."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
