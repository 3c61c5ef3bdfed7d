"""Tiny pipelines of video UNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, MotionAdapter, UNet3DConditionModel
from PIL import Image

from . import unet_condition as unets
from . import unet_video as videos
from .base import TEXT_DIM, build
from .pipeline_base import PIXELS, Call
from .sd_pipelines import Components, controlnet, ddim, entry, sd, size, small, unet
from .sdxl_pipelines import sdxl
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


def animated(controlnet: Callable[[], Any] | None = None, **motion: Any) -> Callable[[], Components]:
    """Returns what makes the components of AnimateDiff."""

    def components() -> Components:
        parts = sd(unet(unets.SMALL_SD), motion_adapter=build(MotionAdapter, MOTION | motion))
        return parts | ({"controlnet": controlnet()} if controlnet else {})

    return components


def _animated_sdxl() -> Components:
    heads = {"attention_head_dim": (2, 2, 2), "transformer_layers_per_block": 1}
    return sdxl(
        unets.SDXL | heads,
        scheduler=ddim(),
        motion_adapter=build(MotionAdapter, MOTION | {"use_motion_mid_block": False}),
    )


def _three_d() -> Components:
    return sd(build(UNet3DConditionModel, videos.THREE_D))


def _from_video(call: Call) -> dict[str, Any]:
    return call.text() | {"video": _pictures(call), "strength": 0.7, "height": PIXELS, "width": PIXELS}


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
    vae = {"block_out_channels": (32,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4, "latent_channels": 4}
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
    return {"image": _pictures(call, call.batch), "max_guidance_scale": most} | sizes


def _three_d_from_video(call: Call) -> dict[str, Any]:
    return call.text() | {"video": _pictures(call), "strength": 0.7}


def _i2vgen() -> Components:
    parts = sd(build(diffusers.I2VGenXLUNet, videos.THREE_D))
    return parts | {"image_encoder": image_encoder(), "feature_extractor": image_processor()}


def _i2vgen_call(call: Call) -> dict[str, Any]:
    return frames(call) | {"image": _pictures(call, 1)[0], "target_fps": 8, "clip_skip": None}


def _zero_call(call: Call) -> dict[str, Any]:
    """A few steps for the first frame, which is then moved for the others."""
    return size(call) | {"video_length": FRAMES, "t0": 1, "t1": 2}


ONE = ("batch",)
"""A call makes one video."""
ENTRIES = [
    entry("AnimateDiffPipeline", animated(), frames),
    entry("AnimateDiffControlNetPipeline", animated(controlnet=controlnet), _controlled, ignores=ONE),
    entry("AnimateDiffSparseControlNetPipeline", animated(controlnet=_sparse_controlnet), _sparsely_controlled),
    entry("AnimateDiffVideoToVideoPipeline", animated(), _from_video, ignores=ONE),
    entry(
        "AnimateDiffVideoToVideoControlNetPipeline",
        animated(controlnet=controlnet),
        lambda call: _from_video(call) | {"conditioning_frames": _pictures(call)},
        ignores=ONE,
    ),
    entry("AnimateDiffSDXLPipeline", _animated_sdxl, frames),
    entry(
        "AnimateDiffPAGPipeline",
        lambda: animated()() | {"pag_applied_layers": "mid"},
        lambda call: frames(call) | {"pag_scale": 3.0},
    ),
    entry("PIAPipeline", animated(conv_in_channels=9), _from_picture, ignores=ONE),
    entry("StableVideoDiffusionPipeline", _svd, _svd_call),
    entry("TextToVideoSDPipeline", _three_d, frames),
    entry("VideoToVideoSDPipeline", _three_d, _three_d_from_video, ignores=ONE),
    entry("I2VGenXLPipeline", _i2vgen, _i2vgen_call, ignores=ONE),
    entry("TextToVideoZeroPipeline", small(), _zero_call, ignores=("batch", "guidance")),
    entry("TextToVideoZeroSDXLPipeline", lambda: sdxl(scheduler=ddim()), _zero_call, ignores=ONE),
]
