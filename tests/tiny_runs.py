"""Training runs small enough for a test: random images, one thread, a few steps."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tamzoo.catalogue import ENTRIES, Entry
from tamzoo.data import Split
from tamzoo.recipes import SHORT, Recipe
from tamzoo.train import Run

ENTRY = ENTRIES["resnet20_tam.cifar10"]
# 20 images in batches of 8: the last batch of an epoch is smaller
RECIPE = replace(
    SHORT, name="tiny", epochs=3, batch_size=8, lr=0.05, ema_decay=0.9, small_until=0.5, small_side=24
)


def random_split(n: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    return Split(
        pixels=torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, 10, (n,), generator=generator),
    )


def tiny_run(out: Path, *, entry: Entry = ENTRY, recipe: Recipe = RECIPE, **options: Any) -> Run:
    options = {"precision": "float32", "snapshot_seconds": 0.0} | options
    return Run(entry, recipe, random_split(20, 0), random_split(12, 1), out=out, **options)


def in_a_fork(work: Callable[[], object], **environment: str) -> int:
    """Starts `work` in a copy of this process, which must not have computed anything yet; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def killed_in_a_fork(work: Callable[[], object], delay: float) -> bool:
    """Runs `work` in a fork and kills it after `delay` seconds; False where it had ended before, well."""
    pid, began = in_a_fork(work), time.monotonic()
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() - began < delay:
        time.sleep(0.001)
    if ended[0]:
        assert ended[1] == 0, "what goes on after a kill failed"
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True
