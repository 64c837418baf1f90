"""A training run: seeded, stoppable and resumable at any step, last epoch kept.

Everything random is a function of (seed, step), so a snapshot needs no generator state: a run that
was stopped and resumed ends with the weights of one that was not: on CPUs to the last bit, on CUDA as far
as its kernels repeat themselves.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamzoo.catalogue import Entry
from tamzoo.checkpoint import WEIGHTS, read_finished
from tamzoo.clock import Clock
from tamzoo.data import Split
from tamzoo.distributed import World
from tamzoo.evaluate import evaluate
from tamzoo.journal import LOG_FIELDS, Journal, hardware, identity
from tamzoo.learner import Compiled, Learner, seed_of
from tamzoo.progress import Moment, Watch, unwatched
from tamzoo.recipes import Recipe
from tamzoo.snapshots import load_snapshot, newest, save_snapshot

STEPS_PER_LOOK = 8  # between two looks at the loss on CUDA, and at the clock where ranks must agree
logger = logging.getLogger(__name__)


def how_on(world: World, compiled: Compiled | None, cuda_graph: bool | None) -> tuple[Compiled, bool]:
    """What is left open of how a step runs, chosen: on one GPU it is replayed, on several only compiled.

    A replay waits for no Python, so blocks, which compile sooner, lose nothing to one graph of the model.
    """
    cuda = world.device.type == "cuda"
    if cuda_graph is None:
        cuda_graph = cuda and world.size == 1
    return compiled or ("no" if not cuda else "blocks" if cuda_graph else "model"), cuda_graph


class Run:
    """One training run in one folder: run.json, log.csv and snapshots.

    Args:
        entry: What is trained.
        train: Training split, on the device that trains.
        test: Test split, watched but never selected on.
        out: Folder of the run; made where missing.
        precision: "float32", or "bfloat16" for autocast.
        resume: Go on with the run in the folder, where there is one.
        compiled: As of `Learner`, cuda_graph and joined too; by default as `how_on` chooses.
        snapshot_seconds: Between two snapshots.
        world: The processes that train together.
        model_args: Of the model, beyond the entry's own: {"group_size": 4}.
        start: Folder of a finished run of the same model, with whose weights this one begins; where it was of
            another data set, with a new head.

    Attributes:
        ready_s: Seconds from its making to the end of the session's first step, which may compile.
    Raises:
        ValueError: the folder holds another run, or one on other images, or this one and `resume` is not
            set; its snapshots are damaged; the data cannot be split over the ranks; or `start` is of
            another model.
    """

    def __init__(
        self,
        entry: Entry,
        recipe: Recipe,
        train: Split,
        test: Split,
        *,
        out: Path,
        seed: int = 0,
        precision: str,
        resume: bool = False,
        compiled: Compiled | None = None,
        cuda_graph: bool | None = None,
        joined: bool = False,
        snapshot_seconds: float = 60.0,
        world: World | None = None,
        model_args: dict[str, Any] | None = None,
        start: Path | None = None,
    ) -> None:
        self._made, self.ready_s = time.monotonic(), 0.0
        self.model_args = model_args or {}
        self.start = read_finished(start) if start else None
        if self.start and (self.start.model, self.start.model_args) != (entry.model, self.model_args):
            raise ValueError(
                f"{start}: expected a run of {entry.model} with model arguments {self.model_args}, "
                f"found one of {self.start.model} with {self.start.model_args}"
            )
        self.entry, self.recipe, self.seed, self.precision, self.out = entry, recipe, seed, precision, out
        self.train_split, self.test_split = train, test
        self.device = train.labels.device
        self.world = world or World(device=self.device)
        self.snapshot_seconds = snapshot_seconds
        self.steps_per_epoch = -(-len(train) // recipe.batch_size)
        self.steps = recipe.epochs * self.steps_per_epoch
        self.step, self.seconds = 0, 0.0  # done, and the wall time it took
        self._saved_step = -1
        last = len(train) - (self.steps_per_epoch - 1) * recipe.batch_size
        if last < self.world.size:
            raise ValueError(
                f"the last batch of an epoch has {last} images, too few for {self.world.size} processes"
            )
        compiled, cuda_graph = how_on(self.world, compiled, cuda_graph)
        self.learner = Learner(
            entry,
            recipe,
            seed=seed,
            precision=precision,
            compiled=compiled,
            world=self.world,
            model_args=self.model_args,
            start=start / WEIGHTS if start else None,
            start_head=self.start is None or self.start.entry == entry.name,
            cuda_graph=cuda_graph,
            joined=joined,
        )
        if self.world.first:
            self.journal = Journal(
                out,
                identity(
                    entry=entry.name,
                    recipe=recipe,
                    seed=seed,
                    precision=precision,
                    model_args=self.model_args,
                    start=self.start.sha256 if self.start else None,
                    images=train.checksum(),
                ),
                resume=resume,
                hardware=hardware(self.device, self.world.size),
            )
        self._losses = torch.zeros(self.steps_per_epoch, device=self.device)  # of this epoch, by step
        # read without waiting for the device: it shows a loss of some steps before
        self._seen = torch.zeros((), pin_memory=self.device.type == "cuda")
        self._restore()

    def _state(self) -> dict[str, Tensor]:
        return self.learner.state() | {"losses": self._losses}

    def _restore(self) -> None:
        """Takes up the newest whole snapshot, where there is one; all ranks take the first one's."""
        state, place = self._state(), torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.world.first and (found := load_snapshot(self.out)):
            tensors, told = found
            if {name: value.shape for name, value in tensors.items()} != {
                name: value.shape for name, value in state.items()
            }:
                raise ValueError(f"{self.out}: its snapshots are of another model; choose another --out")
            for name, value in state.items():
                value.copy_(tensors[name])
            place.copy_(torch.tensor([float(told["step"]), float(told["seconds"])], dtype=torch.float64))
            self._saved_step = int(told["step"])
        self.world.from_first([place, *state.values()])
        self.step, self.seconds = int(place[0].item()), place[1].item()

    def save(self) -> None:
        """Writes a snapshot, whole or not at all.

        Raises:
            OSError: it cannot be written; the one before is kept.
            ValueError: the run has come to numbers that are not finite.
        """
        if not self.world.first:
            return
        self._check_losses()
        try:
            save_snapshot(self.out, self.step, self._state(), {"seconds": str(self.seconds)})
        except ValueError as error:
            raise ValueError(f"training failed: {error}; {self._last_good()}") from error
        self._saved_step = self.step

    def _last_good(self) -> str:
        path = newest(self.out)
        return f"the last good snapshot is {path}" if path else "there is no snapshot yet"

    def _check_losses(self) -> None:
        bad = [index for index, loss in enumerate(self._losses.tolist()) if not isfinite(loss)]
        if bad:
            epoch = (self.step - 1) // self.steps_per_epoch
            raise ValueError(
                f"the loss is not finite from step {epoch * self.steps_per_epoch + bad[0] + 1} on "
                f"(epoch {epoch + 1}); {self._last_good()}"
            )

    def train(
        self,
        time_budget: float = float("inf"),
        watch: Watch = unwatched,
        report: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> bool:
        """Trains to the recipe's end, or until the budget is spent, and leaves a snapshot.

        Args:
            time_budget: Seconds of wall time, snapshots and the watched test error included.
            watch: Called at each look at the loss.
            report: Called with each epoch's row of the log.
        Returns:
            Whether the recipe's end is reached.
        Raises:
            ValueError: a loss is not finite; names the step and the last good snapshot. Another process
                trains in the folder.
            OSError: the folder cannot be written.
        """
        with self.journal.alone() if self.world.first else nullcontext():
            return self._train(Clock(time_budget, self.snapshot_seconds), watch, report)

    def _train(self, clock: Clock, watch: Watch, report: Callable[[dict[str, float]], None]) -> bool:
        self._clock, self._begun, self._images = clock, self.step, 0  # of this session
        self._timed = 0, time.monotonic()  # images and time from which the rate is told
        self._paced = self.step, time.monotonic()  # step and time from which what is left is told
        while self.step < self.steps and not self._must_stop():
            if self._epoch(watch) and self.world.first:
                report(self._finish_epoch())
        if self._saved_step != self.step:
            self.save()
        if self.world.first:
            self.journal.close()
        return self.step == self.steps

    def _must_stop(self) -> bool:
        """Whether the budget is spent; writes a snapshot where one is due."""
        if self.world.first and self._saved_step != self.step and self._clock.snapshot_due():
            began = time.monotonic()
            try:
                self.save()
            except OSError as error:  # the run may outlive a full disk
                logger.warning("%s; going on with the snapshot before", error)
            self._clock.snapshot_ended(began)
            images, since = self._timed
            self._timed = images, since + time.monotonic() - began
        if self.world.size > 1 and self.step % STEPS_PER_LOOK:
            return False
        return self.world.first_says(self._clock.spent())

    def _images_per_s(self) -> float:
        """Of this epoch, but for snapshots; in a session's first, after its first step, which may compile."""
        images, began = self._timed
        return (self._images - images) / max(time.monotonic() - began, 1e-9)

    def _epoch(self, watch: Watch) -> bool:
        """Trains to the epoch's end, where the clock lets it; says whether it got there."""
        self.learner.model.train()
        epoch, begin = divmod(self.step, self.steps_per_epoch)
        order = torch.Generator().manual_seed(seed_of(self.seed, epoch, salt=1))
        permutation = torch.randperm(len(self.train_split), generator=order).to(self.device)
        started, seconds = time.monotonic(), self.seconds
        self._timed = self._images, started
        for index, chosen in enumerate(permutation.split(self.recipe.batch_size)[begin:], begin):
            fraction = self.step / self.steps
            self._losses[index] = self.learner.learn(self.train_split, chosen, self.step, fraction)
            self.step, self._images = self.step + 1, self._images + len(chosen)
            self.seconds = seconds + time.monotonic() - started
            self.ready_s = self.ready_s or time.monotonic() - self._made
            if self.device.type == "cpu" or index % STEPS_PER_LOOK == 0:
                self._look(index, watch)
            if self.step == self._begun + 1 and index + 1 < self.steps_per_epoch:
                self._timed = self._images, time.monotonic()
                self._paced = self.step, time.monotonic()
            if index + 1 < self.steps_per_epoch and self._must_stop():
                return False
        return True

    def _look(self, index: int, watch: Watch) -> None:
        self._seen.copy_(self._losses[index], non_blocking=True)
        loss = float(self._seen.numpy())
        if not isfinite(loss):
            self._check_losses()
        step, since = self._paced
        moment = Moment(
            epoch=(self.step - 1) // self.steps_per_epoch + 1,
            epochs=self.recipe.epochs,
            step=self.step,
            steps=self.steps,
            loss=loss,
            images_per_s=self._images_per_s(),
            eta_s=(self.steps - self.step) * (time.monotonic() - since) / (self.step - step),
        )
        watch(moment)

    def _finish_epoch(self) -> dict[str, float]:
        """Logs an epoch: mean loss of the first rank's share of the batches, error on the test split."""
        began = time.monotonic()
        self._check_losses()  # waits for the device
        self.seconds += time.monotonic() - began
        images_per_s = round(self._images_per_s(), 1)
        sizes = torch.full((self.steps_per_epoch,), self.recipe.batch_size, dtype=torch.float64)
        sizes[-1] -= sizes.sum() - len(self.train_split)
        loss = (self._losses.double().cpu() @ sizes).item() / len(self.train_split)
        self.learner.kept.eval()
        with self.learner.passing():
            error = evaluate(self.learner.kept, self.test_split, self.entry.dataset).top1_error
        values = (
            self.step // self.steps_per_epoch,
            self.recipe.lr_at((self.step - 1) / self.steps),
            loss,
            error,
            images_per_s,
            round(self.seconds, 1),
        )
        row: dict[str, float] = dict(zip(LOG_FIELDS, values, strict=True))
        try:
            self.journal.log(row)
        except OSError as error:  # the run may outlive a full disk
            logger.warning("%s; the epoch's line will be written later", error)
        return row
