"""What studies of trained weights found, to and from JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tamzoo.records import GateStats

ANALYSIS = "analysis.json"  # beside the pictures of an analysis


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
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not an analysis: {error}") from error


def read_analysis(path: Path) -> Analysis:
    """Raises ValueError naming the file where it holds no analysis."""
    try:
        return Analysis.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected what `tamzoo analyze` writes (JSON), got {error}") from error
