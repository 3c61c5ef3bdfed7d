"""Tiny image transformers with a text stream beside the image stream, and those that join the two half-way."""

from __future__ import annotations

from typing import Any

import torch

from .base import (
    HEADS,
    HEIGHT,
    TEXT_DIM,
    TEXT_TOKENS,
    TOKENS,
    Draw,
    entry,
    grid_ids,
    steps,
)
from .image import text_conditional

DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")
JOINED = "the streams are concatenated between the two lists"


def _sd3(draw: Draw, batch: int) -> dict[str, Any]:
    return text_conditional(draw, batch) | {"pooled_projections": draw(batch, 24)}


def _packed(draw: Draw, batch: int, id_columns: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, TOKENS, 16),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "img_ids": grid_ids(4, 4, id_columns),
        "txt_ids": torch.zeros(TEXT_TOKENS, id_columns),
    }


def _flux(draw: Draw, batch: int) -> dict[str, Any]:
    return _packed(draw, batch) | {
        "pooled_projections": draw(batch, 24),
        "guidance": steps(batch, 3.5),
    }


def _flux2(draw: Draw, batch: int) -> dict[str, Any]:
    return _packed(draw, batch, id_columns=4) | {"guidance": steps(batch, 3.5)}


def _chroma(draw: Draw, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT_TOKENS + TOKENS, dtype=torch.bool)
    return _packed(draw, batch) | {"attention_mask": mask}


def _bria_fibo(draw: Draw, batch: int) -> dict[str, Any]:
    layers = [draw(batch, TEXT_TOKENS, TEXT_DIM) for _ in range(6)]
    return _packed(draw, batch) | {"text_encoder_layers": layers}


def _hidream(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, HEIGHT, HEIGHT),
        "timesteps": steps(batch),
        "encoder_hidden_states_t5": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "encoder_hidden_states_llama3": draw(6, batch, TEXT_TOKENS, TEXT_DIM),
        "pooled_embeds": draw(batch, 24),
    }


def _hunyuan_image(draw: Draw, batch: int) -> dict[str, Any]:
    return text_conditional(draw, batch) | {"encoder_attention_mask": torch.ones(batch, TEXT_TOKENS)}


def _qwen_image(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, TOKENS, 16),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.long),
        "img_shapes": [[(1, 4, 4)]] * batch,
    }


SD3 = HEADS | {
    "sample_size": HEIGHT,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "joint_attention_dim": TEXT_DIM,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
_DOUBLE_SINGLE = HEADS | {
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 3,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
}
FLUX = _DOUBLE_SINGLE | {"pooled_projection_dim": 24, "guidance_embeds": True}
AURA_FLOW = HEADS | {
    "sample_size": HEIGHT,
    "num_mmdit_layers": 3,
    "num_single_dit_layers": 3,
    "joint_attention_dim": TEXT_DIM,
    "caption_projection_dim": 32,
    "pos_embed_max_size": 16,
}
QWEN_IMAGE = HEADS | {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
}

ENTRIES = [
    entry(
        "SD3Transformer2DModel",
        SD3,
        _sd3,
        note="the last block returns None for the text stream",
    ),
    entry("FluxTransformer2DModel", FLUX, _flux, DOUBLE_SINGLE),
    entry(
        "Flux2Transformer2DModel",
        _DOUBLE_SINGLE | {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        _flux2,
        DOUBLE_SINGLE,
        note=JOINED,
    ),
    entry(
        "Flux3Transformer2DModel",
        _DOUBLE_SINGLE
        | {
            "cond_in_channels": 16,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda draw, batch: _packed(draw, batch, id_columns=4),
        ("txt_mode_blocks", "mode_blocks.image", "single_transformer_blocks"),
        note="the first two lists run on different streams and do not feed each other",
    ),
    entry(
        "AuraFlowTransformer2DModel",
        AURA_FLOW,
        lambda draw, batch: text_conditional(draw, batch, timestep=0.5),
        ("joint_transformer_blocks", "single_transformer_blocks"),
        note=JOINED,
    ),
    entry(
        "ChromaTransformer2DModel",
        _DOUBLE_SINGLE
        | {
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        _chroma,
        DOUBLE_SINGLE,
        note=JOINED,
    ),
    entry("BriaTransformer2DModel", _DOUBLE_SINGLE, _packed, DOUBLE_SINGLE),
    entry(
        "BriaFiboTransformer2DModel",
        _DOUBLE_SINGLE | {"text_encoder_dim": TEXT_DIM},
        _bria_fibo,
        DOUBLE_SINGLE,
        note="half of the text channels is replaced before every block; single blocks get a fresh concatenation",
    ),
    entry("LongCatImageTransformer2DModel", _DOUBLE_SINGLE, _packed, DOUBLE_SINGLE),
    entry(
        "OvisImageTransformer2DModel",
        _DOUBLE_SINGLE | {"out_channels": 16},
        _packed,
        DOUBLE_SINGLE,
    ),
    entry(
        "HiDreamImageTransformer2DModel",
        HEADS
        | {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "num_single_layers": 3,
            "caption_channels": [TEXT_DIM, TEXT_DIM],
            "text_emb_dim": 24,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (HEIGHT, HEIGHT),
            "llama_layers": [0, 1, 2, 3, 4, 5],
            "force_inference_output": True,
        },
        _hidream,
        ("double_stream_blocks", "single_stream_blocks"),
        timestep="timesteps",
        note="a text layer is appended before every block and cut off after it",
    ),
    entry(
        "HunyuanImageTransformer2DModel",
        HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_single_layers": 3,
            "num_refiner_layers": 1,
            "patch_size": (2, 2),
            "text_embed_dim": TEXT_DIM,
            "rope_axes_dim": (8, 8),
        },
        _hunyuan_image,
        DOUBLE_SINGLE,
    ),
    entry("QwenImageTransformer2DModel", QWEN_IMAGE, _qwen_image),
]
