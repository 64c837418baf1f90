"""Augmentation of a whole batch at once, on the device that trains.

What is random and what is done with it are apart, so that the ranks of a distributed run can draw
for the whole batch and augment their own share, and so that a test can do the same image by image.
"""

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate, pad

from tamzoo.data import normalise
from tamzoo.datasets import Dataset
from tamzoo.recipes import Recipe


def draw(n: int, recipe: Recipe, dataset: Dataset, generator: Generator) -> Tensor:
    """What happens to each of n images.

    Returns:
        (n, 5) int64 on the generator's device: row and column of the crop in the padded image, 1 to
        flip, row and column of the centre of the cut-out square in the crop.
    """
    _, h, w = dataset.input_size
    offsets = 2 * recipe.crop_padding + 1
    highs = (offsets, offsets, 2 if recipe.flip else 1, h, w)
    columns = [torch.randint(high, (n,), generator=generator, device=generator.device) for high in highs]
    return torch.stack(columns, dim=1)


def augment(pixels: Tensor, draws: Tensor, recipe: Recipe, dataset: Dataset) -> Tensor:
    """Crop from the zero-padded image, flip, normalise, and cut a square out.

    Args:
        pixels: uint8 (n, 3, h, w).
        draws: (n, 5), from `draw`.
    Returns:
        float32 (n, 3, h, w), channels last in memory. Cut-out pixels are 0, the mean colour.
    """
    n, _, h, w = pixels.shape
    device = pixels.device
    top, left, flip, hole_row, hole_column = draws.unsqueeze(2).unbind(dim=1)  # each (n, 1)
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    image = torch.arange(n, device=device).view(n, 1, 1)
    taken_columns = left + torch.where(flip == 1, w - 1 - columns, columns)  # (n, w) in the padded image
    padded = pad(pixels, (recipe.crop_padding,) * 4)
    taken = padded[image, :, (top + rows).unsqueeze(2), taken_columns.unsqueeze(1)]  # (n, h, w, c)
    # indexing leaves any order in memory: settled while a pixel is one byte
    x = normalise(taken.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), dataset)
    if recipe.cutout:
        row, column = rows - hole_row + recipe.cutout // 2, columns - hole_column + recipe.cutout // 2
        hole = ((row >= 0) & (row < recipe.cutout)).unsqueeze(2) & (
            (column >= 0) & (column < recipe.cutout)
        ).unsqueeze(1)  # (n, h, w)
        x.masked_fill_(hole.unsqueeze(1), 0.0)  # in place, since the copying one forgets the memory format
    return x


def shrink(x: Tensor, recipe: Recipe, fraction: float) -> Tensor:
    """Progressive resizing: what `augment` gave, smaller in the recipe's first part of the training.

    Args:
        x: float32 (n, 3, h, w).
        fraction: Of the training that is done.
    Returns:
        float32 (n, 3, small_side, small_side), by antialiased bilinear interpolation, or x itself.
    """
    if fraction >= recipe.small_until:
        return x
    return interpolate(x, size=(recipe.small_side,) * 2, mode="bilinear", antialias=True)
