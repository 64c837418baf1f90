"""An entry as its Hub repository will hold it: a folder, laid out and checked before anything is uploaded."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from tamzoo.cards import card_files, pictures
from tamzoo.catalogue import HUB_OWNER, Entry
from tamzoo.checkpoint import WEIGHTS, write_whole
from tamzoo.data import Split
from tamzoo.datasets import Dataset
from tamzoo.evaluate import evaluate
from tamzoo.findings import ANALYSIS
from tamzoo.records import Score, read_record
from tamzoo.verify import ONNX, stored_analysis, stored_golden, verify_folder


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A folder that is, byte for byte, what a Hub repository will hold."""

    entry: Entry
    folder: Path
    owner: str

    @property
    def repo_id(self) -> str:
        return f"{self.owner}/{self.entry.name}"

    @property
    def files(self) -> dict[str, Path]:
        return {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


def stage(
    entry: Entry,
    source: Path,
    folder: Path,
    *,
    owner: str = HUB_OWNER,
    export: Callable[..., Any] | None = None,
    test_split: Callable[[Dataset], Split] | None = None,
) -> Staged:
    """Lays out and validates what an entry's Hub repository will hold.

    Args:
        source: The entry's folder of model_cards.
        folder: Empty; becomes the repository.
        export: Writes a model as one ONNX file, told `weights_sha256`, and raises where the two do not agree.
        test_split: Loads a data set's test split; on a sample of it the staged model must err as recorded.
    Raises:
        ValueError: the entry is not trained, or what is in `source` is not what should be published.
    """
    if entry.trained is None:
        raise ValueError(f"{entry.name} has no trained weights yet; only trained entries are published")
    problems = verify_folder(entry, source)
    if problems:
        raise ValueError(f"{entry.name} cannot be published: {'; '.join(problems)}")
    record, analysis = read_record(source / "record.json"), stored_analysis(source)
    measured = [ANALYSIS] if analysis else []
    for path in (WEIGHTS, "record.json", "log.csv", *measured, *pictures(record, analysis)):
        shutil.copyfile(source / path, folder / path)
    for path, text in card_files(entry, record, stored_golden(source), owner, analysis).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / path, text)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if test_split:
        check_sample(model, entry, test_split(entry.dataset), record.score)
    if export:
        (folder / ONNX).parent.mkdir()
        export(model, folder / ONNX, weights_sha256=entry.trained.sha256)
    return Staged(entry=entry, folder=folder, owner=owner)


def check_sample(model: nn.Module, entry: Entry, split: Split, score: Score, n: int = 1000) -> None:
    """Sees that a model errs on a sample of the test split as often as its record says.

    Raises:
        ValueError: the errors differ by more than four standard errors of such a sample.
    """
    sample = split.first(n)
    found, expected = evaluate(model, sample, entry.dataset).top1_error, score.top1_error
    spread = 100 * (max(expected / 100 * (1 - expected / 100), 1e-4) / len(sample)) ** 0.5
    if abs(found - expected) > 4 * spread:
        raise ValueError(
            f"{entry.name}: the staged weights err on {found:.1f} % of {len(sample)} test images, "
            f"the record says {expected:.1f} %; evaluate them again"
        )
