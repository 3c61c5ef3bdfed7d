"""Sampling the same images in different ways: image i depends on its seed and its request, not on who makes it.

Batches have fixed bounds, because the last bits of a batched computation depend on what else is in the batch. Whole
batches are shared between processes, so that any number of processes makes the same images to the byte (on CPUs: with
the same number of threads in each).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastdiff.errors import ConfigError, FastDiffError, UnsupportedPipelineError
from fastdiff.eval.tasks import Task
from fastdiff.eval.ways import Way
from fastdiff.pipelines.calling import refusals_explained

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

AUTOENCODERS = ("vae", "movq", "vqvae")
"""Pipeline components that turn latents into images."""


class BadImageError(FastDiffError, ValueError):
    """An image that is none: not finite, out of range, or black throughout.

    Args:
        message: what was found, in which way of sampling, and from which seed.
        way: key of the way of sampling.
        seed: of the image.
    """

    def __init__(self, message: str, *, way: str, seed: int) -> None:
        super().__init__(message)
        self.way = way
        self.seed = seed


# -- sampling ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """Images, and what they were decoded from.

    Args:
        images: uint8 of shape ``(n, height, width, 3)``.
        latents: what the autoencoder decoded, float32 of shape ``(n, ...)``; None for a pipeline without one.
    """

    images: np.ndarray
    latents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def denoised(self) -> np.ndarray:
        """What was denoised, float32 of shape ``(n, ...)``: latents, or without an autoencoder pixels in [0, 1]."""
        return self.images.astype(np.float32) / 255 if self.latents is None else self.latents

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """One set of several."""
        latents = [part.latents for part in parts if part.latents is not None]
        return cls(np.concatenate([part.images for part in parts]), np.concatenate(latents) if latents else None)

    def first(self, count: int) -> Samples:
        """The first so many."""
        return Samples(self.images[:count], None if self.latents is None else self.latents[:count])


def batches(count: int, batch_size: int) -> list[range]:
    """Indices of whole batches that hold at least so many images.

    The last batch is as large as the others, so that a larger count later adds batches and changes none.
    """
    if count < 1 or batch_size < 1:
        raise ConfigError(f"At least one image in batches of at least one; got {count} in batches of {batch_size}.")
    return [range(start, start + batch_size) for start in range(0, count, batch_size)]


def sample(pipe: DiffusionPipeline, way: Way, task: Task, indices: Sequence[int]) -> Samples:
    """The images of these indices, made in one call.

    The way is applied for this call alone: what another package keeps from call to call must not reach the images.

    Args:
        pipe: the pipeline; after the call it is plain.
        way: how to sample.
        task: what to ask for.
        indices: of the images, a batch.

    Raises:
        BadImageError: for an image that is not finite, out of range, or black throughout.
        UnsupportedPipelineError: if the pipeline makes no images.
        FastDiffError: if it cannot sample this way.
    """
    with way.applied(pipe):
        return sample_applied(pipe, way, task, indices)


def sample_applied(pipe: DiffusionPipeline, way: Way, task: Task, indices: Sequence[int]) -> Samples:
    """As `sample`, where the way is applied already."""
    with _decoded(pipe) as decoded:
        pixels = call(pipe, way, task, indices)
    latents = np.concatenate(decoded) if decoded else None
    _check(pixels, way, task, indices)
    images = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    return Samples(images, latents if latents is not None and len(latents) == len(images) else None)


def call(pipe: DiffusionPipeline, way: Way, task: Task, indices: Sequence[int]) -> np.ndarray:
    """One call of a pipeline to which the way is applied; the images, float of shape ``(n, height, width, channels)``.

    Raises:
        ConfigError: if the pipeline refuses the arguments.
        UnsupportedPipelineError: if it makes no images.
    """
    device = getattr(pipe, "device", torch.device("cpu"))
    # Some pipelines do not hand their generators on to the scheduler, which then draws from the global one.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(task.seed + indices[0])
        with refusals_explained(f"{type(pipe).__name__} does not sample this way"):
            output = pipe(**task.arguments(indices), num_inference_steps=way.num_inference_steps, output_type="np")
    images = getattr(output, "images", None)
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[-1] not in (1, 3):
        found = f"an array of shape {images.shape}" if isinstance(images, np.ndarray) else type(output).__name__
        raise UnsupportedPipelineError(
            f"Images are compared, arrays of shape (n, height, width, 3); {type(pipe).__name__} returned {found}."
        )
    if len(images) != len(indices):
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} made {len(images)} images where it was asked for {len(indices)}, one for each seed."
        )
    return images


def _check(pixels: np.ndarray, way: Way, task: Task, indices: Sequence[int]) -> None:
    flat = pixels.reshape(len(pixels), -1)
    finite = np.isfinite(flat).all(axis=1)
    # Rounding of half-precision images may leave them a little outside.
    inside = finite & (np.nan_to_num(flat) >= -0.01).all(axis=1) & (np.nan_to_num(flat) <= 1.01).all(axis=1)
    for good, fault in (
        (finite, "has values that are not finite"),
        (inside, "has values outside [0, 1]"),
        ((flat != 0).any(axis=1), "is black throughout"),
    ):
        if not good.all():
            seed = task.seed + indices[int(np.argmin(good))]
            raise BadImageError(
                f"The image of seed {seed}, sampled by {way.key}, {fault}. "
                "Look at the model's dtype (half precision overflows in some autoencoders) and at its safety checker.",
                way=way.key,
                seed=seed,
            )


@contextmanager
def _decoded(pipe: DiffusionPipeline) -> Iterator[list[np.ndarray]]:
    """What the pipeline's autoencoder is given to decode within the block."""
    decoder = next((part for name in AUTOENCODERS if hasattr(part := getattr(pipe, name, None), "decode")), None)
    decoded: list[np.ndarray] = []
    if not isinstance(decoder, nn.Module):
        yield decoded
        return
    decode: Any = decoder.decode
    before = dict(vars(decoder))

    def recorded(*args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else next(iter(kwargs.values()))
        decoded.append(latents.detach().float().cpu().numpy())
        return decode(*args, **kwargs)

    decoder.decode = recorded  # type: ignore[assignment]
    try:
        yield decoded
    finally:
        del decoder.decode
        if "decode" in before:
            decoder.decode = before["decode"]
