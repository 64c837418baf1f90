"""Pictures in files, folders, globs and parquet shards, as parts: fixed ranges of one sorted listing."""

import glob
import os
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tamzoo.images import SUFFIXES
from tamzoo.shards import Row, open_shard, shard_rows

PART_ROWS = 1024  # at most; work that a kill costs
_PARTS = ".parquet.parts"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some pictures, or some rows of one parquet shard, answered as a whole.

    Attributes:
        index: Its place among the parts of the job: 0, 1, ...
        paths: Of the pictures; empty for a part of a shard.
        shard: A parquet file; empty for pictures.
        column: The shard's column that holds the pictures.
        start: Its first row in the shard.
        group: The first row of the row group that holds `start`; nearer one cannot begin to read.
    """

    index: int
    n: int
    paths: tuple[str, ...] = ()
    shard: str = ""
    column: str = ""
    start: int = 0
    group: int = 0

    def follows(self, other: "Part") -> bool:
        """Whether reading on from the other's end in the same shard is no longer than beginning anew."""
        if not self.shard or self.shard != other.shard:
            return False
        return self.group <= other.start + other.n <= self.start

    def rows(self) -> Iterator[Row]:
        """Its rows; where it is of a shard, also those after it."""
        if self.shard:
            return shard_rows(self.shard, self.column, self.start)
        return ((path, Path(path)) for path in self.paths)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that go through the model together, all of one part."""

    part: Part
    rows: list[Row]
    last: bool  # of its part


def list_parts(given: Collection[str], out: Path, column: str | None = None) -> list[Part]:
    """The parts of a job, the same at every call while the files are.

    Args:
        given: Pictures, parquet shards, folders of either (with their subfolders) and globs; predictions
            among what they hold are left out.
        out: The job's output, no input even where it lies among them.
        column: The shards' with the pictures, where they have several that could be.
    Raises:
        ValueError: nothing there, a folder or glob without pictures, a shard without an image column,
            predictions given as input.
    """
    parts: list[Part] = []
    pictures: list[str] = []

    def close() -> None:
        if pictures:
            parts.append(Part(index=len(parts), n=len(pictures), paths=tuple(pictures)))
            pictures.clear()

    for path in files_of(given):
        if not is_parquet(path):
            pictures.append(path)
            if len(pictures) == PART_ROWS:
                close()
            continue
        if _is_output(path, out):
            continue
        if (shard := open_shard(path, column)) is None:
            if path in given:
                raise ValueError(f"{path}: expected pictures, found predictions of tamzoo; leave it out")
            continue
        close()
        (*groups, end), name = shard
        for start in range(0, end, PART_ROWS):
            group, n = groups[bisect_right(groups, start) - 1], min(PART_ROWS, end - start)
            part = Part(index=len(parts), n=n, shard=path, column=name, start=start, group=group)
            parts.append(part)
    close()
    if column and parts and not any(part.shard for part in parts):
        raise ValueError(f"column {column!r} is of parquet files, and there are none; leave out --column")
    if not parts:
        raise ValueError(f"{', '.join(given)}: no rows, so nothing to predict")
    return parts


def batches_of(parts: Iterable[Part], size: int) -> Iterator[Batch]:
    """The rows of parts in batches of at most `size`; parts that follow one another are read in one pass.

    It asks for a part when the one before has gone, so that parts may come one by one.

    Raises:
        ValueError: a shard has fewer rows than it had when it was listed.
    """
    before, rows = None, iter(())
    for part in parts:
        if before and part.follows(before):
            next(islice(rows, gap := part.start - before.start - before.n, gap), None)  # skips it
        else:
            rows = part.rows()
        before = part
        for begin in range(0, part.n, size):
            wanted = min(size, part.n - begin)
            found = list(islice(rows, wanted))
            if len(found) < wanted:
                raise ValueError(f"{part.shard}: it has fewer rows than a moment ago; run the job again")
            yield Batch(part=part, rows=found, last=begin + wanted == part.n)


def parts_folder(out: Path) -> Path:
    """Where the finished parts of a job wait for the others."""
    return out.with_name(f"{out.name}.parts")


def files_of(given: Iterable[str]) -> list[str]:
    """Pictures and parquet files, each once: what folders, with their subfolders, hold and globs match too.

    Raises:
        ValueError: nothing there, or a folder or glob without pictures.
    """
    found: dict[str, str] = {}
    for one in given:
        for path in _files(one):
            found.setdefault(os.path.normpath(path), path)
    return list(found.values())


def is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _is_output(path: str, out: Path) -> bool:
    resolved = Path(path).resolve()
    return resolved == out.resolve() or resolved.parent == parts_folder(out).resolve()


def _files(given: str) -> Iterator[str]:
    if Path(given).is_dir():
        yield from _files_in(given)
    elif Path(given).is_file():
        yield given
    elif glob.has_magic(given):
        found = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 (pathlib has no absolute globs)
        if not found:
            raise ValueError(f"{given}: matches nothing; expected pictures or parquet files")
        for path in found:
            if any(name.endswith(_PARTS) for name in Path(path).parts):
                continue
            yield from _files_in(path) if Path(path).is_dir() else (path,)
    else:
        raise ValueError(f"{given}: expected pictures, a folder, a glob or parquet files, found nothing")


def _files_in(folder: str) -> Iterator[str]:
    """Pictures and shards under a folder and its links in a fixed order; no hidden files, no job's parts."""

    def refuse(error: OSError) -> None:
        raise error

    found, others, seen = False, 0, set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := Path(here).resolve()) in seen:  # by a link, which may lead in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not name.endswith(_PARTS)
        )
        for path in (Path(here, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES | {".parquet"}:
                found = True
                yield str(path)
            else:
                others += 1
    if not found:
        told = f"a folder of {others} files, none a picture" if others else "an empty folder"
        raise ValueError(f"{folder}: {told}; expected .jpg, .png, .webp or another image file, or .parquet")
