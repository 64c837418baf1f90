"""The files that CIFAR and SVHN come in, decoded to rows. Nothing is ever unpickled.

A row is one image as uint8: its label, 1 where it is known from a JPEG copy only, then its pixels (h, w, c).
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tamzoo.datasets import Dataset
from tamzoo.images import COMMON
from tamzoo.progress import Progress
from tamzoo.shards import holds_bytes

SIDE = 32
PIXELS = SIDE * SIDE * 3
ROW = 2 + PIXELS

# CIFAR's binary version: folder, files of a split, bytes of labels before the pixels (the last one counts)
_BINARY = {
    "cifar10": (
        "cifar-10-batches-bin",
        {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
        1,
    ),
    "cifar100": ("cifar-100-binary", {"train": ("train.bin",), "test": ("test.bin",)}, 2),
}
# CIFAR's Python version, which torchvision downloads: folder, files of a split, key of the labels
_PYTHON = {
    "cifar10": (
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)},
        "labels",
    ),
    "cifar100": ("cifar-100-python", {"train": ("train",), "test": ("test",)}, "fine_labels"),
}
_ARCHIVES = {
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-binary.tar.gz"),
}
_INTEGERS = ("BININT1", "BININT2", "BININT", "INT", "LONG1", "LONG")  # opcodes of a pickle that push one


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of one split, and how to read one of them to rows."""

    files: tuple[Path, ...]
    read: Callable[[Path, Dataset, Progress], np.ndarray]


def fetch_from_hub(dataset: Dataset, split: str) -> Path:
    """A local copy of a split's shards, downloaded from the Hub at the pinned revision where it is not there.

    Raises:
        ValueError: the Hub cannot be reached, or has no such revision.
    """
    from huggingface_hub import snapshot_download

    from tamzoo.hub import HUB_ERRORS, explain

    try:
        folder = snapshot_download(
            dataset.hub_id,
            repo_type="dataset",
            revision=dataset.hub_revision,
            allow_patterns=f"{dataset.hub_folder}/{split}-*.parquet",
        )
    except HUB_ERRORS as error:
        reason = explain(error, dataset.hub_id, dataset.hub_revision)
        raise ValueError(f"{dataset.title}: {reason}; or pass --data DIR") from error
    # without a connection it answers with whatever is cached
    if not any(Path(folder, dataset.hub_folder).glob(f"{split}-*.parquet")):
        raise ValueError(
            f"{dataset.title}: the Hub cannot be reached, and its {split} split is not in the cache; "
            "check the connection, or pass --data DIR"
        )
    return Path(folder)


def find_source(directory: Path, dataset: Dataset, split: str) -> Source:
    """Looks for a split in any layout: parquet shards, CIFAR's binary or Python version, SVHN's .mat files.

    Args:
        directory: The files' folder, or one that holds it under the data set's tag or its usual name.
    Raises:
        ValueError: nothing there, or only an archive.
    """
    if not dataset.counts:
        raise ValueError(
            f"{dataset.title}: tamzoo reads no such data; leave out --data and unset TAMZOO_DATA"
        )
    homes = (directory / dataset.tag, directory)
    for home in homes:
        for folder in (home, home / dataset.hub_folder):
            if shards := sorted(folder.glob(f"{split}-*.parquet")):
                return Source(files=tuple(shards), read=_read_parquet)
        for versions, read in ((_BINARY, _read_binary), (_PYTHON, _read_python)):
            if dataset.tag not in versions:
                continue
            name, names, _ = versions[dataset.tag]
            for folder in (home / name, home):
                files = tuple(folder / file for file in names[split])
                if all(file.is_file() for file in files):
                    return Source(files=files, read=read)
        if dataset.tag == "svhn" and (file := home / f"{split}_32x32.mat").is_file():
            return Source(files=(file,), read=_read_mat)
    for archive in _ARCHIVES.get(dataset.tag, ()):
        for home in homes:
            if (home / archive).exists():
                raise ValueError(
                    f"{home / archive}: found an archive, expected what is in it; unpack it there"
                )
    also = (
        f"{split}_32x32.mat"
        if dataset.tag == "svhn"
        else f"{_PYTHON[dataset.tag][0]}/ or {_BINARY[dataset.tag][0]}/"
    )
    raise ValueError(
        f"{directory}: expected {split}-*.parquet or {also} there or in {dataset.tag}/, found none; "
        "to download them pass --data hub"
    )


def _read_parquet(path: Path, dataset: Dataset, progress: Progress) -> np.ndarray:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise ValueError("reading parquet needs pyarrow; pip install 'tamzoo[train]'") from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}); fetch it again") from error
    missing = {dataset.image_column, dataset.label_column} - set(table.column_names)
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(sorted(missing))}, found {', '.join(table.column_names)}; "
            f"expected {dataset.title}, in this folder or its folder {dataset.tag}/"
        )
    labels, images = table[dataset.label_column], table[dataset.image_column]
    fits = types.is_integer(labels.type) and types.is_struct(images.type) and holds_bytes(images.type)
    if not fits or labels.null_count:
        raise ValueError(
            f"{path}: expected integer labels without a null in {dataset.label_column} and images as structs "
            f"with bytes in {dataset.image_column}, found {labels.type} with {labels.null_count} nulls and "
            f"{images.type}"
        )
    rows = np.zeros((table.num_rows, ROW), dtype=np.uint8)
    rows[:, 0] = _labels(path, labels.to_numpy().astype(np.int64), dataset)
    if "source" in table.column_names and types.is_string(table["source"].type):
        rows[:, 1] = [source == "jpeg" for source in table["source"].to_pylist()]
    pictures = table.select([dataset.image_column]).flatten()[f"{dataset.image_column}.bytes"].to_pylist()
    for index, data in enumerate(progress(pictures, f"Decoding {path.name}")):
        rows[index, 2:] = _decode(data, f"{path}, image {index}").reshape(-1)
    return rows


def _decode(data: bytes | None, place: str) -> np.ndarray:
    if data is None:
        raise ValueError(f"{place}: expected an image, found null; fetch the file again")
    try:
        with Image.open(io.BytesIO(data), formats=COMMON) as image:
            if image.size != (SIDE, SIDE):
                raise ValueError(f"{image.width}x{image.height} pixels")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's are of many kinds
        raise ValueError(f"{place}: expected a PNG, JPEG or WebP of 32x32 pixels, got {error}") from error


def _read_binary(path: Path, dataset: Dataset, progress: Progress) -> np.ndarray:
    label_bytes = _BINARY[dataset.tag][2]
    found = np.fromfile(path, dtype=np.uint8)
    if not len(found) or len(found) % (label_bytes + PIXELS):
        raise ValueError(
            f"{path}: expected records of {label_bytes + PIXELS} bytes, got {len(found)} bytes; "
            "fetch it again"
        )
    found = found.reshape(-1, label_bytes + PIXELS)
    return _from_planes(path, dataset, found[:, label_bytes - 1], found[:, label_bytes:])


def _read_python(path: Path, dataset: Dataset, progress: Progress) -> np.ndarray:
    """Reads a pickle as the list of opcodes that it is: nothing in it is looked up, built or called."""
    wanted, key, labels, longest = _PYTHON[dataset.tag][2], "", [], ""
    try:
        for opcode, value, _ in pickletools.genops(path.read_bytes()):
            if isinstance(value, str | bytes):
                key = value if isinstance(value, str) else value.decode("latin-1")
                longest = max(longest, key, key=len)
            elif key == wanted and opcode.name in _INTEGERS:
                labels.append(value)
        pixels = np.frombuffer(longest.encode("latin-1"), dtype=np.uint8)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole file of CIFAR's Python version ({error}); fetch it again"
        ) from error
    if not labels or len(pixels) != len(labels) * PIXELS:
        raise ValueError(
            f"{path}: expected {wanted} and {PIXELS} bytes an image, found {len(labels)} labels and "
            f"{len(pixels)} bytes; fetch it again"
        )
    return _from_planes(path, dataset, np.asarray(labels), pixels.reshape(-1, PIXELS))


def _from_planes(path: Path, dataset: Dataset, labels: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Rows of images that come as a red, a green and a blue plane."""
    rows = np.zeros((len(labels), ROW), dtype=np.uint8)
    rows[:, 0] = _labels(path, labels, dataset)
    # (n, c, h, w) -> (n, h, w, c)
    rows[:, 2:] = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1).reshape(-1, PIXELS)
    return rows


def _read_mat(path: Path, dataset: Dataset, progress: Progress) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError("reading .mat needs scipy; pip install 'tamzoo[train]'") from error
    try:
        found = loadmat(path, variable_names=("X", "y"))
        images, labels = found["X"], found["y"].reshape(-1).astype(np.int64)
    except Exception as error:  # scipy has no one error for a damaged file
        raise ValueError(f"{path}: not a whole .mat file with X and y ({error}); fetch it again") from error
    if images.dtype != np.uint8 or images.shape != (SIDE, SIDE, 3, len(labels)):
        raise ValueError(
            f"{path}: expected uint8 X of (32, 32, 3, {len(labels)}), got {images.dtype} {images.shape}"
        )
    rows = np.zeros((len(labels), ROW), dtype=np.uint8)
    rows[:, 0] = _labels(path, labels % 10, dataset)  # the digit 0 has label 10
    rows[:, 2:] = images.transpose(3, 0, 1, 2).reshape(-1, PIXELS)  # (h, w, c, n) -> (n, h, w, c)
    return rows


def _labels(path: Path, labels: np.ndarray, dataset: Dataset) -> np.ndarray:
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= dataset.num_classes:
        raise ValueError(
            f"{path}: expected labels 0 to {dataset.num_classes - 1}, found {labels.min()} to {labels.max()}"
        )
    return labels
