"""Images as what a pipeline's denoiser denoises: latents of its autoencoder, or pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fastdiff.errors import UnsupportedPipelineError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def encoded(pipe: DiffusionPipeline, images: Sequence[Image.Image], like: torch.Tensor) -> torch.Tensor:
    """Encode images, cut and scaled to the size that the denoiser takes.

    Args:
        pipe: the pipeline.
        images: RGB.
        like: samples that its denoiser was given, shape ``(rows, ...)``.

    Returns:
        Shape ``(len(images), *like.shape[1:])``.

    Raises:
        UnsupportedPipelineError: if images do not become samples of that shape.
    """
    vae = getattr(pipe, "vae", None)
    is_packed = like.ndim == 3 and hasattr(pipe, "_pack_latents")
    height, width = (2 * math.isqrt(like.shape[1]),) * 2 if is_packed else like.shape[-2:]
    factor = _downsampling(pipe, vae)
    size = (width * factor, height * factor)
    fitted = [ImageOps.fit(image, size, Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted])).movedim(-1, 1).float() / 127.5 - 1
    latents = pixels if vae is None else _latents(vae, pixels)
    if is_packed:
        latents = pipe._pack_latents(latents, len(latents), latents.shape[1], height, width)
    if latents.shape[1:] != like.shape[1:]:
        raise UnsupportedPipelineError(
            f"Images become {tuple(latents.shape[1:])} where {type(pipe).__name__} denoises {tuple(like.shape[1:])}. "
            "Train on the pipeline's own samples instead: data='self'."
        )
    return latents.to(like.dtype)


def _downsampling(pipe: DiffusionPipeline, vae: Any) -> int:
    """Pixels for each number of a latent, along one side."""
    if vae is None:
        return 1
    own = getattr(pipe, "vae_scale_factor", None)
    return int(own) if own else int(2 ** (len(vae.config.block_out_channels) - 1))


def _latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents, on the scale that is denoised; the middle of those that it finds likely."""
    config = vae.config
    with torch.no_grad():
        found = vae.encode(pixels.to(vae.device, vae.dtype))
    latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = (
            latents.new_tensor(config[name]).view(1, -1, *[1] * (latents.ndim - 2))
            for name in ("latents_mean", "latents_std")
        )
        return (latents - mean) / std
    shift = config.get("shift_factor") or 0.0
    result: torch.Tensor = (latents - shift) * config.get("scaling_factor", 1.0)
    return result
