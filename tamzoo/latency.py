"""Programs against each other: callables in, `Timing` out."""

import time
from collections.abc import Callable

import numpy as np

from tamzoo.progress import Progress, silent
from tamzoo.records import Timing


def time_in_turns(
    programs: dict[str, Callable[[], object]], rounds: int = 50, warmup: int = 5, progress: Progress = silent
) -> list[Timing]:
    """Runs every program once a round, in shuffled order, and compares each with the first, round by round.

    In an order that only rotates, each would nearly always follow the same other one, and find its caches.

    Args:
        programs: Name -> what to call; the first is the baseline of the ratios.
        rounds: Counted rounds.
        warmup: Rounds before, not counted.
    """
    names = list(programs)
    taken = np.empty((rounds + warmup, len(names)))  # ms
    orders = np.random.default_rng(0)
    for turn in progress(range(rounds + warmup), "Timing"):
        for index in orders.permutation(len(names)):
            began = time.perf_counter()
            programs[names[index]]()
            taken[turn, index] = 1e3 * (time.perf_counter() - began)
    taken = taken[warmup:]
    ratios = np.quantile(taken / taken[:, :1], (0.25, 0.5, 0.75), axis=0)
    return [
        Timing(
            name=name,
            rounds=rounds,
            median_ms=float(np.median(taken[:, index])),
            ratio=float(ratios[1, index]),
            ratio_low=float(ratios[0, index]),
            ratio_high=float(ratios[2, index]),
        )
        for index, name in enumerate(names)
    ]
