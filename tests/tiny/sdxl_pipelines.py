"""Tiny SDXL pipelines: two text encoders, pooled prompts, sizes as conditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import ControlNetModel, ControlNetUnionModel, EulerDiscreteScheduler, T2IAdapter

from . import unet_condition as unets
from .base import TEXT_DIM, build
from .pipeline_base import Call, vae
from .sd_pipelines import (
    CONTROL,
    Components,
    controlled,
    controlled_from_image,
    controlled_inpaint,
    ddim,
    entry,
    from_image,
    inpaint,
    ip_adapter_call,
    load_ip_adapter,
    size,
    unet,
)
from .text import clip_tokenizer, text_encoder

CONTROL_XL = CONTROL | {
    name: unets.SDXL[name]
    for name in (
        "down_block_types",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "use_linear_projection",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
}


def sdxl(config: dict[str, Any] = unets.SDXL, scheduler: Any = None, **others: Any) -> Components:
    """Returns the components of SDXL; without the first text encoder for a refiner."""
    changes = {name: others.pop(name) for name in ("in_channels",) if name in others}
    parts = {
        "unet": unet(config, **changes),
        "vae": vae(),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(projection=unets.POOLED, seed=1),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": scheduler or EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
    }
    return parts | others


def parts(**others: Callable[[], Any]) -> Callable[[], Components]:
    """Returns what makes the components of SDXL and others."""
    return lambda: sdxl(**{name: make() for name, make in others.items()})


def controlnet() -> ControlNetModel:
    """Returns a ControlNet for the tiny SDXL."""
    return build(ControlNetModel, CONTROL_XL)


def union() -> ControlNetUnionModel:
    """Returns a ControlNet for several kinds of control."""
    channels = {"num_trans_channel": 8, "num_trans_head": 1, "num_trans_layer": 1, "num_proj_channel": 8}
    config = {"num_control_type": 6} | channels
    return build(ControlNetUnionModel, CONTROL_XL | config)


def _adapter() -> T2IAdapter:
    config = {"channels": [8, 16, 16, 16], "num_res_blocks": 1, "downscale_factor": 16}
    return build(T2IAdapter, config | {"adapter_type": "full_adapter_xl"})


def _refiner() -> Components:
    return sdxl(
        unets.SDXL_REFINER | {"cross_attention_dim": TEXT_DIM},
        text_encoder=None,
        tokenizer=None,
        requires_aesthetics_score=True,
    )


def _instruct_call(call: Call) -> dict[str, Any]:
    return size(call) | {"image": call.image(), "image_guidance_scale": 1.5 if call.guidance else 1.0}


def _union_call(arguments: Callable[[Call], dict[str, Any]]) -> Callable[[Call], dict[str, Any]]:
    return lambda call: arguments(call) | {"control_image": [call.image()], "control_mode": [3]}


def _ip_adapter() -> Components:
    components = sdxl()
    load_ip_adapter(components["unet"])
    return components


ENTRIES = [
    entry("StableDiffusionXLPipeline", sdxl, size),
    entry("StableDiffusionXLPipeline", lambda: sdxl(scheduler=ddim()), size, variant="DDIM"),
    entry("StableDiffusionXLPipeline", _ip_adapter, ip_adapter_call, variant="IP-Adapter"),
    entry("StableDiffusionXLImg2ImgPipeline", sdxl, from_image),
    entry("StableDiffusionXLImg2ImgPipeline", _refiner, from_image, variant="refiner"),
    entry("StableDiffusionXLInpaintPipeline", lambda: sdxl(in_channels=9), inpaint),
    entry("StableDiffusionXLInpaintPipeline", sdxl, inpaint, variant="4 channels"),
    entry("StableDiffusionXLInstructPix2PixPipeline", lambda: sdxl(in_channels=8), _instruct_call),
    entry("StableDiffusionXLControlNetPipeline", parts(controlnet=controlnet), controlled),
    entry("StableDiffusionXLControlNetImg2ImgPipeline", parts(controlnet=controlnet), controlled_from_image),
    entry("StableDiffusionXLControlNetInpaintPipeline", parts(controlnet=controlnet), controlled_inpaint),
    entry("StableDiffusionXLControlNetUnionPipeline", parts(controlnet=union), _union_call(size)),
    entry("StableDiffusionXLControlNetUnionImg2ImgPipeline", parts(controlnet=union), _union_call(from_image)),
    entry("StableDiffusionXLControlNetUnionInpaintPipeline", parts(controlnet=union), _union_call(inpaint)),
    entry("StableDiffusionXLAdapterPipeline", parts(adapter=_adapter), controlled),
]
