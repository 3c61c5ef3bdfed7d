"""The glyph images: the same for the same numbers, labelled rightly, shared out without overlap."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from fastdiff.zoo import data


def test_same_numbers_same_image_whatever_was_drawn_before() -> None:
    first = data.render(3, 11)
    data.render_many(9, 0, 5)
    again = data.render(3, 11)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.labels == again.labels


def test_images_of_a_subset_are_those_of_the_stream() -> None:
    images, labels = data.render_many(5, 0, 200)
    known = [labels[i, 0] in (1, 10, 20, 30) and labels[i, 1] in (0, 3, 9) for i in range(200)]
    chosen = np.flatnonzero(known)[2:4]
    subset = data.Subset("1AKU", tuple(data.FONTS[font] for font in (0, 3, 9)))
    only, only_labels = data.render_many(5, 2, 2, subset)
    assert np.array_equal(only, images[chosen])
    assert np.array_equal(only_labels, labels[chosen])


def test_another_process_draws_the_same_bytes() -> None:
    images, labels = data.render_many(5, 100, 12)
    code = (
        "import hashlib; from fastdiff.zoo import data; images, labels = data.render_many(5, 100, 12);"
        "print(hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


def test_seeds_and_indices_give_different_images() -> None:
    images = [data.render(seed, index).image.tobytes() for seed in range(4) for index in range(25)]
    assert len(set(images)) == len(images)


def test_shape_type_and_label_ranges() -> None:
    images, labels = data.render_many(0, 0, 400)
    assert images.shape == (400, 32, 32, 3)
    assert images.dtype == np.uint8
    sizes = (len(data.CHARACTERS), len(data.FONTS), len(data.COLORS), len(data.COLORS))
    for column, size in zip(labels.T, sizes, strict=True):
        assert column.min() >= 0
        assert column.max() < size
    assert set(labels[:, 0]) == set(range(36))
    assert set(labels[:, 1]) == set(range(len(data.FONTS)))


def test_border_shows_the_background_colour_and_some_pixel_the_foreground_colour() -> None:
    # Jitter and gradient move a channel by at most 12 + 18 * sqrt(2), which is 38 of 255.
    palette = np.array(list(data.PALETTE.values()))
    for index in range(60):
        glyph = data.render(1, index)
        pixels = glyph.image.astype(int)
        corner = np.abs(pixels[0, 0] - palette[glyph.background]).max()
        assert corner <= 40
        nearest = np.abs(pixels - palette[glyph.foreground]).max(-1).min()
        assert nearest <= 40


def test_foreground_and_background_contrast() -> None:
    luminance = np.array(list(data.PALETTE.values())) @ np.array([0.299, 0.587, 0.114])
    _, labels = data.render_many(2, 0, 300)
    assert np.abs(luminance[labels[:, 2]] - luminance[labels[:, 3]]).min() >= data.MIN_LUMINANCE_CONTRAST


def test_to_tensor_covers_minus_one_to_one_channels_first() -> None:
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[..., 1] = 255
    tensor = data.to_tensor(image)
    assert tensor.shape == (3, 32, 32)
    assert (tensor[0] == -1).all()
    assert (tensor[1] == 1).all()


def test_batches_are_endless_and_follow_the_stream() -> None:
    taken = list(itertools.islice(data.batches(7, 6), 3))
    images, labels = data.render_many(7, 0, 18)
    assert torch.equal(torch.cat([batch for batch, _ in taken]), data.to_tensor(images))
    assert torch.equal(torch.cat([label for _, label in taken]), torch.from_numpy(labels))
    resumed, _ = next(data.batches(7, 6, start=12))
    assert torch.equal(resumed, taken[2][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_loader_share_the_stream_without_overlap(workers: int) -> None:
    loader = DataLoader(data.GlyphDataset(4), batch_size=1, num_workers=workers)
    drawn = {image.numpy().tobytes() for image, _ in itertools.islice(loader, 12)}
    expected = {data.to_tensor(data.render(4, index).image).numpy().tobytes() for index in range(12)}
    assert drawn == expected


def test_pool_equals_the_stream_and_is_made_anew_for_other_numbers(tmp_path: Path) -> None:
    path = tmp_path / "pool.safetensors"
    images, labels = data.pool(path, seed=6, count=30, workers=1)
    expected_images, expected_labels = data.render_many(6, 0, 30)
    assert torch.equal(images, torch.from_numpy(expected_images))
    assert torch.equal(labels, torch.from_numpy(expected_labels))
    assert torch.equal(load_file(path)["images"], images)
    other, _ = data.pool(path, seed=7, count=30, workers=1)
    assert not torch.equal(other, images)
