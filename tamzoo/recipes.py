"""How entries are trained, as data."""

from bisect import bisect_right
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one entry is trained: SGD with momentum on augmented 32x32 images.

    The learning rate is piecewise linear in the training step between `lr_points`, pairs of
    (fraction of the training, multiple of `lr`); equal fractions make a drop.
    """

    name: str
    epochs: int
    batch_size: int  # images a step, over all devices
    lr: float  # the multiple 1.0 of lr_points
    lr_points: tuple[tuple[float, float], ...]
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4  # on every parameter, PReLU slopes included
    label_smoothing: float = 0.0
    crop_padding: int = 4  # pixels of zeros around the image before the random crop
    flip: bool = True
    cutout: int = 0  # side of the zeroed square, pixels; 0 for none
    ema_decay: float = 0.0  # of the averaged weights and BatchNorm statistics that are stored; 0 for none
    small_until: float = 0.0  # fraction of the training on images that are shrunk, to pay for more epochs
    small_side: int = 0  # side of a shrunk image, pixels

    def __post_init__(self) -> None:
        fractions = [fraction for fraction, _ in self.lr_points]
        if fractions != sorted(fractions) or (fractions[0], fractions[-1]) != (0.0, 1.0):
            raise ValueError(f"lr_points must rise from fraction 0.0 to 1.0, got {fractions}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"epochs and batch_size must be positive, got {self.epochs} and {self.batch_size}"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0.0 <= self.small_until < 1.0 or (self.small_until and self.small_side < 1):
            raise ValueError(
                "small_until must be in [0, 1), with a positive small_side, "
                f"got {self.small_until} and {self.small_side}"
            )

    def lr_at(self, fraction: float) -> float:
        """Learning rate at a fraction of the training in [0, 1); at a drop, the value after it."""
        at = bisect_right(self.lr_points, fraction, key=lambda point: point[0])
        (begin, low), (end, high) = self.lr_points[at - 1 : at + 1]
        return self.lr * (low + (fraction - begin) / (end - begin) * (high - low))


def _drops(epochs: int, *at: int) -> tuple[tuple[float, float], ...]:
    """lr_points of a learning rate that is multiplied by 0.1 at the beginning of each epoch in `at`."""
    points, multiple = [(0.0, 1.0)], 1.0
    for epoch in at:
        points.append((epoch / epochs, multiple))
        multiple *= 0.1
        points.append((epoch / epochs, multiple))
    return (*points, (1.0, multiple))


PAPER = Recipe(
    name="paper",  # section 3.2
    epochs=300,
    batch_size=128,
    lr=0.1,
    lr_points=_drops(300, 150, 225),
)
PAPER_SVHN = Recipe(
    name="paper-svhn",  # section 3.3
    epochs=160,
    batch_size=128,
    lr=0.1,
    lr_points=_drops(160, 80, 120),
    crop_padding=0,
    flip=False,
)
# One cycle with a long warm-up: a fifth of the paper's epochs, in batches that fill a GPU.
SHORT = Recipe(
    name="short",
    epochs=60,
    batch_size=512,
    lr=0.6,
    lr_points=((0.0, 0.1), (0.2, 1.0), (1.0, 0.0)),
    nesterov=True,
    weight_decay=5e-4,
    label_smoothing=0.1,
    cutout=8,
    ema_decay=0.995,
)
# For models small enough for a CPU: many small steps.
SHORT_CPU = replace(SHORT, name="short-cpu", epochs=30, batch_size=128, lr=0.2, ema_decay=0.0)

# For models that are large for a CPU: few epochs, most of them on images with 0.56 of the pixels.
PROGRESSIVE_CPU = replace(
    SHORT_CPU, name="progressive-cpu", epochs=10, cutout=0, small_until=0.7, small_side=24
)

# A warm restart: on the weights of a run that ended, where a CPU's time comes in pieces.
RESTART_CPU = replace(
    SHORT_CPU,
    name="restart-cpu",
    lr=0.1,
    lr_points=((0.0, 0.1), (0.1, 1.0), (1.0, 0.0)),
    small_until=0.6,
    small_side=24,
)

_OURS = (SHORT, SHORT_CPU, PROGRESSIVE_CPU, RESTART_CPU)
# A mirrored digit is another sign, and a cut one may be.
_OURS_SVHN = (replace(row, name=f"{row.name}-svhn", flip=False, cutout=0) for row in _OURS)

RECIPES = {recipe.name: recipe for recipe in (PAPER, PAPER_SVHN, *_OURS, *_OURS_SVHN)}


def recipe_for(name: str, tag: str) -> Recipe:
    """The row of that name, or its variant for the data set where there is one.

    Raises:
        ValueError: no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES.get(f"{name}-{tag}", RECIPES[name])
