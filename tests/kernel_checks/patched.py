"""Tiny models in every dtype, to hold what `fastdiff.optimize` makes of them against what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DModel
from engine.loops import small_unet
from torch import nn

from tiny.base import TinyModel
from tiny.base import build as build_model
from tiny.joint import SD3
from tiny.models import TINY_MODELS
from tiny.unet_unconditional import DDPM
from tiny.unets import TINY_UNETS

_UNETS = {
    "SD UNet": (TINY_UNETS["UNet2DConditionModel (SD)"], small_unet),
    "DDPM UNet": (TINY_UNETS["UNet2DModel (DDPM)"], lambda: build_model(UNet2DModel, DDPM | {"layers_per_block": 1})),
    "UNet with scale and shift": (TINY_UNETS["UNet2DConditionModel (Kandinsky 2.2)"], None),
}
MODELS: dict[str, tuple[TinyModel, Callable[[], nn.Module] | None]] = {
    "DiT": (TINY_MODELS["DiTTransformer2DModel"], None),
    "PixArt": (TINY_MODELS["PixArtTransformer2DModel"], None),
    "SD3": (TINY_MODELS["SD3Transformer2DModel"], None),
    "SD3.5": (
        TINY_MODELS["SD3Transformer2DModel"],
        lambda: build_model(SD3Transformer2DModel, SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
    ),
    "Flux": (TINY_MODELS["FluxTransformer2DModel"], None),
    "U-ViT": (TINY_MODELS["UViT"], None),
    **_UNETS,
}
"""One model for every kind of block whose forward is replaced."""


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a tiny model with its weights rounded to a dtype."""
    entry, make = MODELS[name]
    model = (make or entry.build)()
    for module in model.children():  # not the model's own method, which warns of every cast
        module.to(dtype)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    return model


def inputs(name: str, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Returns the keyword arguments of a call."""
    return cast(MODELS[name][0].inputs(batch, seed), dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Returns tensors of floating-point numbers in another dtype, wherever they are."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return type(value)(cast(item, dtype) for item in value) if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def call(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """Returns a model's prediction."""
    return model(**arguments, return_dict=False)[0]
