"""The end of a training run: weights stored, that very file measured, gates and errors recorded."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict

from torch import Tensor

from tamzoo.checkpoint import WEIGHTS, sha256_of, write_whole
from tamzoo.data import batches, darkest_and_brightest, normalise
from tamzoo.evaluate import evaluate
from tamzoo.gates import save_measured
from tamzoo.progress import Progress, silent
from tamzoo.records import Record
from tamzoo.snapshots import keep_newest
from tamzoo.train import Run


def finish(run: Run, progress: Progress = silent) -> Record:
    """Stores a trained run's weights in float16, measures that very file, and writes the record."""
    path, model = run.out / WEIGHTS, deepcopy(run.learner.kept).eval()
    for kept, trained in zip(
        model.state_dict().values(), run.learner.model.state_dict().values(), strict=True
    ):
        if not kept.is_floating_point():
            kept.copy_(trained)  # BatchNorm's count of batches, which has no average

    def images() -> Iterator[Tensor]:
        return (normalise(pixels, run.entry.dataset) for pixels, _ in batches(run.test_split, 250))

    ends = darkest_and_brightest(run.entry.dataset)
    gates = save_measured(path, model, run.entry.name, images, progress, ends)
    record = Record(
        entry=run.entry.name,
        data=f"{run.entry.dataset.title} train",
        data_note=run.train_split.note,
        n_train=len(run.train_split),
        seed=run.seed,
        recipe=asdict(run.recipe),
        epochs=run.recipe.epochs,
        selection="last epoch",
        precision=run.precision,
        hardware=run.journal.hardware,
        seconds=round(run.seconds, 1),
        commit=run.journal.commit,
        versions=run.journal.versions,
        sha256=sha256_of(path),
        score=evaluate(model, run.test_split, run.entry.dataset, progress=progress),
        gates=gates,
        model_args=run.model_args,
        start=run.start,
    )
    write_whole(run.out / "record.json", record.to_json())
    keep_newest(run.out, 1)
    return record
