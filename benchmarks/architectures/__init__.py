"""UNets of published models, made from their published configurations with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

TITLES = {"sd-1.5": "Stable Diffusion 1.5", "sdxl-1.0": "SDXL base 1.0"}
"""Each architecture's name; its configuration is the JSON file of that key."""

TEXT_TOKENS = 77
TIME_IDS = 6
"""Sizes and crops that SDXL is told, each embedded by itself."""

NARROWER = 5
"""How much narrower the small versions are, so that a CPU can run them."""


def config(key: str, *, small: bool = False) -> dict[str, Any]:
    """The configuration of a UNet.

    Args:
        key: of `TITLES`.
        small: the same layout with fewer channels, heads, attentions and pixels.
    """
    text = (Path(__file__).parent / f"{key}.json").read_text(encoding="utf-8")
    published: dict[str, Any] = json.loads(text)
    if not small:
        return published
    heads = published["attention_head_dim"]
    depths = published.get("transformer_layers_per_block", 1)
    return published | {
        "block_out_channels": [channels // NARROWER for channels in published["block_out_channels"]],
        "attention_head_dim": [count // NARROWER for count in heads] if isinstance(heads, list) else heads,
        "transformer_layers_per_block": [min(depth, 2) for depth in depths] if isinstance(depths, list) else depths,
        "sample_size": published["sample_size"] // 8,
    }


def unet(
    key: str, *, small: bool = False, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """A UNet with random weights, to evaluate with; on the device ``"meta"`` it has shapes only."""
    torch.manual_seed(0)
    with torch.device(device):
        made = UNet2DConditionModel.from_config(config(key, small=small))
    return nn.Module.to(made, dtype).eval()  # diffusers' own `to` warns of every conversion


def conditions(denoiser: UNet2DConditionModel, batch: int) -> dict[str, Any]:
    """What a call of the denoiser takes beside sample and timestep, random, for ``batch`` rows."""
    settings = denoiser.config
    like = {"device": denoiser.device, "dtype": denoiser.dtype}
    given: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, settings.cross_attention_dim, **like)
    }
    if settings.addition_embed_type == "text_time":
        pooled = settings.projection_class_embeddings_input_dim - TIME_IDS * settings.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, **like),
            "time_ids": torch.zeros(batch, TIME_IDS, **like),
        }
    return given


def sample(denoiser: UNet2DConditionModel, batch: int) -> torch.Tensor:
    """Random latents of the model's own size, shape ``(batch, 4, size, size)``."""
    size = denoiser.config.sample_size
    shape = (batch, denoiser.config.in_channels, size, size)
    return torch.randn(shape, device=denoiser.device, dtype=denoiser.dtype)
