"""CIFAR and SVHN as tensors, and augmentation on the device that trains."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor
from torch.nn.functional import pad

from tamzoo.catalogue import Dataset
from tamzoo.progress import Progress, silent
from tamzoo.recipes import Recipe

SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "svhn": (73_257, 26_032)}  # train, test


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

    def to(self, device: torch.device) -> "Split":
        return Split(pixels=self.pixels.to(device), labels=self.labels.to(device), note=self.note)


def data_directory(given: Path | None) -> Path:
    """The directory that holds the data sets: the one given, else the environment's TAMZOO_DATA.

    Raises:
        ValueError: neither is there, or it is no directory.
    """
    if given is None and not os.environ.get("TAMZOO_DATA"):
        raise ValueError(
            "no data directory: pass --data DIR or set TAMZOO_DATA to one that holds parquet shards"
        )
    found = given or Path(os.environ["TAMZOO_DATA"])
    if not found.is_dir():
        raise ValueError(f"{found}: expected a directory with parquet shards, found no such directory")
    return found


def load_split(directory: Path, dataset: Dataset, split: str, progress: Progress = silent) -> Split:
    """Decodes a split from parquet shards in the Hub's layout (`train-*.parquet`, `test-*.parquet`).

    Args:
        directory: The shards' folder, or one that holds it under the data set's tag.
        split: "train" or "test".
    Raises:
        ValueError: no shards, a damaged shard, a missing column, or another number of images than published.
    """
    shards = sorted(
        path for folder in (directory / dataset.tag, directory) for path in folder.glob(f"{split}-*.parquet")
    )
    if not shards:
        raise ValueError(f"{directory}: expected {split}-*.parquet there or in {dataset.tag}/, found none")
    encoded, labels, jpeg = [], [], 0
    for shard in shards:
        table = _read_shard(shard, dataset)
        encoded += [(image["bytes"], shard) for image in table[dataset.image_column].to_pylist()]
        labels += table[dataset.label_column].to_pylist()
        if "source" in table.column_names:
            jpeg += table["source"].to_pylist().count("jpeg")
    expected = SIZES[dataset.tag][split == "test"]
    if len(labels) != expected:
        raise ValueError(
            f"{shards[0].parent}: {dataset.title} has {expected} {split} images, found {len(labels)}"
        )
    pixels = np.empty((expected, 32, 32, 3), dtype=np.uint8)
    for index, (data, shard) in enumerate(progress(encoded, f"Decoding {dataset.title} {split}")):
        pixels[index] = _decode(data, f"{shard}, image {index}")
    return Split(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),  # (n, h, w, c) -> (n, c, h, w)
        labels=torch.tensor(labels),
        note=f"{jpeg} of {expected} {split} images from JPEG" if jpeg else "",
    )


def _read_shard(shard: Path, dataset: Dataset):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError("reading parquet needs pyarrow; pip install 'tamzoo[train]'") from error
    try:
        table = parquet.read_table(shard)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{shard}: not a whole parquet file ({error}); fetch it again") from error
    missing = {dataset.image_column, dataset.label_column} - set(table.column_names)
    if missing:
        raise ValueError(
            f"{shard}: no column {', '.join(sorted(missing))}, found {', '.join(table.column_names)}"
        )
    return table


def _decode(data: bytes, place: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            array = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{place}: not an image ({error})") from error
    if array.shape != (32, 32, 3):
        raise ValueError(f"{place}: expected 32x32 RGB, got {array.shape[1]}x{array.shape[0]}")
    return array


def normalise(pixels: Tensor, dataset: Dataset) -> Tensor:
    """uint8 (n, 3, h, w) -> float32 (n, 3, h, w), with the data set's mean and standard deviation."""
    mean = torch.tensor(dataset.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(dataset.std, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A split in order, in (n, 3, h, w) uint8 and (n,) int64; the last batch may be smaller."""
    return zip(split.pixels.split(size), split.labels.split(size), strict=True)


def augment(pixels: Tensor, recipe: Recipe, dataset: Dataset, generator: Generator) -> Tensor:
    """Random crop, flip and cutout, each image on its own, then normalisation.

    Args:
        pixels: uint8 (n, 3, h, w).
        generator: On the device of `pixels`.
    Returns:
        float32 (n, 3, h, w), channels last in memory. Cut-out pixels are 0, the mean colour.
    """
    n, _, h, w = pixels.shape
    device, margin = pixels.device, recipe.crop_padding

    def draw(high: int) -> Tensor:  # (n, 1), one number an image
        return torch.randint(high, (n, 1), generator=generator, device=device)

    rows = torch.arange(h, device=device) + draw(2 * margin + 1)  # (n, h) in the padded image
    columns = torch.arange(w, device=device).expand(n, w)
    if recipe.flip:
        columns = torch.where(draw(2) == 1, w - 1 - columns, columns)
    columns = columns + draw(2 * margin + 1)
    padded = pad(pixels, (margin,) * 4)
    image = torch.arange(n, device=device).view(n, 1, 1)
    taken = padded[image, :, rows.unsqueeze(2), columns.unsqueeze(1)]  # (n, h, w, c)
    x = normalise(taken.permute(0, 3, 1, 2), dataset)
    if recipe.cutout:
        half = recipe.cutout // 2
        near_row = (torch.arange(h, device=device) - draw(h) + half).unsqueeze(2)  # (n, h, 1)
        near_column = (torch.arange(w, device=device) - draw(w) + half).unsqueeze(1)  # (n, 1, w)
        inside = [(near >= 0) & (near < recipe.cutout) for near in (near_row, near_column)]
        x = x.masked_fill((inside[0] & inside[1]).unsqueeze(1), 0.0)
    return x
