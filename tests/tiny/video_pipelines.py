"""Tiny pipelines of video UNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, MotionAdapter, UNet3DConditionModel
from PIL import Image

from . import unet_condition as unets
from . import unet_video as videos
from .base import TEXT_DIM, build
from .pipeline_base import PIXELS, Call
from .sd_pipelines import Components, controlnet, ddim, entry, sd, size, unet
from .text import image_encoder, image_processor

FRAMES = 2
MOTION = {
    "block_out_channels": unets.SMALL_SD["block_out_channels"],
    "motion_layers_per_block": 2,
    "motion_num_attention_heads": 2,
    "motion_norm_num_groups": 4,
    "motion_max_seq_length": 8,
}


def frames(call: Call, count: int = FRAMES) -> dict[str, Any]:
    """Returns the arguments of text-to-video."""
    return size(call) | {"num_frames": count}


def _pictures(call: Call, count: int = FRAMES) -> list[Image.Image]:
    pixels = (255 * call.draw(count, PIXELS, PIXELS, 3).sigmoid()).byte().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def animated(**others: Callable[[], Any]) -> Callable[[], Components]:
    """Returns what makes the components of AnimateDiff and others."""

    def components() -> Components:
        base = unet(unets.SMALL_SD, num_attention_heads=None)
        parts = sd(base, ddim(), motion_adapter=build(MotionAdapter, MOTION))
        return parts | {name: make() for name, make in others.items()}

    return components


def _from_video(call: Call) -> dict[str, Any]:
    return call.text() | {"video": [_pictures(call)], "strength": 0.7, "height": PIXELS, "width": PIXELS}


def _controlled(call: Call) -> dict[str, Any]:
    return frames(call) | {"conditioning_frames": _pictures(call)}


def _sparse_controlnet() -> Any:
    config = {
        "block_out_channels": unets.SMALL_SD["block_out_channels"],
        "down_block_types": ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
        "norm_num_groups": 4,
        "motion_num_attention_heads": 2,
        "cross_attention_dim": TEXT_DIM,
        "attention_head_dim": 2,
        "conditioning_embedding_out_channels": (4, 4, 8, 8),
        "conditioning_channels": 3,
        "use_simplified_condition_embedding": False,
        "concat_conditioning_mask": True,
    }
    return build(diffusers.SparseControlNetModel, config)


def _sparsely_controlled(call: Call) -> dict[str, Any]:
    return frames(call) | {"conditioning_frames": _pictures(call, 1), "controlnet_frame_indices": [0]}


def _from_picture(call: Call) -> dict[str, Any]:
    return frames(call) | {"image": _pictures(call, 1)[0], "strength": 0.8}


def _svd() -> Components:
    model = build(diffusers.UNetSpatioTemporalConditionModel, videos.SVD)
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    vae = {"block_out_channels": (4,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4, "latent_channels": 4}
    return {
        "unet": model,
        "scheduler": scheduler,
        "vae": build(AutoencoderKLTemporalDecoder, vae),
        "image_encoder": image_encoder(),
        "feature_extractor": image_processor(),
    }


def _svd_call(call: Call) -> dict[str, Any]:
    most = 3.0 if call.guidance else 1.0
    sizes = {"height": PIXELS, "width": PIXELS, "num_frames": FRAMES}
    return {"image": call.image(), "max_guidance_scale": most} | sizes


def _three_d(call: Call) -> dict[str, Any]:
    return frames(call)


def _three_d_from_video(call: Call) -> dict[str, Any]:
    pixels = call.draw(call.batch, 3, FRAMES, PIXELS, PIXELS).sigmoid()
    return call.text() | {"video": 2 * pixels - 1, "strength": 0.7}


def _zero(call: Call) -> dict[str, Any]:
    return frames(call) | {}


ENTRIES = [
    entry("AnimateDiffPipeline", animated(), frames),
    entry("AnimateDiffControlNetPipeline", animated(controlnet=controlnet), _controlled),
    entry("AnimateDiffSparseControlNetPipeline", animated(controlnet=_sparse_controlnet), _sparsely_controlled),
    entry("AnimateDiffVideoToVideoPipeline", animated(), _from_video),
    entry(
        "AnimateDiffVideoToVideoControlNetPipeline",
        animated(controlnet=controlnet),
        lambda call: _from_video(call) | {"conditioning_frames": _pictures(call)},
    ),
    entry(
        "AnimateDiffPAGPipeline",
        lambda: animated()() | {"pag_applied_layers": "mid"},
        lambda call: frames(call) | {"pag_scale": 3.0},
    ),
    entry("PIAPipeline", lambda: _pia(), _from_picture),
    entry("StableVideoDiffusionPipeline", _svd, _svd_call),
    entry("TextToVideoSDPipeline", lambda: sd(build(UNet3DConditionModel, videos.THREE_D)), _three_d),
    entry("VideoToVideoSDPipeline", lambda: sd(build(UNet3DConditionModel, videos.THREE_D)), _three_d_from_video),
]
