"""Tiny UNets with random uncertainty modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastdiff.uem import UncertaintyModules, make_modules
from tiny.stops import BATCH
from tiny.unets import TINY_UNETS

MODELS = (
    "UNet2DConditionModel (SD)",
    "UNet2DConditionModel (SDXL)",
    "UNet2DModel (DDPM)",
    "UNet2DModel (resnet sampling)",
)
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
PIPELINES = pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DDPMPipeline"])


def batch_of(model: str, batch: int = BATCH) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a tiny UNet and arguments of one call."""
    tiny = TINY_UNETS[model]
    return tiny.build(), {**tiny.inputs(batch, 0), "timestep": torch.full((batch,), 500)}


def random_modules(denoiser: nn.Module, arguments: dict[str, Any], **settings: Any) -> UncertaintyModules:
    """Returns modules that find samples to be of different certainty, and heads that correct."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = make_modules(denoiser, arguments, **settings)
        for module in modules.uncertainty:
            nn.init.normal_(module.probe.weight, std=3.0)  # type: ignore[union-attr, arg-type]
        for head in modules.exit_heads:
            nn.init.normal_(head.up.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    return modules.eval()


def ending_at(denoiser: Any, stage: int, head: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """Returns what a UNet predicts when its output layers are given what a head makes of what a stage would read."""
    seen: dict[str, torch.Tensor] = {}
    stages = denoiser.up_blocks

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen["state"] = args[0] if args else kwargs["hidden_states"]

    def replace(_: nn.Module, args: Any, kwargs: Any, __: Any) -> torch.Tensor:
        skips = kwargs.get("res_hidden_states_tuple") or args[1]
        made: torch.Tensor = head(seen["state"], skips[0])
        return made

    handles = [
        stages[stage].register_forward_pre_hook(note, with_kwargs=True),
        stages[-1].register_forward_hook(replace, with_kwargs=True),
    ]
    with torch.no_grad():
        predicted: torch.Tensor = denoiser(**arguments, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return predicted
