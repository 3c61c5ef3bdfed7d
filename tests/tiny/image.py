"""Tiny image transformers whose backbone is one block list."""

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


def _dit(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, HEIGHT, HEIGHT),
        "timestep": steps(batch),
        "class_labels": draw.ints(10, batch),
    }


def _vector_quantised(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw.ints(8, batch, TOKENS),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
    }


def text_conditional(draw: Draw, batch: int, channels: int = 4, timestep: float = 500.0) -> dict[str, Any]:
    """Returns a latent of 4x4 patches, its timestep and the text states."""
    return {
        "hidden_states": draw(batch, channels, HEIGHT, HEIGHT),
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
    }


def _hunyuan_dit(draw: Draw, batch: int) -> dict[str, Any]:
    angles = draw(TOKENS, 16)
    return text_conditional(draw, batch) | {
        "text_embedding_mask": torch.ones(batch, TEXT_TOKENS),
        "encoder_hidden_states_t5": draw(batch, 8, 24),
        "text_embedding_mask_t5": torch.ones(batch, 8),
        "image_meta_size": torch.tensor([64.0, 64, 64, 64, 0, 0]).repeat(batch, 1),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _lumina(draw: Draw, batch: int) -> dict[str, Any]:
    angles = draw(HEIGHT, HEIGHT, 8)
    return text_conditional(draw, batch, timestep=0.5) | {
        "encoder_mask": torch.ones(batch, TEXT_TOKENS),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _lumina2(draw: Draw, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool)
    return text_conditional(draw, batch, timestep=0.5) | {"encoder_attention_mask": mask}


def _cogview(draw: Draw, batch: int) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64.0]]).repeat(batch, 1)
    return text_conditional(draw, batch) | {
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
    }


def _glm_image(draw: Draw, batch: int) -> dict[str, Any]:
    return text_conditional(draw, batch) | {
        "prior_token_id": draw.ints(32, batch, TOKENS),
        "prior_token_drop": torch.zeros(batch, TOKENS, dtype=torch.bool),
        "target_size": torch.tensor([[64.0, 64.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


def _bria_fibo2(draw: Draw, batch: int) -> dict[str, Any]:
    layers = draw(batch, 3, TEXT_TOKENS, TEXT_DIM)
    return text_conditional(draw, batch, timestep=0.5) | {"encoder_hidden_states": layers}


def _ernie_image(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, HEIGHT, HEIGHT),
        "timestep": steps(batch),
        "text_bth": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "text_lens": torch.full((batch,), TEXT_TOKENS),
    }


def _ideogram4(draw: Draw, batch: int) -> dict[str, Any]:
    text, image, length = 3, 2, TEXT_TOKENS + TOKENS
    indicator = torch.tensor([text] * TEXT_TOKENS + [image] * TOKENS)
    return {
        "hidden_states": draw(batch, length, 16),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, length, TEXT_DIM),
        "position_ids": torch.arange(length)[None, :, None].repeat(batch, 1, 3),
        "segment_ids": torch.zeros(batch, length, dtype=torch.long),
        "indicator": indicator.repeat(batch, 1),
    }


def _krea2(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, TOKENS, 16),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, 2, TEXT_DIM),
        "position_ids": torch.cat([torch.zeros(TEXT_TOKENS, 3), grid_ids(4, 4)]),
    }


def _omnigen(draw: Draw, batch: int) -> dict[str, Any]:
    length = TEXT_TOKENS + 1 + TOKENS
    return {
        "hidden_states": draw(batch, 4, HEIGHT, HEIGHT),
        "timestep": steps(batch, 0.5),
        "input_ids": draw.ints(32, batch, TEXT_TOKENS),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(batch, length, length),
        "position_ids": torch.arange(length).repeat(batch, 1),
    }


def _nucleus(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, TOKENS, 16),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "img_shapes": [(1, 4, 4)] * batch,
    }


def _qwen_image21(draw: Draw, batch: int) -> dict[str, Any]:
    slots = TOKENS // 4
    return {
        "hidden_states": draw(batch, TOKENS, 16),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "img_shapes": [[(1, 4, 4)]] * batch,
        "img_mask": torch.tensor([False] * TEXT_TOKENS + [True] * slots).repeat(batch, 1),
    }


def _z_image(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "x": [draw(4, 1, HEIGHT, HEIGHT) for _ in range(batch)],
        "t": steps(batch, 0.5),
        "cap_feats": [draw(TEXT_TOKENS, TEXT_DIM) for _ in range(batch)],
    }


PIXART = HEADS | {
    "num_layers": 4,
    "sample_size": HEIGHT,
    "cross_attention_dim": 32,
    "caption_channels": TEXT_DIM,
}
SANA = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": TEXT_DIM,
    "sample_size": HEIGHT,
    "patch_size": 2,
}
_COGVIEW = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "text_embed_dim": TEXT_DIM,
    "time_embed_dim": 16,
    "condition_dim": 4,
}
_LUMINA = {
    "sample_size": HEIGHT,
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 16,
}
LUMINA2 = _LUMINA | {
    "num_layers": 4,
    "num_refiner_layers": 1,
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (32, 16, 16),
    "cap_feat_dim": TEXT_DIM,
}
HUNYUAN_DIT = HEADS | {
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": HEIGHT,
    "hidden_size": 32,
    "num_layers": 6,
    "cross_attention_dim": TEXT_DIM,
    "cross_attention_dim_t5": 24,
    "pooled_projection_dim": 24,
    "text_len": TEXT_TOKENS,
    "text_len_t5": 8,
}
DIT = HEADS | {
    "num_layers": 4,
    "sample_size": HEIGHT,
    "num_embeds_ada_norm": 1000,
    "out_channels": 8,
}

ENTRIES = [
    entry(
        "DiTTransformer2DModel",
        DIT,
        _dit,
        note="the final layer reads transformer_blocks[0].norm1.emb",
    ),
    entry("PixArtTransformer2DModel", PIXART, text_conditional),
    entry("SanaTransformer2DModel", SANA, text_conditional),
    entry(
        "Transformer2DModel",
        HEADS
        | {
            "num_layers": 3,
            "norm_type": "ada_norm",
            "num_embeds_ada_norm": 1000,
            "num_vector_embeds": 9,
            "sample_size": 4,
            "cross_attention_dim": TEXT_DIM,
        },
        _vector_quantised,
        note="the discrete variant, a denoiser by itself; the continuous one is a part of a UNet",
    ),
    entry(
        "HunyuanDiT2DModel",
        HUNYUAN_DIT,
        _hunyuan_dit,
        ("blocks",),
        note="long skips from the first half into the second",
    ),
    entry(
        "LuminaNextDiT2DModel",
        _LUMINA | {"num_layers": 3, "cross_attention_dim": TEXT_DIM},
        _lumina,
        ("layers",),
    ),
    entry(
        "Lumina2Transformer2DModel",
        LUMINA2,
        _lumina2,
        ("layers",),
        note="context_refiner and noise_refiner run before the backbone",
    ),
    entry(
        "CogView3PlusTransformer2DModel",
        _COGVIEW | {"pos_embed_max_size": 8, "sample_size": HEIGHT},
        _cogview,
    ),
    entry(
        "CogView4Transformer2DModel",
        _COGVIEW | {"rope_axes_dim": (8, 8), "sample_size": HEIGHT},
        _cogview,
    ),
    entry(
        "GlmImageTransformer2DModel",
        _COGVIEW | {"prior_vq_quantizer_codebook_size": 32},
        _glm_image,
    ),
    entry(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 4,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": TEXT_DIM,
            "injection_layer_ids": (1, 3),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 8,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 16, 16),
        },
        _bria_fibo2,
        ("layers",),
    ),
    entry(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "text_in_dim": TEXT_DIM,
            "rope_axes_dim": (4, 6, 6),
        },
        _ernie_image,
        ("layers",),
        note="hidden states are (tokens, batch, channels)",
    ),
    entry(
        "Ideogram4Transformer2DModel",
        HEADS
        | {
            "in_channels": 16,
            "num_layers": 3,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": TEXT_DIM,
            "mrope_section": (4, 2, 2),
        },
        _ideogram4,
        ("layers",),
    ),
    entry(
        "Krea2Transformer2DModel",
        HEADS
        | {
            "in_channels": 16,
            "num_layers": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": TEXT_DIM,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        _krea2,
    ),
    entry(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 32,
            "pos_embed_max_size": 16,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        _omnigen,
        ("layers",),
        note="one stream of text, timestep and image tokens",
    ),
    entry(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": TEXT_DIM,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 3,
            "axes_dim": [8, 8],
        },
        lambda draw, batch: text_conditional(draw, batch, timestep=0.5),
        ("blocks",),
    ),
    entry(
        "NucleusMoEImageTransformer2DModel",
        HEADS
        | {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "num_key_value_heads": 1,
            "joint_attention_dim": TEXT_DIM,
            "axes_dims_rope": (4, 6, 6),
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        },
        _nucleus,
        note="expert choice: which tokens an expert takes depends on the whole batch item",
    ),
    entry(
        "QwenImage21Transformer2DModel",
        HEADS
        | {
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 3,
            "context_in_dim": TEXT_DIM,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen_image21,
        note="one stream; the output holds text positions as well",
    ),
    entry(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": TEXT_DIM,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 16, 16],
        },
        _z_image,
        ("layers",),
        timestep="t",
        note="inputs and outputs are lists of items; each stream is padded to a multiple of 32 tokens",
    ),
]
