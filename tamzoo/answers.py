"""Batches of rows to tables of predictions, on all cores of this machine."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tamzoo.images import decode_picture, of_system, open_picture
from tamzoo.parts import Batch, Part, batches_of
from tamzoo.predict import BATCH, NO_PROBABILITIES, Classifier
from tamzoo.progress import Counted, Progress, silent
from tamzoo.shards import Row

MOST_WORKERS = 8  # each holds a batch and its activations; more cores go to the model's own threads


def schema() -> Any:
    """The columns of the output; where `error` is a text, `label`, `index`, `probability`, `top` are null."""
    import pyarrow as pa

    ranked = pa.struct([("label", pa.string()), ("index", pa.int32()), ("probability", pa.float32())])
    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),  # a shard's rows: SHARD.parquet:ROW
            ("label", pa.string()),
            ("index", pa.int32()),
            ("probability", pa.float32()),
            ("top", pa.list_(ranked)),  # best first
            ("error", pa.string()),
        ]
    )


def answer(classifier: Classifier, rows: Sequence[Row], top: int = 5) -> Any:
    """The `top` likeliest classes of each row; one without a usable picture or answer gets an error.

    Returns:
        A pyarrow table as `schema` says, with the rows in their order.
    """
    import pyarrow as pa

    _, h, w = classifier.input_size
    pixels = np.empty((len(rows), h, w, 3), np.uint8)
    errors: list[str | None] = []
    places: list[int | None] = []  # of the rows among those with a picture
    n = 0
    for key, source in rows:
        try:
            pixels[n] = classifier.pixels(_picture(key, source))
        except (ValueError, OSError) as error:  # a name too long, a folder that may not be read
            if of_system(error):  # the next call may answer it
                raise
            errors.append(_utf8(str(error)))
            places.append(None)
        else:
            errors.append(None)
            places.append(n)
            n += 1
    indices, probabilities = classifier.best(pixels[:n], top) if n else np.empty((2, 0, 1))
    for index, place in enumerate(places):
        if place is not None and np.isnan(probabilities[place]).any():
            errors[index], places[index] = _utf8(f"{rows[index][0]}: {NO_PROBABILITIES}"), None
    ranked = _ranked(classifier, indices.ravel(), probabilities.ravel())
    starts = np.arange(n + 1, dtype=np.int32) * indices.shape[1]
    columns = (*ranked.take(starts[:n]).flatten(), pa.ListArray.from_arrays(starts, ranked))
    taken = [column.take(pa.array(places, pa.int32())) for column in columns]
    paths = [_utf8(key) for key, _ in rows]
    return pa.table([paths, *taken, pa.array(errors, pa.string())], schema())


def _ranked(classifier: Classifier, indices: np.ndarray, probabilities: np.ndarray) -> Any:
    """Classes and their (n,) probabilities as a pyarrow array; column by column, since rows take long."""
    import pyarrow as pa

    labels = [classifier.label(index) for index in indices.tolist()]
    columns = [
        pa.array(labels, pa.string()),
        pa.array(indices, pa.int32()),
        pa.array(probabilities, pa.float32()),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(schema().field("top").type.value_type))


def _picture(key: str, source: Path | bytes | None) -> Image.Image:
    if source is None:
        raise ValueError(f"{key}: expected a picture, found null")
    return open_picture(source) if isinstance(source, Path) else decode_picture(io.BytesIO(source), key)


def _utf8(text: str) -> str:
    """A text that parquet can hold: names of files need not be UTF-8."""
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:  # a shard's text, in a locale that has no such letters
        raw = text.encode(errors="replace")
    return raw.decode(errors="replace")


def workers_and_threads() -> tuple[int, int]:
    """How many batches are worked on at once on this machine, and how many threads the model has for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, MOST_WORKERS)
    return workers, cores // workers


@dataclass(frozen=True, kw_only=True)
class Here:
    """The engine of this machine: every worker is a thread that decodes a batch, then runs the model on it.

    So one worker's decoding overlaps the others' inference, and no core waits at the end of a batch for
    another one, as the threads of one operator would. Pillow and the runtimes release the GIL.
    """

    classifier: Classifier
    workers: int
    batch: int = BATCH
    top: int = 5
    progress: Progress = silent

    def __call__(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
        import pyarrow as pa

        steps = sum(-(-part.n // self.batch) for part in parts)
        answers = ahead(self._answer, batches_of(parts, self.batch), self.workers)
        tables: list[Any] = []  # of the batches of one part
        for batch, table in self.progress(Counted(answers, steps), "Predicting"):
            tables.append(table)
            if batch.last:
                yield batch.part, pa.concat_tables(tables)
                tables.clear()

    def _answer(self, batch: Batch) -> tuple[Batch, Any]:
        return batch, answer(self.classifier, batch.rows, self.top)


def ahead(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """Results in order, worked out by threads that run at most two items each ahead of who asks."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
