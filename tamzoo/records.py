"""What was measured, to and from JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ANALYSIS = "analysis.json"  # beside the pictures of an analysis


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

    @property
    def width(self) -> float:
        """Largest minus smallest value seen."""
        return self.max - self.min


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

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Raises ValueError where the text is not a record."""
        try:
            found = json.loads(text)
            found["score"] = Score(**found["score"])
            found["gates"] = [GateStats(**gate) for gate in found["gates"]]
            return cls(**found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a training record: {error}") from error


def read_record(path: Path) -> Record:
    """Raises ValueError naming the file where it holds no record."""
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a training record (JSON), got {error}") from error


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How one gate varies within an image: mean and variance of each image, as a two-dimensional histogram.

    Taken over the positions of a spatial gate (TAM, CBAM's second), over the channels of a channel gate
    (SE, CBAM's first), which has no positions.
    """

    model: str  # the name or the run folder of its weights
    kind: str  # "TAM", "SE", "CBAM channel" or "CBAM spatial"
    name: str  # of the module
    block: int  # 1, 2, ... from the stem to the head
    stage: int  # 1, 2, ...
    n: int  # images
    mean: float  # of the images' means
    mean_std: float  # standard deviation of the images' means
    variance_mean: float  # of the images' variances
    variance_max: float
    flat: int  # images whose variance is at most 1e-12
    cells: list[list[int]]  # mean bin, variance bin, images; see spreads.SpreadWatch

    @property
    def over_channels(self) -> bool:
        """Whether mean and variance are the channels', not the positions'."""
        return self.kind in ("SE", "CBAM channel")


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """Errors with the gate of one block replaced by 1, in percent."""

    name: str  # of the gate
    block: int
    stage: int
    top1_error: float
    top5_error: float


@dataclass(frozen=True, kw_only=True)
class Straightened:
    """Errors once this PReLU, and all before it in the list, have slope 1, in percent."""

    name: str  # of the PReLU
    block: int
    stage: int
    slope: float  # mean before it was set
    top1_error: float
    top5_error: float
    logit_change: float  # largest over images and classes, from the model as trained


@dataclass(frozen=True, kw_only=True)
class WeightVariance:
    """Variance of all weights in the convolutions of one block's residual branch, attention left out."""

    model: str
    block: int
    stage: int
    variance: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Test error of one training run after each epoch, in percent."""

    model: str
    top1_errors: list[float]  # of epochs 1, 2, ...


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one study cost."""

    study: str
    seconds: float
    blocks: int  # forward passes of one block on one batch
    blocks_naive: int  # the same, had every configuration run from the pixels on


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What the gates of one weights file do: the figures of the paper's section 4, as numbers."""

    entry: str
    sha256: str  # of the weights file
    dataset: str
    n: int  # test images
    data_note: str
    top1_error: float  # percent, nothing changed
    top5_error: float
    gates: list[GateStats]
    spreads: list[Spread]
    lesions: list[Lesion]
    straightened: list[Straightened]  # in the order in which they were set to slope 1
    weights: list[WeightVariance]
    curves: list[Curve]
    absent: list[str]  # of SE, CBAM and plain: no weights of this backbone and data set
    passes: list[Pass]
    peak_memory_mb: float | None  # of the process, where the system tells it
    hardware: str
    commit: str
    versions: dict[str, str]

    @property
    def figures(self) -> list[str]:
        """Names of the pictures that there is something to draw for."""
        names = ("spreads", "gates", "lesions", "straightened", "weights", "curves")
        return [name for name in names if getattr(self, name)]

    def to_json(self) -> str:
        """One line a row: a record of hundreds of histogram cells stays readable."""
        lines = []
        for key, value in asdict(self).items():
            if isinstance(value, list) and value:
                rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
                lines.append(f'  "{key}": [\n{rows}\n  ]')
            else:
                lines.append(f'  "{key}": {json.dumps(value)}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Analysis":
        """Raises ValueError where the text is not an analysis."""
        rows = {
            "gates": GateStats,
            "spreads": Spread,
            "lesions": Lesion,
            "straightened": Straightened,
            "weights": WeightVariance,
            "curves": Curve,
            "passes": Pass,
        }
        try:
            found = json.loads(text)
            return cls(**found | {key: [row(**each) for each in found[key]] for key, row in rows.items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an analysis: {error}") from error


def read_analysis(path: Path) -> Analysis:
    """Raises ValueError naming the file where it holds no analysis."""
    try:
        return Analysis.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected what `tamzoo analyze` writes (JSON), got {error}") from error
