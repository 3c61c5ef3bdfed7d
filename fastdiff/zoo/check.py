"""How good the zoo's models are: can the reader read what they make?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from tqdm import tqdm

from fastdiff.models import UViTPipeline

from .captions import caption_sequence
from .data import CHARACTERS, IMAGE_SIZE, batches, color_pairs, render_many
from .reader import GlyphReader

HELD_OUT_SEED = 2
"""The stream that no model was trained on."""

Asked = torch.Tensor | np.ndarray | list[int] | None


def _sample(
    pipe: DiffusionPipeline,
    count: int,
    inputs: Callable[[slice], dict[str, Any]],
    *,
    num_inference_steps: int,
    seed: int,
    batch_size: int,
) -> torch.Tensor:
    """Samples ``count`` images in batches, with ``inputs`` for each batch."""
    images = []
    for start in tqdm(range(0, count, batch_size), desc="sampling", leave=False):
        chosen = slice(start, min(start + batch_size, count))
        arrays = pipe(
            generator=[torch.Generator().manual_seed(seed + index) for index in range(chosen.start, chosen.stop)],
            num_inference_steps=num_inference_steps,
            output_type="np",
            **inputs(chosen),
        ).images
        images.append(torch.from_numpy(arrays).movedim(-1, 1) * 2 - 1)
    return torch.cat(images) if images else torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE)


def sample(
    pipe: DiTPipeline,
    classes: list[int],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 4.0,
    seed: int = 0,
    batch_size: int = 72,
) -> torch.Tensor:
    """Samples one image for each class, each from its own seed, so that the batch size does not matter.

    Args:
        pipe: any pipeline that is called as `DiTPipeline` is.
        classes: indices into ``CHARACTERS``.
        num_inference_steps: solver steps.
        guidance_scale: classifier-free guidance.
        seed: image i starts from the noise of ``seed + i``.
        batch_size: images at a time.

    Returns:
        float32 (len(classes), 3, 32, 32) in [-1, 1].
    """

    def inputs(chosen: slice) -> dict[str, Any]:
        return {"class_labels": classes[chosen], "guidance_scale": guidance_scale}

    return _sample(
        pipe, len(classes), inputs, num_inference_steps=num_inference_steps, seed=seed, batch_size=batch_size
    )


def sample_captions(
    pipe: StableDiffusionPipeline,
    captions: list[str],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 4.0,
    seed: int = 0,
    batch_size: int = 72,
) -> torch.Tensor:
    """Samples one image for each caption (`fastdiff.zoo.captions.caption_sequence`), each from its own seed.

    Args:
        pipe: any pipeline that is called as `StableDiffusionPipeline` is.
        captions: what to draw.
        num_inference_steps: solver steps.
        guidance_scale: classifier-free guidance.
        seed: image i starts from the noise of ``seed + i``.
        batch_size: images at a time.

    Returns:
        float32 (len(captions), 3, 32, 32) in [-1, 1].
    """

    def inputs(chosen: slice) -> dict[str, Any]:
        return {"prompt": captions[chosen], "guidance_scale": guidance_scale}

    return _sample(
        pipe, len(captions), inputs, num_inference_steps=num_inference_steps, seed=seed, batch_size=batch_size
    )


def sample_unconditional(
    pipe: DDPMPipeline, count: int, *, num_inference_steps: int = 50, seed: int = 0, batch_size: int = 72
) -> torch.Tensor:
    """Samples images of which nothing is asked, each from its own seed.

    Args:
        pipe: any pipeline that is called as `DDPMPipeline` is.
        count: number of images.
        num_inference_steps: solver steps.
        seed: image i starts from the noise of ``seed + i``.
        batch_size: images at a time.

    Returns:
        float32 (count, 3, 32, 32) in [-1, 1].
    """

    def inputs(chosen: slice) -> dict[str, Any]:
        return {"batch_size": chosen.stop - chosen.start}

    return _sample(pipe, count, inputs, num_inference_steps=num_inference_steps, seed=seed, batch_size=batch_size)


def sample_as_asked(
    pipe: DiffusionPipeline, count: int, *, num_inference_steps: int, guidance_scale: float, seed: int = 0
) -> tuple[torch.Tensor, Asked]:
    """Samples of any pipeline of the zoo, asked for every character in turn where it can be asked.

    Returns:
        float32 (count, 3, 32, 32) in [-1, 1], and what each image was to show.
    """
    if isinstance(pipe, (DiTPipeline, UViTPipeline)):
        classes = (class_sequence(1) * count)[:count]
        images = sample(
            pipe, classes, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed
        )
        return images, classes
    if isinstance(pipe, StableDiffusionPipeline):
        captions, asked = caption_sequence(count, seed)
        images = sample_captions(
            pipe, captions, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed
        )
        return images, asked
    return sample_unconditional(pipe, count, num_inference_steps=num_inference_steps, seed=seed), None


def class_sequence(per_class: int) -> list[int]:
    """Every class in turn, ``per_class`` times over."""
    return list(range(len(CHARACTERS))) * per_class


@torch.no_grad()
def share_read(reader: GlyphReader, images: torch.Tensor, asked: Asked) -> float:
    """The share of images that are read as they were asked for (`GlyphReaderOutput.as_asked`).

    Args:
        reader: the judge.
        images: float (count, 3, 32, 32) in [-1, 1].
        asked: one character for each image; or character, foreground and background; or None where nothing was asked.
    """
    return reader(images).as_asked(None if asked is None else torch.as_tensor(asked)).float().mean().item()


def chimeras(count: int, seed: int = HELD_OUT_SEED) -> np.ndarray:
    """Images that show no character, to hold `GlyphReaderOutput.legible` to account.

    Each is the upper half of one glyph over the lower half of another of the same colours.

    Args:
        count: number of images, at most a few thousand.
        seed: the stream that the halves come from.

    Returns:
        uint8 (count, 32, 32, 3).
    """
    images, labels = render_many(seed, 0, 2 * count + 2 * len(color_pairs()))
    character, _, fore, back = labels.T
    order = np.lexsort((fore, back))
    upper, lower = order[:-1], order[1:]
    fit = (fore[upper] == fore[lower]) & (back[upper] == back[lower]) & (character[upper] != character[lower])
    half = IMAGE_SIZE // 2
    return np.concatenate([images[upper[fit]][:, :half], images[lower[fit]][:, half:]], axis=1)[:count]


@torch.no_grad()
def reader_accuracy(reader: GlyphReader, count: int, seed: int = HELD_OUT_SEED) -> dict[str, float]:
    """The reader's accuracy on each question, over the first ``count`` images of a stream."""
    images, labels = next(batches(seed, count))
    answers = reader(images)
    return {name: (answers[name].argmax(1) == labels[:, i]).float().mean().item() for i, name in enumerate(answers)}


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, reader: GlyphReader, count: int, seed: int = HELD_OUT_SEED) -> dict[str, float]:
    """How well the autoencoder keeps held-out images: PSNR in dB and the share of characters still read."""
    images, labels = next(batches(seed, count))
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    mean_square = ((decoded - images) / 2).square().mean((1, 2, 3))
    return {
        "psnr": (-10 * mean_square.log10()).mean().item(),
        "share_read": (reader.read(decoded) == labels[:, 0]).float().mean().item(),
    }
