"""How far a kernel's result may be from the exact one. This is the only place that holds a tolerance of the kernels."""

from __future__ import annotations

import torch

from fastdiff.kernels import launch

EPS32 = torch.finfo(torch.float32).eps

# Units in the last place. Triton's interpreter cuts bfloat16 off where a GPU rounds it to the nearest.
ULPS = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 2 if launch.INTERPRETED else 1}

# A sum of float32 terms may lose this many roundings of its largest term.
ROUNDINGS = 16

# A fused kernel rounds less often than eager operations, so it must not be further from the truth than they are.
EAGER = 1.05

# Through a whole float32 model both are as far from the truth, but in other directions.
MODEL32 = 1.5


def ulp(reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of a dtype at each value, in float64."""
    info = torch.finfo(dtype)
    magnitude = reference.abs().clamp(min=info.tiny, max=info.max)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def assert_close(
    result: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | float, eager: torch.Tensor | None = None
) -> None:
    """Hold a result against the exact one.

    Args:
        result: what the kernel gave.
        exact: the same from the same rounded inputs in float64.
        terms: the largest magnitude among the terms that contribute to each element, broadcastable to the result.
        eager: what torch's own operations give in the result's dtype.
    """
    assert exact.dtype == torch.float64
    assert result.shape == exact.shape
    assert torch.equal(result.isnan(), exact.isnan())
    finite = exact.abs() <= torch.finfo(result.dtype).max
    error = (result.double() - exact)[finite].abs()
    terms = torch.as_tensor(terms, dtype=torch.float64, device=exact.device).expand_as(exact)
    bound = (ULPS[result.dtype] * ulp(exact, result.dtype) + ROUNDINGS * EPS32 * terms)[finite]
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{worst:.2f} times the bound for {result.dtype}"
    if eager is not None and result.dtype != torch.float32 and ULPS[result.dtype] == 1 and error.numel():
        off, eager_off = (difference[finite].square().mean().sqrt().item() for difference in (
            result.double() - exact, eager.double() - exact
        ))  # fmt: skip
        assert off <= EAGER * eager_off, f"error {off:.3g} beside eager's {eager_off:.3g}"


def assert_model_close(result: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor) -> None:
    """Hold a whole model's result against the exact one, where only comparing with eager makes sense.

    Args:
        result: what the model gives with kernels.
        exact: the same in float64.
        eager: what the model gives without.
    """
    off, eager_off = ((part.double() - exact).square().mean().sqrt().item() for part in (result, eager))
    bound = MODEL32 if result.dtype == torch.float32 else EAGER
    assert off <= bound * eager_off, f"error {off:.3g} beside eager's {eager_off:.3g}"
