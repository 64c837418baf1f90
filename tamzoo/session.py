"""One session of training: entries one after another, until they are done or the time is up."""

import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tamzoo.catalogue import ENTRIES, QUEUE, Entry
from tamzoo.checkpoint import read_finished
from tamzoo.data import Split, data_directory, load_split
from tamzoo.distributed import World
from tamzoo.finish import finish
from tamzoo.hub import CARDS
from tamzoo.journal import AnotherTrainsError, check_same_run, identity
from tamzoo.learner import Compiled
from tamzoo.progress import Voice
from tamzoo.recipes import Recipe, recipe_for
from tamzoo.records import read_record
from tamzoo.registry import find_entry
from tamzoo.train import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Order:
    """How the entries of a session are trained."""

    recipe: str = "short"
    epochs: int | None = None  # None: the recipe's
    seed: int = 0
    precision: str | None = None  # None: bfloat16 on CUDA, float32 on CPUs
    resume: bool = False
    compiled: Compiled | None = None  # None: as `train.how_on` chooses; cuda_graph too
    cuda_graph: bool | None = None  # replay a captured step
    joined: bool = False  # the ends of blocks as one operation
    model_args: dict[str, Any] = field(default_factory=dict)  # beyond the entry's own
    start: Path | None = None  # folder of the finished run whose weights training begins with

    def recipe_on(self, tag: str) -> Recipe:
        """The recipe's row for a data set, with this order's epochs."""
        recipe = recipe_for(self.recipe, tag)
        return recipe if self.epochs is None else replace(recipe, epochs=self.epochs)


def waiting(out: Path, recipe: str = "short", only: str = "*", world: World | None = None) -> list[str]:
    """Entries that a recipe has not trained, in the catalogue's order of training.

    Of an attention those go first that have no weights at all.

    Args:
        out: Folder of the queue's runs; an entry with a record of the recipe in its folder there is trained.
        recipe: As in `recipe_for`; an entry that was trained by another one, on a CPU say, waits too.
        only: Pattern of names, as of files.
        world: The processes that train together; the first one looks at the folder.
    Raises:
        ValueError: no entry has such a name; no such recipe; a record there cannot be read.
    """
    groups = groupby(QUEUE, key=lambda name: ENTRIES[name].attention)
    queue = [name for _, group in groups for name in sorted(group, key=_has_weights)]
    names = [name for name in queue if fnmatch(name, only)]
    if not names:
        raise ValueError(f"no entry is called {only!r}. All names: tamzoo list")
    names = [name for name in names if not _trained_by(ENTRIES[name], recipe)]
    finished = [_finished_by(out / name, ENTRIES[name], recipe) for name in names]
    if world:
        finished = [world.first_says(flag) for flag in finished]
    return [name for name, done in zip(names, finished, strict=True) if not done]


def _has_weights(name: str) -> bool:
    return ENTRIES[name].trained is not None


def _trained_by(entry: Entry, recipe: str) -> bool:
    """Whether the zoo has weights of it, or a record of a run to compare with."""
    wanted = recipe_for(recipe, entry.dataset.tag).name
    if entry.trained:
        return entry.trained.recipe == wanted
    return CARDS is not None and _finished_by(CARDS / entry.name, entry, recipe)


def _finished_by(folder: Path, entry: Entry, recipe: str) -> bool:
    path = folder / "record.json"
    if not path.is_file():
        return False
    record = read_record(path)
    wanted = recipe_for(recipe, entry.dataset.tag).name
    return (record.entry, record.recipe["name"]) == (entry.name, wanted)


def train_entries(
    folders: dict[str, Path], order: Order, data: Path | None, time_budget: float, world: World, voice: Voice
) -> bool:
    """Trains entries, each in its folder, and stores weights and records of those that end.

    Args:
        folders: By the entry's name.
        data: As in `data_directory`.
        time_budget: Seconds of wall time, from now.
    Returns:
        Whether all are done.
    Raises:
        ValueError: no such entry or recipe, a CUDA graph or joined ends elsewhere than on one process on
            CUDA, or what `load_split` and `Run` raise; of several entries, at the end, which failed (on
            several processes, the first failure), other than those in whose folder another process trains.
        RuntimeError: the device failed for good; the entries after are left alone.
    """
    for option, asked in {"--cuda-graph": order.cuda_graph, "--join-ends": order.joined}.items():
        if asked and (world.device.type != "cuda" or world.size > 1):
            raise ValueError(
                f"{option} needs one process on CUDA, found {world.size} on {world.device.type}; leave it out"
            )
    ends, failed = time.monotonic() + time_budget, []
    if not folders:
        voice.say("nothing to train: every such entry has weights of this recipe")
        return True
    directory, splits, ready_s, left = data_directory(data), {}, 0.0, False
    for name, out in folders.items():
        dataset = find_entry(name).dataset
        if world.first_says(time.monotonic() + ready_s >= ends):  # no step would be done in time
            voice.say(f"the time is up; the same command goes on with {name}")
            left = True
            break
        try:
            if world.first_says(order.resume and (out / "record.json").exists()):
                if world.first:
                    _tell_ended(name, out, order, voice)
                continue
            if dataset.tag not in splits:  # one data set at a time on the device
                splits = {
                    dataset.tag: [
                        load_split(directory, dataset, split, voice.bar).to(world.device)
                        for split in ("train", "test")
                    ]
                }
            ended, took = _train_entry(name, out, splits[dataset.tag], order, ends, world, voice)
            if not ended:
                left = True
                break
            ready_s = max(ready_s, took)
        except Exception as error:  # a compiler's are of any kind
            if not isinstance(error, ValueError | OSError):  # those are written for people
                logger.warning("%s failed", name, exc_info=error)
            if len(folders) == 1 or world.size > 1:
                raise
            if isinstance(error, torch.AcceleratorError) and not _computes(world.device):
                raise RuntimeError(f"{name}: {error}") from error
            left = True
            if isinstance(error, AnotherTrainsError):
                voice.say(str(error))
                continue
            voice.say(f"{name}: failed: {error}")
            failed.append(name)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(folders)} entries failed, for the reasons above: {', '.join(failed)}"
        )
    return not left


def _computes(device: torch.device) -> bool:
    """Whether a device still does; after most errors of its own it does nothing any more."""
    try:
        return torch.ones(1, device=device).item() == 1
    except torch.AcceleratorError:
        return False


def _tell_ended(name: str, folder: Path, order: Order, voice: Voice) -> None:
    """Sees that a run that has ended is the one ordered; `Run` itself looks at those that have not."""
    record = read_record(folder / "record.json")
    wanted = identity(
        entry=name,
        recipe=order.recipe_on(ENTRIES[name].dataset.tag),
        seed=order.seed,
        precision=order.precision or record.precision,
        model_args=order.model_args,
        start=read_finished(order.start).sha256 if order.start else None,
    )
    start = record.start.sha256 if record.start else None
    check_same_run(folder, wanted | asdict(record) | {"start": start}, wanted)
    voice.say(f"{name}: done, top-1 error {record.score.top1_error:.2f} %")


def _train_entry(
    name: str, out: Path, splits: list[Split], order: Order, ends: float, world: World, voice: Voice
) -> tuple[bool, float]:
    """Trains, until the end or `ends`; of what has ended, weights and record are stored.

    Returns:
        Whether it has ended, and the run's `ready_s`; not the run itself: its memory is the next one's.
    """
    recipe = order.recipe_on(ENTRIES[name].dataset.tag)
    precision = order.precision or ("bfloat16" if world.device.type == "cuda" else "float32")
    run = Run(
        ENTRIES[name],
        recipe,
        *splits,
        out=out,
        seed=order.seed,
        precision=precision,
        resume=order.resume,
        compiled=order.compiled,
        cuda_graph=order.cuda_graph,
        joined=order.joined,
        world=world,
        model_args=order.model_args,
        start=order.start,
    )
    ranks = f", {world.size} processes" if world.size > 1 else ""
    start = f", beginning with the weights of {order.start}" if order.start else ""
    start += ", but for its head" if run.start and run.start.entry != name else ""
    voice.say(
        f"{name}: {recipe.epochs} epochs of recipe {recipe.name}, {precision} on {world.device.type}{ranks}"
        f"{start}, from step {run.step} of {run.steps}"
    )

    def report(row: dict[str, float]) -> None:
        voice.say(
            f"epoch {row['epoch']}/{recipe.epochs}: loss {row['train_loss']:.4f}, "
            f"test error {row['test_top1_error']:.2f} %, {row['images_per_s']:,.0f} images/s"
        )

    with run.journal.alone() if world.first else nullcontext():
        if not run.train(ends - time.monotonic(), voice.watch, report):
            how = "" if order.resume else " with --resume"
            voice.say(f"{name}: stopped after step {run.step} of {run.steps}; the same command{how} goes on")
        elif world.first:
            score = finish(run, voice.bar).score
            voice.say(f"{name}: top-1 error {score.top1_error:.2f} % on {score.n} images; weights in {out}")
    return run.step == run.steps, run.ready_s
