"""Augmentation of a batch equals a plain loop over its images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tamzoo.augment import augment, draw, shrink
from tamzoo.datasets import DATASETS
from tamzoo.recipes import PAPER, PAPER_SVHN, PROGRESSIVE_CPU, SHORT

CIFAR = DATASETS["cifar10"]


def one_image(pixels, draws, recipe, dataset):
    """(3, 32, 32) uint8 by the book: pad, crop, mirror, normalise, cut out."""
    top, left, flip, hole_row, hole_column = draws
    margin = recipe.crop_padding
    padded = np.zeros((3, 32 + 2 * margin, 32 + 2 * margin), dtype=np.uint8)
    padded[:, margin : margin + 32, margin : margin + 32] = pixels
    crop = padded[:, top : top + 32, left : left + 32]
    if flip:
        crop = crop[:, :, ::-1]
    x = np.empty((3, 32, 32), dtype=np.float32)
    for c in range(3):
        x[c] = (crop[c] / 255 - dataset.mean[c]) / dataset.std[c]
    half = recipe.cutout // 2
    for row in range(hole_row - half, hole_row - half + recipe.cutout):
        for column in range(hole_column - half, hole_column - half + recipe.cutout):
            if 0 <= row < 32 and 0 <= column < 32:
                x[:, row, column] = 0
    return x


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [
        (PAPER, CIFAR),
        (SHORT, CIFAR),
        (replace(SHORT, cutout=5), DATASETS["cifar100"]),
        (PAPER_SVHN, DATASETS["svhn"]),
    ],
)
def test_a_batch_is_augmented_as_its_images_one_by_one(recipe, dataset):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)
    draws = draw(64, recipe, dataset, generator)
    x = augment(pixels, draws, recipe, dataset)
    assert x.dtype == torch.float32
    for index in range(64):
        expected = one_image(pixels[index].numpy(), draws[index].tolist(), recipe, dataset)
        # float32 of numbers up to about 3: two roundings
        np.testing.assert_allclose(x[index].numpy(), expected, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=generator, dtype=torch.uint8)
    draws = draw(16, SHORT, CIFAR, generator)
    whole = augment(pixels, draws, SHORT, CIFAR)
    part = augment(pixels[5:9], draws[5:9], SHORT, CIFAR)
    assert torch.equal(whole[5:9], part)


def test_images_are_small_until_the_recipe_says_whole():
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    small = shrink(x, PROGRESSIVE_CPU, 0.699)
    assert small.shape == (4, 3, 24, 24) and small.is_contiguous(memory_format=torch.channels_last)
    pillow = Image.fromarray(x[2, 1].numpy()).resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(small[2, 1].numpy(), np.asarray(pillow), atol=1e-6)
    assert shrink(x, PROGRESSIVE_CPU, 0.7) is x
    assert shrink(x, SHORT, 0.0) is x


def test_the_convolutions_get_their_memory_format():
    pixels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    draws = draw(4, SHORT, CIFAR, torch.Generator())
    assert augment(pixels, draws, SHORT, CIFAR).is_contiguous(memory_format=torch.channels_last)
