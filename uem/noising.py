"""Noise for clean samples, and what a denoiser should make of it, by the scheduler's own rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from fastdiff.engine.batching import timestep_name
from fastdiff.errors import ConfigError
from fastdiff.uem.recording import Call

USE_SELF = "Train on the pipeline's own samples instead: data='self'."


@dataclass(frozen=True)
class Noised:
    """Noisy samples.

    Args:
        sample: shape ``(batch, ...)``.
        truth: what should be predicted, same shape.
        timesteps: in training units, float32 of shape ``(batch,)``.
        given: the timesteps as the denoiser takes them, same shape.
        argument: its name for them.
        weights: how much each sample's error counts, float32 of shape ``(batch,)``; None for all alike.
    """

    sample: torch.Tensor
    truth: torch.Tensor
    timesteps: torch.Tensor
    given: torch.Tensor
    argument: str
    weights: torch.Tensor | None = None


class Noising:
    """Adds noise as a pipeline's denoiser was trained with.

    Args:
        scheduler: the pipeline's.
        call: one of its denoiser's calls, which shows how the timestep is given.
        snr_gamma: largest signal-to-noise ratio that errors of the clean sample count by (min-SNR weights, arXiv
            2303.09556, section 3.4); None for errors of the prediction that count alike.

    Raises:
        ConfigError: if it cannot be told what should be predicted.
    """

    def __init__(self, scheduler: Any, call: Call, snr_gamma: float | None = None) -> None:
        config: Mapping[str, Any] = scheduler.config
        steps = int(config.get("num_train_timesteps", 1000))
        self._is_flow = bool(config.get("use_flow_sigmas")) or (
            "shift" in config and not hasattr(scheduler, "alphas_cumprod")
        )
        self._scheduler: Any
        if self._is_flow:
            shift = config.get("shift") or config.get("flow_shift") or 1.0
            self._scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)
        elif hasattr(scheduler, "alphas_cumprod"):
            self._scheduler = DDPMScheduler.from_config(config)
        else:
            raise ConfigError(f"How {type(scheduler).__name__} adds noise in training is not known. {USE_SELF}")
        self._snr_gamma = snr_gamma
        self.timesteps = self._scheduler.timesteps.float()
        self.argument = timestep_name(call.arguments) or ""
        self._divisor = _divisor(call, self.argument, steps)
        self._prediction = "flow" if self._is_flow else str(config.get("prediction_type", "epsilon"))
        if self._prediction not in ("flow", "epsilon", "v_prediction", "sample"):
            raise ConfigError(f"What prediction_type={self._prediction!r} predicts is not known. {USE_SELF}")

    @property
    def levels(self) -> int:
        """Number of noise levels."""
        return len(self.timesteps)

    def __call__(self, clean: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> Noised:
        """Noise samples.

        Args:
            clean: shape ``(batch, ...)``.
            noise: standard normal, same shape.
            levels: of each sample the number of its noise level, int64 of shape ``(batch,)``.
        """
        noise = noise.to(clean.dtype)
        timesteps = self._scheduler.timesteps[levels]
        if self._is_flow:
            sample = self._scheduler.scale_noise(clean, timesteps, noise)
            truth = noise - clean
        else:
            sample = self._scheduler.add_noise(clean, noise, timesteps)
            if self._prediction == "v_prediction":
                truth = self._scheduler.get_velocity(clean, noise, timesteps)
            else:
                truth = noise if self._prediction == "epsilon" else clean
        given = timesteps / self._divisor
        return Noised(sample, truth, timesteps.float(), given, self.argument, self._weights(levels))

    def _weights(self, levels: torch.Tensor) -> torch.Tensor | None:
        if self._snr_gamma is None:
            return None
        if self._is_flow:
            noise = self._scheduler.sigmas[levels] ** 2
            signal = (1 - self._scheduler.sigmas[levels]) ** 2
        else:
            signal = self._scheduler.alphas_cumprod[self._scheduler.timesteps[levels]]
            noise = 1 - signal
        capped = (signal / noise).clamp(max=self._snr_gamma)
        # How the clean sample's squared error follows from the prediction's.
        if self._prediction == "epsilon":
            return (self._snr_gamma * noise / signal).clamp(max=1)
        return (capped if self._prediction == "sample" else capped * noise).float()


def _divisor(call: Call, argument: str, steps: int) -> float:
    """What the scheduler's timesteps are divided by before a denoiser gets them."""
    if argument:
        given = float(torch.as_tensor(call.arguments[argument]).reshape(-1)[0])
        for divisor in (1.0, float(steps)):
            if abs(given - call.timestep / divisor) <= 1e-3 * max(given, 1e-6):
                return divisor
    raise ConfigError(f"How the denoiser takes the scheduler's timestep {call.timestep:g} is not known. {USE_SELF}")
