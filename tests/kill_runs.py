"""Kills a training run at random moments, resumes it each time, and compares it with one left alone.

python tests/kill_runs.py FOLDER KILLS SEED
"""

import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

from tamzoo.checkpoint import sha256_of
from tamzoo.finish import finish
from tamzoo.snapshots import _checksum, load_snapshot
from tests.tiny_runs import RECIPE, in_a_fork, killed_in_a_fork, tiny_run

LONGER = replace(RECIPE, epochs=8)


def train(out: Path) -> None:
    run = tiny_run(out, recipe=LONGER, resume=True)
    run.train()
    finish(run)


def outcome(out: Path) -> tuple[str, str]:
    """Hashes of the stored float16 weights, and of weights, average and momentum as they were trained."""
    found = load_snapshot(out)
    assert found is not None
    return sha256_of(out / "model.safetensors")[:16], _checksum(found[0], {})


def main(folder: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    began = time.monotonic()
    assert os.waitpid(in_a_fork(lambda: train(folder / "alone")), 0)[1] == 0
    alone, seconds = outcome(folder / "alone"), time.monotonic() - began
    print(f"left alone: {seconds:.2f} s, weights and state {alone}")
    killed, series = 0, 0
    while killed < kills:
        out = folder / f"killed-{series}"
        while True:
            delay = chance.uniform(0.0, 0.7 * seconds) if killed < kills else float("inf")
            if not killed_in_a_fork(lambda out=out: train(out), delay):
                break
            killed += 1
            left = sorted(path.name for path in out.glob("*.safetensors"))
            print(f"kill {killed} after {delay:.3f} s, left {left}")
        odd = {path.name for path in out.iterdir()} - {path.name for path in (folder / "alone").iterdir()}
        assert not odd, f"{out}: left behind {odd}"
        assert outcome(out) == alone, f"{out}: {outcome(out)}, expected {alone}"
        print(f"series {series} ended with the same weights and state")
        series += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
