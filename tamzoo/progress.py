"""How long loops tell where they are: the rooms stay silent, `cli` passes a bar."""

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def silent(items: Iterable[Any], description: str) -> Iterable[Any]:
    """The items as they are."""
    return items
