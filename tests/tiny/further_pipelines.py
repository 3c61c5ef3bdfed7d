"""Tiny UNet pipelines beside the usual ones: layouts, other guidance, depth maps, audio, older unconditional models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKL,
    ControlNetXSAdapter,
    DDIMScheduler,
    DDPMScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    UNet1DModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from PIL import Image

from . import unet_condition as unets
from . import unet_unconditional as plain
from .base import HEIGHT, build
from .pipeline_base import PIXELS, Call, TinyPipeline, vae
from .pixel_pipelines import latent_autoencoder, unconditional, with_unet
from .sd_pipelines import Components, controlled, ddim, entry, sd, size, small, unet
from .sdxl_pipelines import sdxl
from .text import image_encoder, image_processor


def unguided(
    class_name: str, components: Callable[[], Components], arguments: Callable[[Call], dict[str, Any]]
) -> TinyPipeline:
    """Returns the entry of a pipeline that knows no guidance."""
    return entry(class_name, components, arguments, ignores=("guidance",))


def picture(call: Call) -> Image.Image:
    """Returns a random picture."""
    return Image.fromarray((255 * call.draw(PIXELS, PIXELS, 3).sigmoid()).byte().numpy())


# -- layouts and other ways to steer -----------------------------------------------------------------------------------


def _gligen_call(call: Call) -> dict[str, Any]:
    boxes = {"gligen_phrases": call.words()[0].split(), "gligen_boxes": [[0.1, 0.1, 0.5, 0.5], [0.4, 0.5, 0.9, 0.9]]}
    return size(call) | boxes | {"gligen_scheduled_sampling_beta": 0.5}


def _panorama_call(call: Call) -> dict[str, Any]:
    return call.text() | {"height": PIXELS, "width": 2 * PIXELS, "view_batch_size": 2}


def _semantic_call(call: Call) -> dict[str, Any]:
    return size(call) | {"editing_prompt": call.words()[:1], "edit_warmup_steps": 2, "edit_guidance_scale": 4.0}


def _attend_call(call: Call) -> dict[str, Any]:
    steered = {"token_indices": [1, 2], "attn_res": (HEIGHT, HEIGHT), "max_iter_to_alter": 2, "thresholds": {}}
    return size(call) | steered


def _cycle_call(call: Call) -> dict[str, Any]:
    own = {"source_prompt": call.words(), "source_guidance_scale": 1.0, "image": call.image(), "strength": 0.7}
    return {name: value for name, value in (call.text() | own).items() if name != "negative_prompt"}


def _variation() -> Components:
    parts = {"image_encoder": image_encoder(), "feature_extractor": image_processor()}
    return {"unet": unet(unets.SMALL_SD), "vae": vae(), "scheduler": ddim()} | parts


def _variation_call(call: Call) -> dict[str, Any]:
    pictures = [picture(call) for _ in range(call.batch)]
    return {"image": pictures, "height": PIXELS, "width": PIXELS} | call.scale(7.5)


def _with_depth() -> AutoencoderKL:
    return vae(in_channels=6, out_channels=6)


def _unclip() -> Components:
    width = unets.POOLED
    return sd(
        unet(unets.UNCLIP),
        image_encoder=image_encoder(width),
        feature_extractor=image_processor(),
        image_normalizer=build(StableUnCLIPImageNormalizer, {"embedding_dim": width}),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )


def _unclip_call(call: Call) -> dict[str, Any]:
    return size(call) | {"image_embeds": call.embeds(unets.POOLED), "noise_level": 10}


def _marigold(kind: str, images: int = 1, **config: Any) -> TinyPipeline:
    """Returns the entry of a pipeline that denoises so many images of what it sees in one."""
    channels = {"in_channels": 4 + 4 * images, "out_channels": 4 * images}
    return unguided(
        f"Marigold{kind}Pipeline",
        lambda: sd(unet(unets.SMALL_SD, **channels), prediction_type=kind.lower(), **config),
        _marigold_call,
    )


def _marigold_call(call: Call) -> dict[str, Any]:
    own = {"processing_resolution": 0, "match_input_resolution": False, "output_type": "np"}
    return {"image": call.image(), "batch_size": call.batch} | own


def _control_xs(base: dict[str, Any]) -> ControlNetXSAdapter:
    config = {
        "block_out_channels": (4, 8, 8),
        "base_block_out_channels": base["block_out_channels"],
        "down_block_types": base["down_block_types"],
        "cross_attention_dim": base["cross_attention_dim"],
        "transformer_layers_per_block": base.get("transformer_layers_per_block", 1),
        "use_linear_projection": base.get("use_linear_projection", False),
        "conditioning_embedding_out_channels": (4, 4, 8, 8),
        "num_attention_heads": 2,
        "max_norm_num_groups": 4,
        "sample_size": HEIGHT,
    }
    return build(ControlNetXSAdapter, config)


# -- audio -------------------------------------------------------------------------------------------------------------


def _audio() -> Components:
    model = build(UNet1DModel, plain.AUDIO | {"sample_size": 64, "sample_rate": 16})
    return {"unet": model, "scheduler": IPNDMScheduler()}


def _audio_call(call: Call) -> dict[str, Any]:
    return {"batch_size": call.batch, "audio_length_in_s": 4.0}


# -- older unconditional models ----------------------------------------------------------------------------------------


def _repaint_call(call: Call) -> dict[str, Any]:
    images = {"image": 2 * call.image(HEIGHT) - 1, "mask_image": call.mask(HEIGHT)}
    return images | {"output_type": "np", "jump_length": 2, "jump_n_sample": 2}


GATED = {"attention_type": "gated"}
ONE = ("batch",)
ENTRIES = [
    entry("StableDiffusionGLIGENPipeline", lambda: sd(unet(unets.SMALL_SD, **GATED)), _gligen_call, ignores=ONE),
    entry("StableDiffusionPanoramaPipeline", small(), _panorama_call),
    entry("StableDiffusionSAGPipeline", small(), size),
    entry("StableDiffusionAttendAndExcitePipeline", small(), _attend_call, ignores=ONE),
    entry("SemanticStableDiffusionPipeline", small(), _semantic_call),
    entry("StableDiffusionLDM3DPipeline", small(vae=_with_depth), lambda call: size(call) | {"output_type": "np"}),
    entry("StableDiffusionModelEditingPipeline", small(), size),
    entry("CycleDiffusionPipeline", small(), _cycle_call),
    entry("StableDiffusionImageVariationPipeline", _variation, _variation_call),
    entry("StableUnCLIPImg2ImgPipeline", _unclip, _unclip_call),
    entry("StableDiffusionControlNetXSPipeline", small(controlnet=lambda: _control_xs(unets.SMALL_SD)), controlled),
    entry("StableDiffusionXLControlNetXSPipeline", lambda: sdxl(controlnet=_control_xs(unets.SDXL)), controlled),
    _marigold("Depth"),
    _marigold("Normals"),
    _marigold("Intrinsics", images=2, target_properties={"target_names": ["albedo", "material"]}),
    unguided("DanceDiffusionPipeline", _audio, _audio_call),
    unguided("PNDMPipeline", with_unet(plain.DDPM, PNDMScheduler), unconditional),
    unguided("ScoreSdeVePipeline", with_unet(plain.SCORE, ScoreSdeVeScheduler), unconditional),
    unguided("RePaintPipeline", with_unet(plain.DDPM, RePaintScheduler), _repaint_call),
    unguided("LDMPipeline", with_unet(plain.DDPM, DDIMScheduler, vqvae=latent_autoencoder), unconditional),
]
