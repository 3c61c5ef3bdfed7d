"""How good the zoo's models are: can the reader read what they make?"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DiTPipeline
from tqdm import tqdm

from .data import CHARACTERS, IMAGE_SIZE, batches
from .reader import GlyphReader

HELD_OUT_SEED = 2
"""The stream that no model was trained on."""


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
    images = []
    for start in tqdm(range(0, len(classes), batch_size), desc="sampling", leave=False):
        chosen = classes[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(chosen))]
        arrays = pipe(
            class_labels=chosen,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        ).images
        images.append(torch.from_numpy(arrays).movedim(-1, 1) * 2 - 1)
    return torch.cat(images) if images else torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE)


def class_sequence(per_class: int) -> list[int]:
    """Every class in turn, ``per_class`` times over."""
    return list(range(len(CHARACTERS))) * per_class


def share_read(reader: GlyphReader, images: torch.Tensor, classes: list[int]) -> float:
    """The share of images that the reader takes for the character they were asked to show."""
    return (reader.read(images) == torch.tensor(classes)).float().mean().item()


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
