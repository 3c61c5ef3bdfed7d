"""Weights with which `lincomb` makes a scheduler's step from the sample and what the denoiser predicted.

Each function gives the weights of one step, in float64. A sampling call puts those of all its steps into one float32
tensor on the device and passes `lincomb` a row of it. A denoiser predicts the noise (``"epsilon"``), the velocity
(``"v_prediction"``) or the clean sample (``"sample"``).
"""

from __future__ import annotations

import math

from fastdiff.errors import ConfigError


def ddim(alpha_cumprod: float, alpha_cumprod_next: float, prediction: str = "epsilon") -> tuple[float, float]:
    """Weights of sample and prediction in a deterministic DDIM step.

    Args:
        alpha_cumprod: share of the clean sample's variance at this timestep.
        alpha_cumprod_next: the same at the next, less noisy one.
        prediction: what the denoiser predicts.
    """
    alpha, sigma = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    clean = _clean(alpha, sigma, prediction)
    return _towards(clean, alpha, sigma, math.sqrt(alpha_cumprod_next), math.sqrt(1 - alpha_cumprod_next))


def euler(sigma: float, sigma_next: float, prediction: str = "epsilon") -> tuple[float, float]:
    """Weights of sample and prediction in an Euler step, where the sample is the clean one plus ``sigma`` times noise.

    With ``"v_prediction"`` the denoiser has seen the sample divided by ``sqrt(sigma**2 + 1)``, as diffusers' does.
    """
    scale = math.sqrt(sigma**2 + 1)
    clean = (1 / scale**2, -sigma / scale) if prediction == "v_prediction" else _clean(1.0, sigma, prediction)
    return _towards(clean, 1.0, sigma, 1.0, sigma_next)


def flow_euler(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Weights of sample and velocity in an Euler step of flow matching."""
    return 1.0, sigma_next - sigma


def dpm_solver_2m(sigmas: tuple[float, float, float], prediction: str = "epsilon") -> tuple[float, float, float]:
    """Weights of sample, prediction and previous clean sample in a DPM-Solver++ 2M step (midpoint).

    The clean sample to keep for the next step is itself a sum, with the weights of `clean_sample`.

    Args:
        sigmas: ratio of noise to signal at the previous, this and the next timestep; the next must not be 0, which is
            the last step and of first order: `ddim`.
        prediction: what the denoiser predicts.
    """
    (_, _), (alpha, sigma), (alpha_next, sigma_next) = map(_variance_preserving, sigmas)
    logs = [-math.log(ratio) for ratio in sigmas]
    step, last_step = logs[2] - logs[1], logs[1] - logs[0]
    towards_clean = -alpha_next * math.expm1(-step)
    slope = step / (2 * last_step)
    of_sample, of_prediction = _clean(alpha, sigma, prediction)
    weight = towards_clean * (1 + slope)
    return sigma_next / sigma + weight * of_sample, weight * of_prediction, -towards_clean * slope


def clean_sample(sigma: float, prediction: str = "epsilon") -> tuple[float, float]:
    """Weights of sample and prediction in the clean sample, at a ratio of noise to signal."""
    return _clean(*_variance_preserving(sigma), prediction)


def guided(weights: tuple[float, ...], scale: float, position: int = 1) -> tuple[float, ...]:
    """Weights of an unconditional and a conditional prediction in place of one.

    Args:
        weights: what one of the functions above gave.
        scale: guidance scale; 1 takes the conditional prediction alone.
        position: where the prediction's weight stands.
    """
    weight = weights[position]
    return *weights[:position], (1 - scale) * weight, scale * weight, *weights[position + 1 :]


def _variance_preserving(ratio: float) -> tuple[float, float]:
    alpha = 1 / math.sqrt(1 + ratio**2)
    return alpha, ratio * alpha


def _clean(alpha: float, sigma: float, prediction: str) -> tuple[float, float]:
    """Weights of sample and prediction in the clean sample."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha, -sigma
    if prediction == "sample":
        return 0.0, 1.0
    raise ConfigError(f"prediction is {prediction!r}; it must be 'epsilon', 'v_prediction' or 'sample'.")


def _towards(
    clean: tuple[float, float], alpha: float, sigma: float, alpha_next: float, sigma_next: float
) -> tuple[float, float]:
    """Weights of sample and prediction in the sample at the next noise level, where clean sample and noise stay."""
    noise_kept = sigma_next / sigma
    clean_added = alpha_next - alpha * noise_kept
    return noise_kept + clean_added * clean[0], clean_added * clean[1]
