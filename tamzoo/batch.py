"""A job of many predictions: one parquet file, made of parts that survive a kill."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from tamzoo.answers import schema
from tamzoo.checkpoint import check_output_file, locked, whole_file, write_whole
from tamzoo.parts import Part, parts_folder
from tamzoo.shards import MARK, parquet_library

# Where predictions are made: the answer of each part, a table as `schema` says, in any order, each once
Engine = Callable[[Sequence[Part]], Iterator[tuple[Part, Any]]]
_PARTS_A_GROUP = 16  # a row group of the finished file
# what a call leaves in the folder of its parts, half-written under a hidden name too
_OURS = re.compile(r"\.?(\d{8}\.parquet|merged\.parquet|job\.json|job\.lock)(\..+)?")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be predicted, by what, to where.

    Attributes:
        model: Tells the model from any other, for instance by a hash.
        out: The parquet file; while the job is not finished its parts are in the folder OUT.parts.
    """

    model: str
    parts: list[Part]
    top: int
    out: Path

    @property
    def folder(self) -> Path:
        return parts_folder(self.out)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What two calls must agree on to be of the same job: the input's files by name, size and time.

        Of a shard that names pictures it is the shard that counts: replaced pictures are not seen.
        """
        listing = hashlib.sha256()
        for part in self.parts:
            stamps = [_stamp(path) for path in part.paths or (part.shard,)]
            listing.update(json.dumps([asdict(part), stamps]).encode())
        rows = sum(part.n for part in self.parts)
        return {"model": self.model, "input": listing.hexdigest(), "rows": rows, "top": self.top}

    @property
    def metadata(self) -> dict[bytes, str]:
        """What marks its parquet files as predictions, which are no input."""
        return {MARK: json.dumps(self.identity)}

    def file_of(self, part: Part) -> Path:
        return self.folder / f"{part.index:08d}.parquet"

    def pending(self) -> list[Part]:
        """The parts that are not written yet."""
        return [part for part in self.parts if not self.file_of(part).exists()]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a job ended: `rows` and `errors` of the whole output, the others of this call."""

    rows: int
    errors: int
    first_error: str  # empty where there is none
    predicted: int
    seconds: float


def run_job(job: Job, engine: Engine) -> Summary:
    """Predicts what is not yet predicted and writes the output, whole or not at all.

    Each part is written as a whole under a name of its own, so that a kill or a full disk costs the parts in
    work and no other, and a part that is answered twice is there once. The same call goes on with the rest;
    once the output is there, it does nothing.

    Raises:
        ValueError: the output's name does not fit, is taken by another job, or another call is at work on it.
        OSError: it cannot be written; says which rows are kept.
    """
    began, predicted = time.perf_counter(), 0
    if not _is_finished(job):
        with _own_folder(job):
            if not _is_finished(job):  # by another call, before this one had the folder
                predicted = _finish(job, engine)
    with suppress(OSError):  # it is only in the way; what is not ours stays, and the folder with it
        for left in _left_in(job.folder):
            left.unlink()
        job.folder.rmdir()
    errors, first = _errors(job.out)
    return Summary(
        rows=job.identity["rows"],
        errors=errors,
        first_error=first,
        predicted=predicted,
        seconds=time.perf_counter() - began,
    )


def _finish(job: Job, engine: Engine) -> int:
    """Predicts the parts that are pending and writes the output; how many rows were predicted."""
    predicted = 0
    for part, table in engine(job.pending()):
        assert len(table) == part.n
        with _keeping(job), whole_file(job.file_of(part)) as file:
            parquet_library().write_table(table.replace_schema_metadata(job.metadata), file)
        predicted += part.n
    with _keeping(job):
        _merge(job)
    return predicted


def check_output(out: Path) -> None:
    """Sees that a parquet file can be written there, before there is any work.

    Raises:
        ValueError: no .parquet, no such folder, or a folder itself; or pyarrow is missing.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"{out}: expected an output that ends in .parquet")
    check_output_file(out)
    parquet_library()


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None  # its row says why
    return found.st_size, found.st_mtime_ns


def _is_finished(job: Job) -> bool:
    if not job.out.exists():
        return False
    from pyarrow import ArrowException

    try:
        stored = (parquet_library().read_schema(job.out).metadata or {}).get(MARK, b"null")
    except (ArrowException, OSError):
        stored = b"null"
    if json.loads(stored) != job.identity:
        raise ValueError(
            f"{job.out} is there already, not of this model and input; remove it or pass another --out"
        )
    return True


@contextmanager
def _own_folder(job: Job) -> Iterator[None]:
    """The folder of the parts, new or left by a kill, for this call alone."""
    with _keeping(job):
        job.folder.mkdir(exist_ok=True)
        refusal = f"{job.out}: another call is writing it; wait for its end, or pass another --out"
        held = locked(FileLock(job.folder / "job.lock"), refusal)
    with held:
        _open_folder(job)
        yield


def _open_folder(job: Job) -> None:
    """Makes sure that what the folder holds is of this job."""
    note = job.folder / "job.json"
    with _keeping(job):
        if not note.exists():
            for left in _left_in(job.folder, "*.parquet"):  # nobody knows of which job
                left.unlink()
            write_whole(note, json.dumps(job.identity))
    try:
        stored = json.loads(note.read_text())
        changed = [key for key, value in job.identity.items() if stored[key] != value]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{note} is damaged ({error}); remove {job.folder} and run again") from error
    if changed:
        raise ValueError(
            f"{job.folder} holds the parts of another job (other {', '.join(changed)}); "
            "finish that job, remove the folder, or pass another --out"
        )
    for left in _left_in(job.folder, ".*"):  # half a part, of a call that was killed
        left.unlink()


def _left_in(folder: Path, pattern: str = "*") -> list[Path]:
    return [path for path in folder.glob(pattern) if _OURS.fullmatch(path.name)]


def _merge(job: Job) -> None:
    """The parts, in their order, as one file."""
    import pyarrow as pa

    parquet, merged = parquet_library(), job.folder / "merged.parquet"
    columns = schema().with_metadata(job.metadata)
    with whole_file(merged) as file, parquet.ParquetWriter(file, columns) as writer:
        for start in range(0, len(job.parts), _PARTS_A_GROUP):
            some = job.parts[start : start + _PARTS_A_GROUP]
            writer.write_table(pa.concat_tables([_read_part(job.file_of(part), columns) for part in some]))
    merged.replace(job.out)


def _read_part(path: Path, columns: Any) -> Any:
    from pyarrow import ArrowException

    try:
        return parquet_library().read_table(path).cast(columns)
    except (ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run the same command again") from error


def _errors(out: Path) -> tuple[int, str]:
    """How many rows have an error, and the first one's."""
    count, first = 0, ""
    with parquet_library().ParquetFile(out) as file:
        for batch in file.iter_batches(columns=["error"]):
            found = batch.column(0).drop_null()
            count += len(found)
            first = first or (found[0].as_py() if len(found) else "")
    return count, first


@contextmanager
def _keeping(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = job.identity["rows"] - sum(part.n for part in job.pending())
        reason = os.strerror(error.errno) if error.errno else str(error)
        told = (
            f"{kept} of {job.identity['rows']} rows are finished and kept in {job.folder}, from where the "
            "same command goes on"
        )
        more = f"; {told}" if kept else ""
        raise OSError(error.errno, f"cannot write {job.out}: {reason}{more}") from error
