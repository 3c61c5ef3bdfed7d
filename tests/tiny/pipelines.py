"""Tiny pipelines of transformers: seeded random weights, no tokenizer and no text encoder, nothing downloaded."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    UniPCMultistepScheduler,
)
from torch import nn

from .base import HEIGHT, TEXT_TOKENS, build
from .joint import FLUX
from .models import TINY_MODELS
from .pipeline_base import CLASSES, PIXELS, Call, TinyPipeline, pipeline, vae
from .video import WAN


def transformer(name: str) -> nn.Module:
    """Returns the tiny model of the catalogue."""
    return TINY_MODELS[name].build()


def flow_matching(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def _dit() -> dict[str, Any]:
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    labels = {index: f"class {index}" for index in range(CLASSES)}
    return {
        "transformer": transformer("DiTTransformer2DModel"),
        "vae": vae(),
        "scheduler": scheduler,
        "id2label": labels,
    }


def _dit_call(call: Call) -> dict[str, Any]:
    labels = call.draw.ints(CLASSES, call.batch).tolist()
    return {"class_labels": labels, "guidance_scale": 4.0 if call.guidance else 1.0, "output_type": "np"}


def _sd3() -> dict[str, Any]:
    return {"transformer": transformer("SD3Transformer2DModel"), "vae": vae(), "scheduler": flow_matching(shift=3.0)}


def _sd3_call(call: Call) -> dict[str, Any]:
    return call.prompt(7.0) | call.pooled() | {"height": PIXELS, "width": PIXELS}


def _sd3_img2img_call(call: Call) -> dict[str, Any]:
    return _sd3_call(call) | {"image": call.image(), "strength": 0.5}


def _flux() -> dict[str, Any]:
    return {
        "transformer": transformer("FluxTransformer2DModel"),
        "vae": vae(),
        "scheduler": flow_matching(use_dynamic_shifting=True),
    }


def _flux_call(call: Call) -> dict[str, Any]:
    return call.prompt(2.0, "true_cfg_scale") | call.pooled() | {"height": PIXELS, "width": PIXELS}


def _flux_controlnet() -> dict[str, Any]:
    return _flux() | {"controlnet": build(FluxControlNetModel, FLUX | {"num_layers": 2, "num_single_layers": 2})}


def _flux_control_call(call: Call) -> dict[str, Any]:
    return _flux_call(call) | {"control_image": call.image()}


def _flux_img2img_call(call: Call) -> dict[str, Any]:
    return _flux_call(call) | {"image": call.image(), "strength": 0.5}


def _pixart() -> dict[str, Any]:
    return {
        "transformer": transformer("PixArtTransformer2DModel"),
        "vae": vae(),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def _masked_call(call: Call) -> dict[str, Any]:
    masks = call.masks("prompt_attention_mask")
    return call.prompt(4.5) | masks | {"height": PIXELS, "width": PIXELS, "negative_prompt": None}


def _unbinned_call(call: Call) -> dict[str, Any]:
    return _masked_call(call) | {"use_resolution_binning": False}


def _sana() -> dict[str, Any]:
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {"transformer": transformer("SanaTransformer2DModel"), "scheduler": DPMSolverMultistepScheduler(**solver)}


def _sana_call(call: Call) -> dict[str, Any]:
    without_autoencoder = 32 * HEIGHT
    return _unbinned_call(call) | {"height": without_autoencoder, "width": without_autoencoder}


def _lumina2() -> dict[str, Any]:
    return {"transformer": transformer("Lumina2Transformer2DModel"), "vae": vae(), "scheduler": flow_matching()}


def _bool_masked_call(call: Call) -> dict[str, Any]:
    masks = call.masks("prompt_attention_mask")
    return _masked_call(call) | {name: mask.bool() for name, mask in masks.items()}


def _aura_flow() -> dict[str, Any]:
    return {"transformer": transformer("AuraFlowTransformer2DModel"), "vae": vae(), "scheduler": flow_matching()}


def _hunyuan_dit() -> dict[str, Any]:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False)
    return {
        "transformer": transformer("HunyuanDiT2DModel"),
        "vae": vae(),
        "scheduler": scheduler,
    }


def _hunyuan_dit_call(call: Call) -> dict[str, Any]:
    second = {name: call.embeds(8, 24) for name in call.named("prompt_embeds_2")}
    return _unbinned_call(call) | second | call.masks("prompt_attention_mask_2", tokens=8)


def _qwen_image() -> dict[str, Any]:
    return {
        "transformer": transformer("QwenImageTransformer2DModel"),
        "scheduler": flow_matching(use_dynamic_shifting=True),
    }


def _qwen_image_call(call: Call) -> dict[str, Any]:
    masks = {name: mask.long() for name, mask in call.masks("prompt_embeds_mask").items()}
    return call.prompt(4.0, "true_cfg_scale") | masks | {"height": PIXELS, "width": PIXELS}


def _wan() -> dict[str, Any]:
    return {
        "transformer": transformer("WanTransformer3DModel"),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def _wan_two_experts() -> dict[str, Any]:
    second = build(diffusers.WanTransformer3DModel, WAN, seed=1)
    return _wan() | {"transformer_2": second, "boundary_ratio": 0.875}


def _wan_call(call: Call) -> dict[str, Any]:
    return call.prompt(5.0) | {"height": PIXELS, "width": PIXELS, "num_frames": 5}


def _cogvideox() -> dict[str, Any]:
    return {"transformer": transformer("CogVideoXTransformer3DModel"), "scheduler": CogVideoXDDIMScheduler()}


def _cogvideox_call(call: Call) -> dict[str, Any]:
    return _wan_call(call) | {"max_sequence_length": TEXT_TOKENS}


def _ltx() -> dict[str, Any]:
    return {
        "transformer": transformer("LTXVideoTransformer3DModel"),
        "scheduler": flow_matching(use_dynamic_shifting=True),
    }


def _ltx_call(call: Call) -> dict[str, Any]:
    size = {"height": 128, "width": 128, "num_frames": 9}
    return call.prompt(3.0) | call.masks("prompt_attention_mask") | size


def _cogview4() -> dict[str, Any]:
    return {"transformer": transformer("CogView4Transformer2DModel"), "vae": vae(), "scheduler": flow_matching()}


def _cogview4_call(call: Call) -> dict[str, Any]:
    return call.prompt(5.0) | {"height": PIXELS, "width": PIXELS}


def _chroma() -> dict[str, Any]:
    return {"transformer": transformer("ChromaTransformer2DModel"), "vae": vae(), "scheduler": flow_matching()}


def _z_image() -> dict[str, Any]:
    return {"transformer": transformer("ZImageTransformer2DModel"), "vae": vae(), "scheduler": flow_matching()}


def _z_image_call(call: Call) -> dict[str, Any]:
    prompt = call.prompt(5.0)
    lists = {name: list(prompt[name]) for name in call.named("prompt_embeds")}
    return prompt | lists | {"guidance_scale": 5.0 if call.guidance else 0.0, "height": PIXELS, "width": PIXELS}


def _latte() -> dict[str, Any]:
    return {
        "transformer": transformer("LatteTransformer3DModel"),
        "vae": vae(),
        "scheduler": DDIMScheduler(clip_sample=False),
    }


def _latte_call(call: Call) -> dict[str, Any]:
    size = {"height": PIXELS, "width": PIXELS, "video_length": 2}
    return call.prompt(7.5) | size | {"negative_prompt": None, "mask_feature": False}


def _mochi() -> dict[str, Any]:
    return {"transformer": transformer("MochiTransformer3DModel"), "scheduler": flow_matching(invert_sigmas=True)}


def _mochi_call(call: Call) -> dict[str, Any]:
    size = {"height": PIXELS, "width": PIXELS, "num_frames": 7}
    return call.prompt(4.5) | call.masks("prompt_attention_mask") | size


_ENTRIES = [
    pipeline("DiTPipeline", _dit, _dit_call),
    pipeline("StableDiffusion3Pipeline", _sd3, _sd3_call),
    pipeline("StableDiffusion3Img2ImgPipeline", _sd3, _sd3_img2img_call),
    pipeline("FluxPipeline", _flux, _flux_call),
    pipeline("FluxControlNetPipeline", _flux_controlnet, _flux_control_call),
    pipeline("FluxImg2ImgPipeline", _flux, _flux_img2img_call),
    pipeline("PixArtAlphaPipeline", _pixart, _unbinned_call),
    pipeline("PixArtSigmaPipeline", _pixart, _unbinned_call),
    pipeline("WanPipeline", _wan, _wan_call),
    pipeline(
        "WanPipeline", _wan_two_experts, _wan_call, variant="two experts", denoisers=("transformer", "transformer_2")
    ),
    pipeline("SanaPipeline", _sana, _sana_call),
    pipeline("Lumina2Pipeline", _lumina2, _bool_masked_call),
    pipeline("AuraFlowPipeline", _aura_flow, _masked_call),
    pipeline("HunyuanDiTPipeline", _hunyuan_dit, _hunyuan_dit_call),
    pipeline("CogVideoXPipeline", _cogvideox, _cogvideox_call),
    pipeline("QwenImagePipeline", _qwen_image, _qwen_image_call),
    pipeline("LTXPipeline", _ltx, _ltx_call),
    pipeline("CogView4Pipeline", _cogview4, _cogview4_call),
    pipeline("ChromaPipeline", _chroma, _bool_masked_call),
    pipeline("ZImagePipeline", _z_image, _z_image_call),
    pipeline("LattePipeline", _latte, _latte_call),
    pipeline("MochiPipeline", _mochi, _mochi_call),
]
TINY_PIPELINES: dict[str, TinyPipeline] = {entry.name: entry for entry in _ENTRIES}
"""Name to tiny pipeline."""
