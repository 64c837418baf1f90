"""How a long loop tells how far it is: rooms are silent, unless a command passes a bar."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def silent(items: Iterable[Any], description: str) -> Iterable[Any]:
    """The items as they are."""
    return items


@dataclass(frozen=True)
class Counted:
    """Items that come one by one, with their number, so that a bar knows where the end is."""

    items: Iterable[Any]
    n: int

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return self.n


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a training run is."""

    epoch: int  # 1, 2, ...
    epochs: int
    step: int  # done, of the whole run
    steps: int
    loss: float  # of a step shortly before
    images_per_s: float  # of this epoch
    eta_s: float


Watch = Callable[[Moment], None]


def unwatched(moment: Moment) -> None:
    """Tells nobody."""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How a session of training speaks."""

    say: Callable[[str], None]  # a line to keep
    bar: Progress = silent
    watch: Watch = unwatched


SILENT = Voice(say=lambda line: None)
