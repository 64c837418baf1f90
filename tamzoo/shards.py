"""Parquet shards that hold pictures: which column, and its rows one by one."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

# a key; a picture's file, the bytes of one, or None where there is none
Row = tuple[str, Path | bytes | None]

MARK = b"tamzoo"  # in the metadata of a parquet file: it holds predictions
_READ_ROWS = 64  # in memory at once
_READ_BYTES = 2**20
_PATH_COLUMNS = ("image", "img", "path", "file", "file_name")  # texts under another name are no pictures


def parquet_library() -> Any:
    """pyarrow's parquet module.

    Raises:
        ValueError: it is not installed; says how.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("parquet needs pyarrow; pip install 'tamzoo[export]'") from error
    return parquet


def open_shard(path: str, column: str | None = None) -> tuple[list[int], str] | None:
    """Where a shard's row groups begin and the last one ends, and its column of pictures.

    That is the Hub's {bytes, path}, plain bytes, or paths. None for the predictions of a job, whose `path`
    is no input.

    Raises:
        ValueError: not a parquet file, no such column, or several where `column` does not say which.
    """
    parquet = parquet_library()
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata
            sizes = [rows.row_group(group).num_rows for group in range(rows.num_row_groups)]
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}); fetch it again") from error
    if MARK in (schema.metadata or {}):
        return None
    pictures = [field.name for field in schema if holds_bytes(field.type)]
    texts = [field.name for field in schema if _is_text(field.type)]
    found = pictures or [name for name in texts if name in _PATH_COLUMNS]
    if column is not None:
        found = [column] if column in (*pictures, *texts) else []
    if len(found) != 1:
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)
        wanted = f"column {column} with pictures" if column else "image column"
        raise ValueError(
            f"{path}: {'several columns' if found else f'no {wanted}'}, expected {{bytes, path}}, bytes or "
            f"paths of pictures; found {there}; say which with --column"
        )
    return [0, *accumulate(sizes)], found[0]


def shard_rows(path: str, column: str, start: int) -> Iterator[Row]:
    """The rows of a shard from `start` to its end.

    Raises:
        ValueError: the shard is damaged, or has changed since it was listed.
    """
    parquet = parquet_library()
    from pyarrow import ArrowException

    group = number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=_READ_BYTES) as file:
            while number + (rows := file.metadata.row_group(group).num_rows) <= start:
                group, number = group + 1, number + rows
            groups = range(group, file.num_row_groups)
            for batch in file.iter_batches(_READ_ROWS, row_groups=groups, columns=[column]):
                cells = _cells(batch.column(0).slice(max(0, start - number)))
                for row, cell in enumerate(cells, max(number, start)):
                    yield f"{path}:{row}", Path(path).parent / cell if isinstance(cell, str) else cell
                number += len(batch)
    except (ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())  # arrow's have several lines
        raise ValueError(
            f"{path}: cannot be read after row {number} ({told}); fetch it again or leave it out"
        ) from error


def _cells(column: Any) -> list[bytes | str | None]:
    """The bytes of pictures, else their paths.

    Of a struct only these two fields: Ray's extension types, which it may hold too, unpickle their values.

    Raises:
        ArrowInvalid: neither bytes nor texts; the type of an extension is known only where its library is.
    """
    from pyarrow import ArrowInvalid, types

    if types.is_struct(column.type):
        fields = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
        cells = _cells(fields["bytes"])
        if "path" in fields and _is_text(fields["path"].type):
            cells = [data or path for data, path in zip(cells, _cells(fields["path"]), strict=True)]
        return cells
    if not (holds_bytes(column.type) or _is_text(column.type)):
        raise ArrowInvalid(f"expected pictures, found {column.type}")
    return column.to_pylist()


def holds_bytes(kind: Any) -> bool:
    """Whether an arrow type is bytes or the Hub's {bytes, path}."""
    from pyarrow import types

    if types.is_struct(kind):
        kinds = [field.type for field in kind if field.name == "bytes"]
        return len(kinds) == 1 and not types.is_struct(kinds[0]) and holds_bytes(kinds[0])
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)
