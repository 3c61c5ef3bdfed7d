"""Tiny pipelines of several stages, and the stages that no other file has."""

from __future__ import annotations

import sys
from typing import Any

import diffusers
from diffusers import DDPMWuerstchenScheduler, UnCLIPScheduler
from diffusers.models import PriorTransformer
from torch import nn

from . import unet_condition as unets
from .base import TEXT_DIM, build
from .pipeline_base import PIXELS, Call, TinyPipeline, pipeline
from .pixel_pipelines import cascade, kandinsky
from .sd_pipelines import Components, entry
from .text import PROMPT_TOKENS, clip_tokenizer, image_encoder, image_processor, text_encoder

PRIOR = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "embedding_dim": unets.IMAGE_DIM,
    "num_embeddings": PROMPT_TOKENS,
}
WUERSTCHEN = {
    "c_in": 4,
    "c_out": 4,
    "c_r": 8,
    "c_cond": 16,
    "c_hidden": [16, 16, 16],
    "nhead": [-1, 2, 2],
    "blocks": [2, 2, 2],
    "level_config": ["CT", "CTA", "CTA"],
    "inject_effnet": [False, True, True],
    "effnet_embd": 4,
    "clip_embd": TEXT_DIM,
}
WUERSTCHEN_PRIOR = {"c_in": 4, "c": 16, "c_cond": TEXT_DIM, "c_r": 8, "depth": 3, "nhead": 2}


def _prior() -> Components:
    noise = {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0}
    return {
        "prior": build(PriorTransformer, PRIOR),
        "text_encoder": text_encoder(projection=unets.IMAGE_DIM, width=unets.IMAGE_DIM),
        "tokenizer": clip_tokenizer(),
        "image_encoder": image_encoder(unets.IMAGE_DIM),
        "image_processor": image_processor(),
        "scheduler": UnCLIPScheduler(num_train_timesteps=1000, **noise),
    }


def _prior_call(call: Call) -> dict[str, Any]:
    return call.text(4.0) | {"output_type": "pt"}


def _with_prior(parts: Components, prior: Components) -> Components:
    return parts | {f"prior_{name}": part for name, part in prior.items()}


def _kandinsky() -> Components:
    return _with_prior(kandinsky(unets.KANDINSKY)(), _prior())


def _kandinsky_call(call: Call) -> dict[str, Any]:
    return call.text(4.0) | {"height": PIXELS, "width": PIXELS, "prior_num_inference_steps": 2}


def _cascade() -> Components:
    first = cascade("prior", unets.CASCADE_PRIOR | {"clip_image_in_channels": 768})
    return _with_prior(cascade("decoder", unets.CASCADE_DECODER), first)


def _cascade_call(call: Call) -> dict[str, Any]:
    scale = call.scale(2.0)["guidance_scale"]
    prompt = {name: call.words() for name in call.named("prompt")}
    return prompt | {"height": 168, "width": 168, "prior_num_inference_steps": 2, "decoder_guidance_scale": scale}


def _imported_by(pipeline_class: str, name: str) -> type[nn.Module]:
    """Returns a model's class from the module of its pipeline, which moved between releases of diffusers."""
    return getattr(sys.modules[getattr(diffusers, pipeline_class).__module__], name)


def _wuerstchen_prior() -> Components:
    model = build(_imported_by("WuerstchenPriorPipeline", "WuerstchenPrior"), WUERSTCHEN_PRIOR)
    scheduler = DDPMWuerstchenScheduler()
    return {"prior": model, "text_encoder": text_encoder(), "tokenizer": clip_tokenizer(), "scheduler": scheduler}


def _wuerstchen() -> Components:
    model = build(_imported_by("WuerstchenDecoderPipeline", "WuerstchenDiffNeXt"), WUERSTCHEN)
    scheduler = DDPMWuerstchenScheduler()
    return {"decoder": model, "text_encoder": text_encoder(), "tokenizer": clip_tokenizer(), "scheduler": scheduler}


def _wuerstchen_prior_call(call: Call) -> dict[str, Any]:
    return call.text(4.0) | {"height": 168, "width": 168}


def _wuerstchen_call(call: Call) -> dict[str, Any]:
    return call.text(2.0) | {"image_embeddings": call.embeds(4, 6, 6)}


ENTRIES = [
    entry("KandinskyV22CombinedPipeline", _kandinsky, _kandinsky_call),
    entry("StableCascadeCombinedPipeline", _cascade, _cascade_call, denoisers=("decoder",)),
    entry("WuerstchenDecoderPipeline", _wuerstchen, _wuerstchen_call, denoisers=("decoder",), ignores=("batch",)),
]
_PRIORS = [
    pipeline("KandinskyV22PriorPipeline", _prior, _prior_call, denoisers=("prior",)),
    pipeline("WuerstchenPriorPipeline", _wuerstchen_prior, _wuerstchen_prior_call, denoisers=("prior",)),
]
PRIOR_PIPELINES: dict[str, TinyPipeline] = {entry.name: entry for entry in _PRIORS}
"""Name to tiny pipeline, for the stages that denoise embeddings with a transformer."""
