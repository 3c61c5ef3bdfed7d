"""fastdiff's own denoiser and its pipeline, as entries of the catalogues."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn

from fastdiff.models import UViT

from .base import HEADS, HEIGHT, TEXT_DIM, TEXT_TOKENS, Draw, TinyModel, build, steps
from .pipeline_base import CLASSES, Call, TinyPipeline, pipeline, vae

UVIT = HEADS | {"sample_size": HEIGHT, "patch_size": 2, "in_channels": 4, "num_layers": 6, "num_classes": CLASSES}
UNCONDITIONAL = UVIT | {"num_classes": None}
TEXT = UNCONDITIONAL | {"context_dim": TEXT_DIM, "context_length": TEXT_TOKENS}


def inputs(batch: int, seed: int) -> dict[str, Any]:
    """Returns the arguments of a class-conditional forward."""
    draw = Draw(seed)
    sample = draw(batch, 4, HEIGHT, HEIGHT)
    return {"hidden_states": sample, "timestep": steps(batch), "class_labels": draw.ints(CLASSES, batch)}


def build_uvit(config: dict[str, Any] = UVIT) -> UViT:
    """Returns a tiny model whose layers, drawn as small as for a wide one, are no near identities."""
    model = build(UViT, config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(6)
    return model


MODEL = TinyModel(
    name="UViT",
    build=build_uvit,
    inputs=inputs,
    block_lists=("transformer_in_blocks", "transformer_out_blocks"),
    note="the middle block is in no list, and each out-block follows the unit that merges a long skip",
)


def _components() -> dict[str, Any]:
    return {"transformer": MODEL.build(), "vae": vae(), "scheduler": DDIMScheduler(clip_sample=False)}


def _call(call: Call) -> dict[str, Any]:
    return {"class_labels": call.draw.ints(CLASSES, call.batch).tolist()} | call.scale(4.0)


OWN_PIPELINES: dict[str, TinyPipeline] = {"UViTPipeline": pipeline("UViTPipeline", _components, _call)}
"""Name to tiny pipeline, of those that diffusers lacks."""
