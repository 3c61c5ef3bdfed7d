"""The loss that every denoiser of the zoo trains with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler

from .training_loop import StepLoss

Predictor = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
"""(noisy samples, timesteps, condition) to the predicted noise."""

Condition = Callable[[torch.Tensor, torch.Generator], Any]
"""(indices of training samples, generator) to what the denoiser is told about them."""

Samples = Callable[[torch.Tensor], torch.Tensor]
"""Indices of training samples to the samples, float32 (batch, channels, height, width)."""

MIN_SNR_GAMMA = 5.0
SHAPING_SPREAD = 150


def draw(
    count: int, shape: torch.Size, batch_size: int, shaping_timestep: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws what a denoising step needs.

    Half of the timesteps are uniform, half lie around the noise levels at which a glyph takes its shape.

    Args:
        count: number of training samples.
        shape: of one sample.
        batch_size: samples per step.
        shaping_timestep: the middle of those levels.
        generator: the step's randomness.

    Returns:
        int64 indices of samples (batch,), noise float32 (batch, *shape) and int64 timesteps (batch,).
    """
    chosen = torch.randint(count, (batch_size,), generator=generator)
    noise = torch.randn(batch_size, *shape, generator=generator)
    uniform = torch.randint(1000, (batch_size,), generator=generator)
    around = shaping_timestep + SHAPING_SPREAD * torch.randn(batch_size, generator=generator)
    shaping = around.long().clamp(0, 999)
    timesteps = torch.where(torch.rand(batch_size, generator=generator) < 0.5, uniform, shaping)
    return chosen, noise, timesteps


def denoising_loss(
    predict: Predictor,
    clean: Samples,
    condition: Condition,
    *,
    count: int,
    batch_size: int,
    scheduler: DDIMScheduler,
    shaping_timestep: int,
) -> StepLoss:
    """Mean squared error of the prediction, weighted down where there is hardly any noise (min-SNR).

    Noise is compared as it is, clean samples as the velocity that they imply: the squared error of the noise is the
    signal-to-noise ratio times that of the clean sample, and that of the velocity is one more than the ratio times it.

    Args:
        predict: the denoiser.
        clean: the training samples.
        condition: what the denoiser is told about them.
        count: number of training samples.
        batch_size: samples per step.
        scheduler: gives the noise levels, and what is predicted.
        shaping_timestep: timestep around which glyphs take their shape.
    """
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    of_noise = scheduler.config.prediction_type == "epsilon"
    weights = snr.clamp(max=MIN_SNR_GAMMA) / snr if of_noise else (snr + 1).clamp(max=MIN_SNR_GAMMA)
    shape = clean(torch.tensor([0])).shape[1:]

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen, noise, timesteps = draw(count, shape, batch_size, shaping_timestep, generator)
        told = condition(chosen, generator)
        samples = clean(chosen)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = predict(scheduler.add_noise(samples, noise, timesteps), timesteps, told)
        error = (predicted.float() - (noise if of_noise else samples)).square().mean((1, 2, 3))
        return (weights[timesteps] * error).mean()

    return loss
