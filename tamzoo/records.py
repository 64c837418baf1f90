"""What was measured, to and from JSON."""

import json
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Score:
    """Errors of one weights file on one test split, in percent."""

    dataset: str
    n: int
    top1_error: float
    top5_error: float
    loss: float  # mean cross-entropy, nats
    calibration_error: float  # expected calibration error, 15 equal bins, percent
    data_note: str = ""


@dataclass(frozen=True, kw_only=True)
class GateStats:
    """One gate over a set of images: every position of every image counts as one value."""

    name: str  # of the module
    block: int  # 1, 2, ... from the stem to the head
    stage: int  # 1, 2, ...
    n: int  # images
    mean: float
    std: float
    min: float
    max: float
    # bounds that hold for any input whose channels stay in the ranges seen on these images
    bound_min: float
    bound_max: float
    # bounds that hold for every picture of the size; None where nobody asked for them
    proven_min: float | None = None
    proven_max: float | None = None

    @property
    def width(self) -> float:
        """Largest minus smallest value seen."""
        return self.max - self.min

    @property
    def proven_width(self) -> float:
        """What the gate can move at most on any picture, as far as that is known: 1 where it is not."""
        if self.proven_min is None or self.proven_max is None:
            return 1.0
        return self.proven_max - self.proven_min

    def on_any_picture(self, tolerance: float) -> str:
        """In a word, whether the gate is proven to move by no more than the tolerance; else what is known."""
        return "proven" if self.proven_width <= tolerance else f"within {self.proven_width:.0e}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Latency of one of several programs that took turns: ratios hold while the machine's speed drifts."""

    name: str
    rounds: int
    median_ms: float
    ratio: float  # median over rounds of this program's time to the first program's
    ratio_low: float  # quartiles of the same
    ratio_high: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One training run: what is needed to judge it and to repeat it."""

    entry: str
    data: str
    data_note: str
    n_train: int
    seed: int
    recipe: dict[str, Any]
    epochs: int
    selection: str
    precision: str
    hardware: str
    seconds: float  # wall time of training, evaluation left out
    commit: str
    versions: dict[str, str]
    sha256: str  # of the weights file that `score` and `gates` were measured on
    score: Score
    gates: list[GateStats] = field(default_factory=list)
    model_args: dict[str, Any] = field(default_factory=dict)  # beyond the entry's own, as group_size
    start: "Record | None" = None  # of the run whose weights this one began with; None: random ones

    @property
    def model(self) -> str:
        """timm's architecture name."""
        return self.entry.partition(".")[0]

    @property
    def runs(self) -> "list[Record]":
        """The runs that made the weights, one on the other's weights, in their order."""
        return [*(self.start.runs if self.start else ()), self]

    @property
    def spans(self) -> list[tuple[str, int]]:
        """Entry and epochs of its runs, those in a row on one data set as one: so long a head is kept."""
        spans = groupby(self.runs, key=lambda run: run.entry)
        return [(entry, sum(run.epochs for run in runs)) for entry, runs in spans]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Raises ValueError where the text is not a record."""
        try:
            return cls._from_dict(json.loads(text))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a training record: {error}") from error

    @classmethod
    def _from_dict(cls, found: dict[str, Any]) -> "Record":
        for key, kind in {"entry": str, "sha256": str, "recipe": dict}.items():
            if not isinstance(found[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        arguments: dict[str, Any] = found.get("model_args", {})
        if arguments.keys() - {"group_size"} or not all(isinstance(size, int) for size in arguments.values()):
            raise TypeError(f"model_args may tell a group_size, a number, and no more; found {arguments}")
        found["score"] = Score(**found["score"])
        found["gates"] = [GateStats(**gate) for gate in found["gates"]]
        if found.get("start"):
            found["start"] = cls._from_dict(found["start"])
        return cls(**found)


def read_record(path: Path) -> Record:
    """Raises ValueError naming the file where it holds no record."""
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a training record (JSON), got {error}") from error
