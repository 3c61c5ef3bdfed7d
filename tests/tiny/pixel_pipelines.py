"""Tiny pipelines that denoise pixels or latents without Stable Diffusion's text encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from . import unet_condition as unets
from . import unet_unconditional as plain
from .base import HEIGHT, TEXT_DIM, build
from .pipeline_base import CLASSES, PIXELS, Call
from .sd_pipelines import Components, entry, unet
from .text import clip_tokenizer, text_encoder


def latent_autoencoder(halvings: int = 2, channels: int = 3, **changes: Any) -> VQModel:
    """Returns a vector-quantised autoencoder that halves an image a few times."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * (halvings + 1),
        "up_block_types": ("UpDecoderBlock2D",) * (halvings + 1),
        "block_out_channels": (4,) * (halvings + 1),
        "norm_num_groups": 2,
        "latent_channels": channels,
        "num_vq_embeddings": 8,
    }
    return build(VQModel, config | changes)


def movq() -> VQModel:
    """Returns the autoencoder of a tiny Kandinsky, with norms that do not look at the latent."""
    return latent_autoencoder(halvings=3, channels=4, vq_embed_dim=4)


# -- unconditional -----------------------------------------------------------------------------------------------------


def unconditional(call: Call) -> dict[str, Any]:
    """Returns the arguments of a pipeline that knows nothing but a batch size."""
    return {"batch_size": call.batch, "output_type": "np"}


def with_unet(config: dict[str, Any], scheduler: Callable[[], Any], **others: Any) -> Callable[[], Components]:
    return lambda: (
        {"unet": build(UNet2DModel, config), "scheduler": scheduler()} | {name: make() for name, make in others.items()}
    )


def _consistency_call(call: Call) -> dict[str, Any]:
    return unconditional(call) | {"class_labels": call.draw.ints(CLASSES, call.batch)}


def _super_resolution_call(call: Call) -> dict[str, Any]:
    return {"image": 2 * call.image(HEIGHT) - 1, "output_type": "np"}


# -- DeepFloyd IF ------------------------------------------------------------------------------------------------------


def _if(config: dict[str, Any]) -> Components:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True)
    parts = {"unet": build(UNet2DConditionModel, config), "scheduler": scheduler}
    return parts | {"safety_checker": None, "feature_extractor": None, "watermarker": None}


def _if_upscale() -> Components:
    config = unets.IF_UPSCALE | {"sample_size": 2 * HEIGHT}
    return _if(config) | {"image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")}


def _if_call(call: Call) -> dict[str, Any]:
    return call.prompt(7.0) | {"output_type": "pt"}


def _if_upscale_call(call: Call) -> dict[str, Any]:
    return _if_call(call) | {"image": 2 * call.image(HEIGHT) - 1}


def _if_from_image(call: Call) -> dict[str, Any]:
    return _if_call(call) | {"image": 2 * call.image(HEIGHT) - 1, "strength": 0.7}


def _if_inpaint(call: Call) -> dict[str, Any]:
    return _if_from_image(call) | {"mask_image": call.mask(HEIGHT)}


def _if_upscale_from_image(call: Call) -> dict[str, Any]:
    original = {"original_image": 2 * call.image(2 * HEIGHT) - 1, "strength": 0.7}
    return _if_upscale_call(call) | original


def _if_upscale_inpaint(call: Call) -> dict[str, Any]:
    return _if_upscale_from_image(call) | {"mask_image": call.mask(2 * HEIGHT)}


# -- Kandinsky ---------------------------------------------------------------------------------------------------------


def kandinsky(config: dict[str, Any], **changes: Any) -> Callable[[], Components]:
    """Returns what makes the components of Kandinsky 2.2 with a UNet of this configuration."""
    return lambda: {"unet": unet(config, **changes), "scheduler": _kandinsky_scheduler(), "movq": movq()}


def _kandinsky_scheduler() -> DDIMScheduler:
    noise = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _kandinsky_call(call: Call) -> dict[str, Any]:
    embeds = {name: call.embeds(unets.IMAGE_DIM) for name in ("image_embeds", "negative_image_embeds")}
    return embeds | call.scale(4.0) | {"height": PIXELS, "width": PIXELS}


def _kandinsky_from_image(call: Call) -> dict[str, Any]:
    return _kandinsky_call(call) | {"image": call.image(), "strength": 0.7, "output_type": "pt"}


def _kandinsky_inpaint(call: Call) -> dict[str, Any]:
    return _kandinsky_call(call) | {"image": call.image(), "mask_image": call.mask()}


def _hinted(arguments: Callable[[Call], dict[str, Any]]) -> Callable[[Call], dict[str, Any]]:
    return lambda call: arguments(call) | {"hint": call.image(), "output_type": "pt"}


def _kandinsky3() -> Components:
    model = build(diffusers.Kandinsky3UNet, unets.KANDINSKY3)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, thresholding=False)
    return {"unet": model, "scheduler": scheduler, "movq": movq()}


def _kandinsky3_call(call: Call) -> dict[str, Any]:
    prompt = {name: call.embeds(128, TEXT_DIM) for name in ("prompt_embeds", "negative_prompt_embeds")}
    masks = {name: torch.ones(call.batch, 128) for name in ("attention_mask", "negative_attention_mask")}
    return prompt | masks | call.scale(3.0) | {"height": PIXELS, "width": PIXELS}


def _kandinsky3_from_image(call: Call) -> dict[str, Any]:
    call_arguments = _kandinsky3_call(call) | {"image": call.image(), "strength": 0.7}
    return {name: value for name, value in call_arguments.items() if name not in ("height", "width")}


# -- Stable Cascade ----------------------------------------------------------------------------------------------------


def cascade(name: str, config: dict[str, Any], **others: Any) -> Components:
    """Returns the components of one stage, whose denoiser has this name."""
    model = build(diffusers.StableCascadeUNet, config)
    encoder = text_encoder(projection=unets.POOLED)
    parts = {name: model, "scheduler": diffusers.DDPMWuerstchenScheduler()}
    return parts | {"text_encoder": encoder, "tokenizer": clip_tokenizer()} | others


def _cascade_decoder_call(call: Call) -> dict[str, Any]:
    return call.text(2.0) | {"image_embeddings": call.embeds(4, 4, 4)}


def _cascade_prior_call(call: Call) -> dict[str, Any]:
    return call.text(4.0) | {"height": 4 * 42, "width": 4 * 42}


UNGUIDED = ("guidance",)
ENTRIES = [
    entry("DDPMPipeline", with_unet(plain.DDPM, DDPMScheduler), unconditional, ignores=UNGUIDED),
    entry("DDIMPipeline", with_unet(plain.DDPM, DDIMScheduler), unconditional, ignores=UNGUIDED),
    entry(
        "ConsistencyModelPipeline",
        with_unet(plain.CONSISTENCY | {"num_class_embeds": CLASSES}, CMStochasticIterativeScheduler),
        _consistency_call,
        ignores=UNGUIDED,
    ),
    entry(
        "LDMSuperResolutionPipeline",
        with_unet(plain.LDM, lambda: DDIMScheduler(clip_sample=False), vqvae=latent_autoencoder),
        _super_resolution_call,
        ignores=UNGUIDED,
    ),
    entry("IFPipeline", lambda: _if(unets.IF), _if_call),
    entry("IFSuperResolutionPipeline", _if_upscale, _if_upscale_call),
    entry("IFImg2ImgPipeline", lambda: _if(unets.IF), _if_from_image),
    entry("IFImg2ImgSuperResolutionPipeline", _if_upscale, _if_upscale_from_image),
    entry("IFInpaintingPipeline", lambda: _if(unets.IF), _if_inpaint),
    entry("IFInpaintingSuperResolutionPipeline", _if_upscale, _if_upscale_inpaint),
    entry("KandinskyV22Pipeline", kandinsky(unets.KANDINSKY), _kandinsky_call),
    entry("KandinskyV22Img2ImgPipeline", kandinsky(unets.KANDINSKY), _kandinsky_from_image),
    entry("KandinskyV22InpaintPipeline", kandinsky(unets.KANDINSKY, in_channels=9), _kandinsky_inpaint),
    entry("KandinskyV22ControlnetPipeline", kandinsky(unets.KANDINSKY_HINT), _hinted(_kandinsky_call)),
    entry("KandinskyV22ControlnetImg2ImgPipeline", kandinsky(unets.KANDINSKY_HINT), _hinted(_kandinsky_from_image)),
    entry("Kandinsky3Pipeline", _kandinsky3, _kandinsky3_call),
    entry("Kandinsky3Img2ImgPipeline", _kandinsky3, _kandinsky3_from_image),
    entry(
        "StableCascadePriorPipeline",
        lambda: cascade("prior", unets.CASCADE_PRIOR | {"clip_image_in_channels": 768}),
        _cascade_prior_call,
        denoisers=("prior",),
    ),
    entry(
        "StableCascadeDecoderPipeline",
        lambda: cascade("decoder", unets.CASCADE_DECODER, vqgan=None),
        _cascade_decoder_call,
        denoisers=("decoder",),
    ),
]
