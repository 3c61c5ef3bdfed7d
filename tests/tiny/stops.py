"""Calls of a denoiser whose samples may stop early, and what they did."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fastdiff.backbones import view
from fastdiff.engine import sampling_run
from fastdiff.engine.record import Call
from fastdiff.methods import Method

BATCH = 6


def rows(arguments: dict[str, Any], chosen: list[int], batch: int = BATCH) -> dict[str, Any]:
    """Returns the arguments of some samples."""

    def take(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: take(item) for name, item in value.items()}
        return value[chosen] if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch else value

    return take(arguments)  # type: ignore[no-any-return]


@torch.no_grad()
def run(denoiser: nn.Module, method: Method, *calls: dict[str, Any]) -> tuple[list[torch.Tensor], list[Call]]:
    """Makes calls of one evaluation; returns what they predicted and did."""
    with sampling_run(denoiser, method, timesteps=torch.tensor([500.0])) as running:
        outputs = [denoiser(**call, return_dict=False)[0] for call in calls]
        running.tick()
    return outputs, running.record.denoisers["denoiser"].calls


def depths_of(calls: list[Call]) -> list[int]:
    """Returns how many units each sample ran in the first call."""
    depths = calls[0].depths
    assert depths is not None
    return depths.tolist()


def check_that_stopped_samples_see_no_further_unit(
    denoiser: nn.Module, method: Method, arguments: dict[str, Any]
) -> None:
    """Breaks the first unit that not all samples run, which must matter to those that run it and to no other."""
    (expected,), calls = run(denoiser, method, arguments)
    depths = np.array(depths_of(calls))
    column = int(np.unique(depths)[0])
    for parameter in view(denoiser).units[column].module.parameters():
        nn.init.constant_(parameter, float("nan"))
    (broken,), _ = run(denoiser, method, arguments)
    stopped = torch.from_numpy(depths <= column)
    assert torch.equal(broken[stopped], expected[stopped])
    assert broken[~stopped].isnan().flatten(1).any(1).all()
