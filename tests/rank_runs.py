"""Trains the same run on one process and on several (gloo, CPU).

python tests/rank_runs.py FOLDER RANKS
"""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch

import tamzoo.finish
import tamzoo.train
from tamzoo.distributed import World, join
from tamzoo.evaluate import evaluate
from tamzoo.progress import Moment
from tamzoo.records import Score
from tamzoo.train import STEPS_PER_LOOK
from tests.tiny_runs import RECIPE, in_a_fork, tiny_run

RANKED = replace(RECIPE, batch_size=7)  # 20 images in batches of 7, 7 and 6: unequal shares


def evaluate_in_float32(*args, **options) -> Score:
    torch.set_default_dtype(torch.float32)
    try:
        return evaluate(*args, **options)
    finally:
        torch.set_default_dtype(torch.float64)


def train(out: Path, world: World | None = None) -> None:
    torch.set_default_dtype(torch.float64)
    tamzoo.train.evaluate = tamzoo.finish.evaluate = evaluate_in_float32
    run = tiny_run(out, recipe=RANKED, world=world, snapshot_seconds=1e9)

    def stop(moment: Moment) -> None:
        run._clock.budget = 0.0

    assert not run.train(watch=stop) and run.step == (STEPS_PER_LOOK if world else 1)
    run = tiny_run(out, recipe=RANKED, world=world, snapshot_seconds=1e9, resume=True)
    assert run.train()
    if world is None or world.first:
        tamzoo.finish.finish(run)


def train_as_rank(out: Path) -> None:
    with join() as world:
        assert world.size > 1
        assert world.first_says(world.first) and not world.first_says(not world.first)
        train(out, world)


def main(folder: Path, ranks: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [in_a_fork(lambda: train(folder / "one"))]
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(in_a_fork(lambda: train_as_rank(folder / "several"), **shared, **own))
    assert [os.waitpid(pid, 0)[1] for pid in started] == [0] * (ranks + 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
