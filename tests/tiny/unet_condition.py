"""Tiny UNets that are conditioned on text, images, layouts or sound."""

from __future__ import annotations

from typing import Any

import torch

from .base import HEIGHT, TEXT_DIM, TEXT_TOKENS, Draw, entry, steps
from .unet_unconditional import LEVELS

IMAGE_DIM = 12
"""Width of an image embedding."""
POOLED = 16
"""Width of a pooled prompt."""


def text(draw: Draw, batch: int, channels: int = 4, width: int = TEXT_DIM) -> dict[str, Any]:
    """Returns a latent, its timestep and the text states."""
    return {
        "sample": draw(batch, channels, HEIGHT, HEIGHT),
        "timestep": steps(batch),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, width),
    }


def _masked(draw: Draw, batch: int) -> dict[str, Any]:
    return text(draw, batch) | {"encoder_attention_mask": torch.ones(batch, TEXT_TOKENS)}


def _sdxl(draw: Draw, batch: int) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(batch, 1)
    return text(draw, batch, width=2 * TEXT_DIM) | {
        "added_cond_kwargs": {"text_embeds": draw(batch, POOLED), "time_ids": size}
    }


def _image(draw: Draw, batch: int) -> dict[str, Any]:
    inputs = text(draw, batch) | {"added_cond_kwargs": {"image_embeds": draw(batch, IMAGE_DIM)}}
    return inputs | {"encoder_hidden_states": None}


def _image_hint(draw: Draw, batch: int) -> dict[str, Any]:
    inputs = _image(draw, batch)
    inputs["added_cond_kwargs"]["hint"] = draw(batch, 3, 8 * HEIGHT, 8 * HEIGHT)
    return inputs


def _text_image(draw: Draw, batch: int) -> dict[str, Any]:
    added = {"text_embeds": draw(batch, IMAGE_DIM), "image_embeds": draw(batch, IMAGE_DIM)}
    return text(draw, batch) | {"added_cond_kwargs": added}


def _upscaler(draw: Draw, batch: int) -> dict[str, Any]:
    inputs = text(draw, batch, width=32) | {"sample": draw(batch, 8, 2 * HEIGHT, 2 * HEIGHT)}
    return inputs | {"timestep": steps(batch, 1.0), "timestep_cond": draw(batch, 32)}


def _gligen(draw: Draw, batch: int) -> dict[str, Any]:
    boxes = {
        "boxes": draw(batch, 3, 4).sigmoid(),
        "positive_embeddings": draw(batch, 3, TEXT_DIM),
        "masks": torch.tensor([1.0, 1.0, 0.0]).repeat(batch, 1),
    }
    return text(draw, batch) | {"cross_attention_kwargs": {"gligen": boxes}}


def _audioldm2(draw: Draw, batch: int) -> dict[str, Any]:
    second = {"encoder_hidden_states_1": draw(batch, 3, 24), "encoder_attention_mask_1": torch.ones(batch, 3)}
    return text(draw, batch) | second


def _cascade(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "sample": draw(batch, 4, HEIGHT, HEIGHT),
        "timestep_ratio": steps(batch, 0.5),
        "clip_text_pooled": draw(batch, 1, POOLED),
    }


def _cascade_prior(draw: Draw, batch: int) -> dict[str, Any]:
    conditioning = {"clip_text": draw(batch, TEXT_TOKENS, TEXT_DIM), "clip_img": draw(batch, 1, IMAGE_DIM)}
    return _cascade(draw, batch) | conditioning


def _cascade_decoder(draw: Draw, batch: int) -> dict[str, Any]:
    return _cascade(draw, batch) | {"effnet": draw(batch, 4, 4, 4)}


_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}
_UNET = {
    "sample_size": HEIGHT,
    "block_out_channels": (8, 16, 16),
    "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _DOWN),
    "up_block_types": (_UP, _CROSS_UP, _CROSS_UP),
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_DIM,
    "attention_head_dim": 2,
}
SD = _UNET | {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
    "up_block_types": (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
}
SMALL_SD = _UNET
"""Stable Diffusion with three levels instead of four."""
SDXL = _UNET | {
    "down_block_types": (_DOWN, _CROSS_DOWN, _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, _CROSS_UP, _UP),
    "cross_attention_dim": 2 * TEXT_DIM,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}
SDXL_REFINER = SDXL | {"projection_class_embeddings_input_dim": 5 * 8 + POOLED}
IF = (
    _UNET
    | _SIMPLE
    | {
        "in_channels": 3,
        "out_channels": 6,
        "cross_attention_dim": 32,  # its norm has 32 groups
        "encoder_hid_dim": TEXT_DIM,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "act_fn": "gelu",
        "attention_head_dim": 4,
        "cross_attention_norm": "group_norm",
        "class_embed_type": None,
        "resnet_skip_time_act": True,
        "time_embedding_act_fn": "gelu",
    }
)
IF_UPSCALE = IF | {"in_channels": 6, "class_embed_type": "timestep", "resnet_out_scale_factor": 1.41421356}
KANDINSKY = (
    _UNET
    | _SIMPLE
    | {
        "out_channels": 8,
        "addition_embed_type": "image",
        "encoder_hid_dim": IMAGE_DIM,
        "encoder_hid_dim_type": "image_proj",
        "attention_head_dim": 4,
    }
)
KANDINSKY_HINT = KANDINSKY | {"in_channels": 8, "addition_embed_type": "image_hint"}
KANDINSKY_TEXT = KANDINSKY | {
    "addition_embed_type": "text_image",
    "addition_embed_type_num_heads": 2,
    "encoder_hid_dim": TEXT_DIM,
    "encoder_hid_dim_type": "text_image_proj",
    "cross_attention_dim": IMAGE_DIM,
}
UPSCALER = _UNET | {
    "block_out_channels": (32, 32, 64, 64),  # these blocks normalise in groups of 32 channels
    "in_channels": 8,
    "out_channels": 5,
    "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    "mid_block_type": None,
    "act_fn": "gelu",
    "norm_num_groups": None,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "time_cond_proj_dim": 32,
    "only_cross_attention": False,
}
X4 = _UNET | {
    "in_channels": 7,
    "num_class_embeds": 1000,
    "down_block_types": (_DOWN, _CROSS_DOWN, _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, _CROSS_UP, _UP),
    "only_cross_attention": (True, True, False),
}
UNCLIP = _UNET | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * POOLED}
AUDIO = _UNET | {
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": POOLED,
    "class_embeddings_concat": True,
    "cross_attention_dim": (8, 16, 16),
}
AUDIO_DOWN = {"down_block_types": (_DOWN, "AttnDownBlock2D", "AttnDownBlock2D")}
AUDIO_UP = {"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", _UP)}
AUDIOLDM2 = _UNET | {"cross_attention_dim": ([None, TEXT_DIM, 24],) * 3}
LCM = _UNET | {"time_cond_proj_dim": 32}
DREAMLITE = {
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_DIM,
    "attention_head_dim": (2, 2, 2),
    "ff_mult": 2,
}
KANDINSKY3 = {
    "time_embedding_dim": 16,
    "groups": 2,
    "attention_head_dim": 8,
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 16, 16),
    "cross_attention_dim": 16,
    "encoder_hid_dim": TEXT_DIM,
}
_CASCADE = {
    "in_channels": 4,
    "out_channels": 4,
    "timestep_ratio_embedding_dim": 8,
    "conditioning_dim": 16,
    "block_out_channels": (16, 16, 16),
    "num_attention_heads": (2, 2, 2),
    "down_num_layers_per_block": (2, 2, 2),
    "up_num_layers_per_block": (2, 2, 2),
    "down_blocks_repeat_mappers": (1, 1, 1),
    "up_blocks_repeat_mappers": (1, 1, 1),
    "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 3,
    "clip_text_pooled_in_channels": POOLED,
    "dropout": (0.1, 0.1, 0.1),
}
CASCADE_PRIOR = _CASCADE | {
    "clip_text_in_channels": TEXT_DIM,
    "clip_image_in_channels": IMAGE_DIM,
    "switch_level": (False, True),
}
CASCADE_DECODER = _CASCADE | {
    "up_blocks_repeat_mappers": (1, 2, 1),
    "effnet_in_channels": 4,
    "patch_size": 2,
    "timestep_conditioning_type": ("sca",),
}

ENTRIES = [
    entry("UNet2DConditionModel", SD, text, LEVELS, variant="SD"),
    entry("UNet2DConditionModel", SDXL, _sdxl, LEVELS, variant="SDXL"),
    entry(
        "UNet2DConditionModel",
        IF,
        lambda draw, batch: text(draw, batch, channels=3),
        LEVELS,
        variant="IF",
    ),
    entry(
        "UNet2DConditionModel",
        IF_UPSCALE,
        lambda draw, batch: text(draw, batch, channels=6) | {"class_labels": steps(batch, 100.0)},
        LEVELS,
        variant="IF upscaling",
    ),
    entry("UNet2DConditionModel", KANDINSKY, _image, LEVELS, variant="Kandinsky 2.2"),
    entry("UNet2DConditionModel", KANDINSKY_HINT, _image_hint, LEVELS, variant="Kandinsky 2.2 with a hint"),
    entry("UNet2DConditionModel", KANDINSKY_TEXT, _text_image, LEVELS, variant="Kandinsky 2.1"),
    entry("UNet2DConditionModel", UPSCALER, _upscaler, LEVELS, variant="latent upscaler"),
    entry(
        "UNet2DConditionModel",
        X4,
        lambda draw, batch: text(draw, batch, channels=7) | {"class_labels": draw.ints(1000, batch)},
        LEVELS,
        variant="noise level classes",
    ),
    entry(
        "UNet2DConditionModel",
        UNCLIP,
        lambda draw, batch: text(draw, batch) | {"class_labels": draw(batch, 2 * POOLED)},
        LEVELS,
        variant="class projection",
    ),
    entry(
        "UNet2DConditionModel",
        AUDIO,
        lambda draw, batch: text(draw, batch) | {"class_labels": draw(batch, POOLED), "encoder_hidden_states": None},
        LEVELS,
        variant="no cross-attention states",
    ),
    entry(
        "UNet2DConditionModel",
        _UNET | AUDIO_DOWN | AUDIO_UP | {"mid_block_type": "UNetMidBlock2D"},
        text,
        LEVELS,
        variant="self-attention",
    ),
    entry(
        "UNet2DConditionModel",
        LCM,
        lambda draw, batch: text(draw, batch) | {"timestep_cond": draw(batch, 32)},
        LEVELS,
        variant="guidance embedding",
    ),
    entry("UNet2DConditionModel", _UNET | {"attention_type": "gated"}, _gligen, LEVELS, variant="GLIGEN"),
    entry("UNet2DConditionModel", _UNET | {"mid_block_type": None}, text, LEVELS, variant="no mid block"),
    entry("AudioLDM2UNet2DConditionModel", AUDIOLDM2, _audioldm2, LEVELS),
    entry("DreamLiteUNetModel", DREAMLITE, text, LEVELS),
    entry("Kandinsky3UNet", KANDINSKY3, _masked, LEVELS),
    entry("StableCascadeUNet", CASCADE_PRIOR, _cascade_prior, LEVELS, variant="prior", timestep="timestep_ratio"),
    entry("StableCascadeUNet", CASCADE_DECODER, _cascade_decoder, LEVELS, variant="decoder", timestep="timestep_ratio"),
]
