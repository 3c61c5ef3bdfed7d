"""One weighted sum per step gives what diffusers' schedulers give."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastdiff.errors import ConfigError
from fastdiff.kernels import coefficients
from fastdiff.kernels.lincomb import lincomb

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SAMPLE, UNCOND, COND = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SCALE = 3.5
GUIDED = UNCOND + SCALE * (COND - UNCOND)


def step(weights: tuple[float, ...], *tensors: torch.Tensor) -> torch.Tensor:
    return lincomb(torch.tensor(weights, dtype=torch.float64), *tensors)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim(prediction: str) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    now, following = scheduler.timesteps[3:5]
    weights = coefficients.ddim(*(scheduler.alphas_cumprod[t].item() for t in (now, following)), prediction)
    expected = scheduler.step(GUIDED, now, SAMPLE).prev_sample
    result = step(coefficients.guided(weights, SCALE), SAMPLE, UNCOND, COND)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)  # the scheduler's tables are float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler(prediction: str) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction)
    scheduler.set_timesteps(10)
    now = scheduler.timesteps[3]
    scheduler.scale_model_input(SAMPLE, now)
    weights = coefficients.euler(*scheduler.sigmas[3:5].tolist(), prediction)
    expected = scheduler.step(GUIDED, now, SAMPLE).prev_sample
    result = step(coefficients.guided(weights, SCALE), SAMPLE, UNCOND, COND)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_flow_euler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    weights = coefficients.flow_euler(*scheduler.sigmas[3:5].tolist())
    expected = scheduler.step(GUIDED, scheduler.timesteps[3], SAMPLE).prev_sample
    result = step(coefficients.guided(weights, SCALE), SAMPLE, UNCOND, COND)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver(prediction: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=prediction)
    scheduler.set_timesteps(10)
    first, second = scheduler.timesteps[:2]
    after_first = scheduler.step(COND, first, SAMPLE).prev_sample
    expected = scheduler.step(GUIDED, second, after_first).prev_sample
    sigmas = tuple(scheduler.sigmas[:3].tolist())
    kept = step(coefficients.clean_sample(sigmas[0], prediction), SAMPLE, COND)
    weights = coefficients.guided(coefficients.dpm_solver_2m(sigmas, prediction), SCALE)
    result = step(weights, after_first, UNCOND, COND, kept)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(ConfigError, match="noise"):
        coefficients.ddim(0.5, 0.6, "noise")
