"""Tiny Stable Diffusion pipelines of the first kind: one text encoder, one VAE, one UNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    MultiControlNetModel,
    PNDMScheduler,
    T2IAdapter,
    UNet2DConditionModel,
)
from torch import nn

from . import unet_condition as unets
from .base import HEIGHT, TEXT_DIM, build
from .pipeline_base import PIXELS, Call, TinyPipeline, pipeline, vae
from .text import clip_tokenizer, text_encoder

Components = dict[str, Any]
CONTROL = {
    "block_out_channels": unets.SMALL_SD["block_out_channels"],
    "down_block_types": unets.SMALL_SD["down_block_types"],
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_DIM,
    "attention_head_dim": 2,
    "conditioning_embedding_out_channels": (4, 4, 8, 8),
}


def unet(config: dict[str, Any], **changes: Any) -> UNet2DConditionModel:
    """Returns a tiny UNet of a configuration with changes."""
    return build(UNet2DConditionModel, config | changes)


def ddim(**config: Any) -> DDIMScheduler:
    """Returns a DDIM scheduler with Stable Diffusion's noise levels."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **config
    )


def pndm() -> PNDMScheduler:
    """Returns Stable Diffusion's default scheduler, which evaluates the second timestep twice."""
    return PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)


def sd(unet: nn.Module, scheduler: Any = None, **others: Any) -> Components:
    """Returns the components of Stable Diffusion."""
    return {
        "unet": unet,
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": clip_tokenizer(),
        "scheduler": scheduler or ddim(),
    } | others


def size(call: Call) -> dict[str, Any]:
    """Returns the arguments of text-to-image."""
    return call.text() | {"height": PIXELS, "width": PIXELS}


def from_image(call: Call) -> dict[str, Any]:
    """Returns the arguments of image-to-image, which begins inside the grid."""
    return call.text() | {"image": call.image(), "strength": 0.7}


def inpaint(call: Call) -> dict[str, Any]:
    """Returns the arguments of inpainting."""
    return size(call) | {"image": call.image(), "mask_image": call.mask()}


def controlnet(seed: int = 0) -> ControlNetModel:
    """Returns a ControlNet for the small UNet."""
    return build(ControlNetModel, CONTROL, seed=seed)


def t2i_adapter() -> T2IAdapter:
    """Returns an adapter for the small UNet."""
    config = {"channels": [8, 16, 16], "num_res_blocks": 1, "downscale_factor": 8}
    return build(T2IAdapter, config)


def small(**others: Any) -> Callable[[], Components]:
    """Returns what makes the components with the small UNet; callables among the others are called."""
    return lambda: sd(unet(unets.SMALL_SD)) | {name: make() for name, make in others.items()}


def controlled(call: Call) -> dict[str, Any]:
    """Returns the arguments of text-to-image with a control image."""
    return size(call) | {"image": call.image()}


def controlled_from_image(call: Call) -> dict[str, Any]:
    """Returns the arguments of image-to-image with a control image."""
    return from_image(call) | {"control_image": call.image()}


def controlled_inpaint(call: Call) -> dict[str, Any]:
    """Returns the arguments of inpainting with a control image."""
    return inpaint(call) | {"control_image": call.image()}


def _multi_controlled(call: Call) -> dict[str, Any]:
    scales = {"controlnet_conditioning_scale": [1.0, 0.5], "control_guidance_end": [1.0, 0.6]}
    return size(call) | {"image": [call.image(), call.image()]} | scales


def _multi_controlnet() -> MultiControlNetModel:
    return MultiControlNetModel([controlnet(), controlnet(seed=1)])


def _depth(call: Call) -> dict[str, Any]:
    return from_image(call) | {"depth_map": call.draw(call.batch, PIXELS, PIXELS)}


def _x4() -> Components:
    parts = sd(unet(unets.X4), low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear"), max_noise_level=350)
    return parts | {"vae": vae(halvings=2)}


def _x4_call(call: Call) -> dict[str, Any]:
    return call.text() | {"image": call.image(HEIGHT), "noise_level": 20}


def _latent_upscaler() -> Components:
    width = 32
    condition = 2 * 64 + width  # the noise level and the pooled prompt
    model = unet(unets.UPSCALER, time_cond_proj_dim=condition)
    encoder = text_encoder(width=width)
    return sd(model, EulerDiscreteScheduler(prediction_type="sample"), text_encoder=encoder)


def _latent_upscaler_call(call: Call) -> dict[str, Any]:
    return call.text() | {"image": call.draw(call.batch, 4, HEIGHT, HEIGHT)}


def _instruct_call(call: Call) -> dict[str, Any]:
    return call.text() | {"image": call.image(), "image_guidance_scale": 1.5 if call.guidance else 1.0}


def _lcm() -> Components:
    return sd(unet(unets.LCM), LCMScheduler(original_inference_steps=50))


def _lcm_from_image(call: Call) -> dict[str, Any]:
    return _without_negative(from_image(call))


def _without_negative(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if not name.startswith("negative")}


def _ip_adapter() -> Components:
    parts = sd(unet(unets.SMALL_SD))
    load_ip_adapter(parts["unet"])
    return parts


def load_ip_adapter(model: UNet2DConditionModel) -> None:
    """Gives a UNet the layers of an IP-Adapter with four image tokens, with random weights."""
    draw = torch.Generator().manual_seed(0)
    width, tokens = model.config.cross_attention_dim, 4

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=draw)

    names = [name for name in model.attn_processors if "attn2" in name and "motion_modules" not in name]
    layers = [model.get_submodule(name.removesuffix(".processor")) for name in names]
    keys = {
        f"{2 * index + 1}.to_{part}_ip.weight": random(layer.inner_dim, width)
        for index, layer in enumerate(layers)
        for part in "kv"
    }
    projection = {
        "proj.weight": random(tokens * width, unets.IMAGE_DIM),
        "proj.bias": random(tokens * width),
        "norm.weight": 1 + random(width),
        "norm.bias": random(width),
    }
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])


def ip_adapter_call(call: Call) -> dict[str, Any]:
    """Returns the arguments of text-to-image with one image prompt for all items."""
    embeds = call.draw(1, 1, unets.IMAGE_DIM)
    both = torch.cat([torch.zeros_like(embeds), embeds]) if call.guidance else embeds
    return size(call) | {"ip_adapter_image_embeds": [both]}


def entry(
    class_name: str, components: Callable[[], Components], arguments: Callable[[Call], dict[str, Any]], **extra: Any
) -> TinyPipeline:
    """Returns the entry of a pipeline whose denoiser is a UNet; see `pipeline`."""
    return pipeline(class_name, components, arguments, **{"denoisers": ("unet",), **extra})


ENTRIES = [
    entry("StableDiffusionPipeline", lambda: sd(unet(unets.SD)), size),
    entry("StableDiffusionPipeline", lambda: sd(unet(unets.SMALL_SD), pndm()), size, variant="PNDM"),
    entry("StableDiffusionImg2ImgPipeline", small(), from_image),
    entry("StableDiffusionInpaintPipeline", lambda: sd(unet(unets.SMALL_SD, in_channels=9)), inpaint),
    entry("StableDiffusionInpaintPipeline", small(), inpaint, variant="4 channels"),
    entry("StableDiffusionDepth2ImgPipeline", lambda: sd(unet(unets.SMALL_SD, in_channels=5)), _depth),
    entry("StableDiffusionUpscalePipeline", _x4, _x4_call),
    entry("StableDiffusionLatentUpscalePipeline", _latent_upscaler, _latent_upscaler_call),
    entry("StableDiffusionInstructPix2PixPipeline", lambda: sd(unet(unets.SMALL_SD, in_channels=8)), _instruct_call),
    entry("StableDiffusionControlNetPipeline", small(controlnet=controlnet), controlled),
    entry("StableDiffusionControlNetPipeline", small(controlnet=_multi_controlnet), _multi_controlled, variant="multi"),
    entry("StableDiffusionControlNetImg2ImgPipeline", small(controlnet=controlnet), controlled_from_image),
    entry("StableDiffusionControlNetInpaintPipeline", small(controlnet=controlnet), controlled_inpaint),
    entry("StableDiffusionAdapterPipeline", small(adapter=t2i_adapter), controlled),
    entry("StableDiffusionPipeline", _ip_adapter, ip_adapter_call, variant="IP-Adapter"),
    entry("LatentConsistencyModelPipeline", _lcm, lambda call: _without_negative(size(call))),
    entry("LatentConsistencyModelImg2ImgPipeline", _lcm, _lcm_from_image),
]
