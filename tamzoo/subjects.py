"""The weights that an analysis compares: entries, files, and folders of finished runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tamzoo.catalogue import ATTENTION_NAMES, Backbone
from tamzoo.checkpoint import WEIGHTS, read_finished, record_beside
from tamzoo.datasets import DATASETS, Dataset
from tamzoo.findings import Curve
from tamzoo.hub import entry_folder, fetch_weights
from tamzoo.journal import read_log
from tamzoo.registry import MODELS, find_entry, find_model, full_name, model_from


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Weights to be analysed, and what they are called."""

    label: str
    entry: str  # architecture.tag
    weights: Path

    @property
    def backbone(self) -> Backbone:
        return MODELS[self.entry.split(".")[0]][0]

    @property
    def attention(self) -> str:
        return MODELS[self.entry.split(".")[0]][1]

    @property
    def dataset(self) -> Dataset:
        return DATASETS[self.entry.split(".")[1]]

    def load(self) -> nn.Module:
        """The model in eval mode, channels last.

        Raises:
            ValueError: as `model_from`.
        """
        model = model_from(self.weights, self.entry, num_classes=self.dataset.num_classes)
        return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def curve(self) -> list[Curve]:
        """The test error of the run that made the weights, where its record and log lie beside them."""
        if not (record_beside(self.weights) and (self.weights.parent / "log.csv").is_file()):
            return []
        errors = [row["test_top1_error"] for row in read_log(self.weights.parent)]
        return [Curve(model=self.label, top1_errors=errors)]


def subject(given: str, weights: Path | None = None) -> Subject:
    """What a name, or the folder of a finished run, means.

    Args:
        given: An entry, a model (then with `weights`), or a folder that holds weights and record.
        weights: In place of the entry's own.
    Raises:
        ValueError: no such entry or folder; or as `read_finished`.
        RuntimeError, OSError: as `fetch_weights`.
    """
    folder = Path(given)
    if weights is None and folder.is_dir():
        entry = find_model(read_finished(folder).entry)
        return Subject(label=folder.resolve().name, entry=entry, weights=folder / WEIGHTS)
    name = full_name(given)
    if weights is None:
        weights = fetch_weights(find_entry(name))
    return Subject(label=name, entry=name, weights=weights)


def known_peers(main: Subject) -> list[Subject]:
    """The trained entries of the same backbone and data set whose weights are in the clone or wheel."""
    names = [f"{main.backbone.name}_{attention}.{main.dataset.tag}" for attention in ATTENTION_NAMES]
    folders = {name: entry_folder(name) for name in names if name != main.entry}
    return [
        Subject(label=name, entry=name, weights=folder / WEIGHTS)
        for name, folder in folders.items()
        if folder
    ]


def check_peers(main: Subject, peers: Sequence[Subject]) -> None:
    """Sees that peers can be shown beside a model.

    Raises:
        ValueError: the model has no TAM gates; a peer is of another backbone or data set; two share a label.
    """
    if main.attention != "tam":
        raise ValueError(f"{main.label} has no TAM gates; expected a model named *_tam")
    for peer in peers:
        if (peer.backbone, peer.dataset) != (main.backbone, main.dataset):
            raise ValueError(
                f"peer {peer.label} is a {peer.entry}; expected the backbone and data set of {main.entry}"
            )
    labels = [subject.label for subject in (main, *peers)]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two of the models are called {twice.pop()}; rename the folder of a run")
