"""CIFAR and SVHN as tensors: checked, decoded once, cached."""

import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tamzoo.cache import cache_folder
from tamzoo.checkpoint import whole_file
from tamzoo.datasets import Dataset
from tamzoo.progress import Progress, silent
from tamzoo.sources import ROW, SIDE, Source, fetch_from_hub, find_source

HUB = Path("hub")  # in place of a directory: the data set's own repository on the Hub
TOLERANCE = 1e-3  # of mean and standard deviation, pixels in [0, 1]; the known ones have four digits


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split in memory.

    Attributes:
        pixels: (n, 3, 32, 32), uint8.
        labels: (n,), int64.
        note: What is special about this copy of the data; empty where nothing is.
    """

    pixels: Tensor
    labels: Tensor
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int | None) -> "Split":
        """Its first n images; all where None."""
        return replace(self, pixels=self.pixels[:n], labels=self.labels[:n])

    def checksum(self) -> int:
        """CRC-32 of the labels and of each image's sum of pixels: another for another copy or order."""
        rows = torch.stack([self.labels, self.pixels.sum((1, 2, 3))])
        return zlib.crc32(rows.cpu().numpy().tobytes())

    def to(self, device: torch.device) -> "Split":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))


def data_directory(given: Path | None) -> Path:
    """Where the data sets are: the directory given, else the environment's TAMZOO_DATA; `hub` for the Hub.

    Raises:
        ValueError: neither is there, or it is no directory.
    """
    if given is None and not os.environ.get("TAMZOO_DATA"):
        raise ValueError(
            "no data directory: pass --data DIR or set TAMZOO_DATA to one that holds CIFAR or SVHN, "
            "or pass --data hub to download them"
        )
    found = given or Path(os.environ["TAMZOO_DATA"])
    if found != HUB and not found.is_dir():
        raise ValueError(f"{found}: expected a directory with CIFAR or SVHN, found no such directory")
    return found


def load_split(directory: Path, dataset: Dataset, split: str, progress: Progress = silent) -> Split:
    """A split from any of the files it comes in, checked against what is published of it.

    The first load decodes it into the cache, from where later ones map it into memory.

    Args:
        directory: As in `find_source`; `hub` downloads it.
        split: "train" or "test".
    Raises:
        ValueError: no such files, a damaged one, or other images than the published ones; names the file.
    """
    if directory == HUB and not directory.is_dir() and dataset.counts:
        directory = fetch_from_hub(dataset, split)
    source = find_source(directory, dataset, split)
    cached = cache_folder() / f"{dataset.tag}-{split}-{_key(source)}.npy"
    rows = _from_cache(cached, dataset, split)
    if rows is None:
        rows = np.concatenate([source.read(path, dataset, progress) for path in source.files])
        check_rows(
            rows, dataset, split, source.files[0] if len(source.files) == 1 else source.files[0].parent
        )
        with suppress(OSError):  # a cache that cannot be written costs time, nothing else
            cached.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(cached) as part, part.open("wb") as file:
                np.save(file, rows)
    jpeg = int(rows[:, 1].sum(dtype=np.int64))
    pixels = torch.from_numpy(rows[:, 2:].reshape(-1, SIDE, SIDE, 3))
    return Split(
        pixels=pixels.permute(0, 3, 1, 2),  # (n, h, w, c) -> (n, c, h, w)
        labels=torch.from_numpy(rows[:, 0].astype(np.int64)),
        note=f"{jpeg} of {len(rows)} {split} images from JPEG" if jpeg else "",
    )


def _key(source: Source) -> str:
    """Changes with the files' names, sizes and times, and with the layout of a row."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    return hashlib.sha256(repr((ROW, files)).encode()).hexdigest()[:16]


def _from_cache(path: Path, dataset: Dataset, split: str) -> np.ndarray | None:
    """The rows of an earlier load, mapped copy-on-write; None where there are none or they are damaged."""
    try:
        rows = np.load(path, mmap_mode="c", allow_pickle=False)
        check_rows(rows, dataset, split, path)
    except (OSError, ValueError, EOFError):
        return None
    return rows


def check_rows(rows: np.ndarray, dataset: Dataset, split: str, place: Path) -> None:
    """Sees that rows are the published split.

    Args:
        place: What a message names.
    Raises:
        ValueError: other counts per class than published, or, of a training split, another mean or
            standard deviation by more than 0.001.
    """
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != ROW:
        raise ValueError(f"{place}: expected uint8 rows of {ROW}, got {rows.dtype} {rows.shape}")
    found, expected = np.bincount(rows[:, 0], minlength=dataset.num_classes), dataset.counts[split]
    if len(rows) != sum(expected):
        raise ValueError(f"{place}: {dataset.title} has {sum(expected)} {split} images, found {len(rows)}")
    for label, (count, published) in enumerate(zip(found, expected, strict=True)):
        if count != published:
            raise ValueError(
                f"{place}: {dataset.title} has {published} {split} images of class {label}, found {count}"
            )
    if split != "train":
        return
    known = (dataset.pixel_mean or dataset.mean, dataset.pixel_std or dataset.std)
    for name, values, published in zip(("mean", "std"), _mean_and_std(rows), known, strict=True):
        if np.abs(values - np.asarray(published)).max() > TOLERANCE:
            told = " ".join(f"{value:.4f}" for value in values)
            raise ValueError(f"{place}: expected {dataset.title} of {name} {published}, found {told}")


def _mean_and_std(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each channel, pixels in [0, 1]; from histograms, so exact and without a float copy."""
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(rows[:, 2 + c :: 3].reshape(-1), minlength=256) for c in range(3)])
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    return mean, np.sqrt(share @ levels**2 - mean**2)


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: making it anew for each batch would wait for the device."""
    with torch.inference_mode(False):  # whoever asks first, training uses it too
        return torch.tensor(values, device=device).view(-1, 1, 1)


def normalise(pixels: Tensor, dataset: Dataset) -> Tensor:
    """uint8 (n, 3, h, w) -> float32 (n, 3, h, w), with the data set's mean and standard deviation."""
    mean, std = _constant(dataset.mean, pixels.device), _constant(dataset.std, pixels.device)
    return (pixels.float() / 255 - mean) / std


def darkest_and_brightest(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The black and the white picture, normalised, (1, 3, h, w) each: every picture lies between them."""
    black = torch.zeros(1, *dataset.input_size, dtype=torch.uint8)
    return normalise(black, dataset), normalise(~black, dataset)


def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A split in order, in (n, 3, h, w) uint8 and (n,) int64; the last batch may be smaller."""
    return zip(split.pixels.split(size), split.labels.split(size), strict=True)
