"""Tiny text- and class-conditional image transformers."""

from __future__ import annotations

from typing import Any

import torch

from .base import Draw, entry

LATENT = 8
"""Latent height and width: 4x4 tokens at patch size 2."""
TEXT_TOKENS = 6


def steps(batch: int, value: float = 500.0) -> torch.Tensor:
    """Returns one timestep per item, of shape `(batch,)`."""
    return torch.full((batch,), value)


def grid_ids(height: int, width: int, columns: int = 3) -> torch.Tensor:
    """Returns position ids of shape `(height * width, columns)`; the last two columns count rows and columns."""
    ids = torch.zeros(height, width, columns)
    ids[..., -2] += torch.arange(height)[:, None]
    ids[..., -1] += torch.arange(width)[None, :]
    return ids.flatten(0, 1)


def _dit(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, LATENT, LATENT),
        "timestep": steps(batch),
        "class_labels": draw.ints(10, batch),
    }


def _text(draw: Draw, batch: int, channels: int = 4, dim: int = 16) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, channels, LATENT, LATENT),
        "timestep": steps(batch),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, dim),
    }


def _sd3(draw: Draw, batch: int) -> dict[str, Any]:
    return _text(draw, batch) | {"pooled_projections": draw(batch, 24)}


def _packed(draw: Draw, batch: int, channels: int, id_columns: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 16, channels),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, 16),
        "img_ids": grid_ids(4, 4, id_columns),
        "txt_ids": torch.zeros(TEXT_TOKENS, id_columns),
    }


def _flux(draw: Draw, batch: int) -> dict[str, Any]:
    return _packed(draw, batch, 16) | {"pooled_projections": draw(batch, 24), "guidance": steps(batch, 3.5)}


def _flux2(draw: Draw, batch: int) -> dict[str, Any]:
    return _packed(draw, batch, 16, id_columns=4) | {"guidance": steps(batch, 3.5)}


def _rotary(draw: Draw, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = draw(16, dim)
    return angles.cos(), angles.sin()


def _hunyuan_dit(draw: Draw, batch: int) -> dict[str, Any]:
    return _text(draw, batch) | {
        "text_embedding_mask": torch.ones(batch, TEXT_TOKENS),
        "encoder_hidden_states_t5": draw(batch, 8, 24),
        "text_embedding_mask_t5": torch.ones(batch, 8),
        "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]]).repeat(batch, 1).float(),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": _rotary(draw, 16),
    }


def _lumina(draw: Draw, batch: int) -> dict[str, Any]:
    frequencies = torch.polar(torch.ones(384, 384, 4), draw(384, 384, 4))
    return _text(draw, batch) | {
        "timestep": steps(batch, 0.5),
        "encoder_mask": torch.ones(batch, TEXT_TOKENS),
        "image_rotary_emb": frequencies,
        "cross_attention_kwargs": {},
    }


def _lumina2(draw: Draw, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool)
    return _text(draw, batch) | {"timestep": steps(batch, 0.5), "encoder_attention_mask": mask}


ENTRIES = [
    entry(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 4,
            "sample_size": LATENT,
            "num_embeds_ada_norm": 1000,
            "out_channels": 8,
        },
        _dit,
        note="the final layer reads transformer_blocks[0].norm1.emb",
    ),
    entry(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 4,
            "sample_size": LATENT,
            "cross_attention_dim": 32,
            "caption_channels": 16,
        },
        _text,
    ),
    entry(
        "SD3Transformer2DModel",
        {
            "sample_size": LATENT,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 24,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        _sd3,
        note="the last block returns None for the encoder stream",
    ),
    entry(
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 3,
            "num_single_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 24,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        _flux,
        ("transformer_blocks", "single_transformer_blocks"),
    ),
    entry(
        "Flux2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 3,
            "num_single_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux2,
        ("transformer_blocks", "single_transformer_blocks"),
        note="the streams are concatenated between the two lists",
    ),
    entry(
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": LATENT,
            "hidden_size": 32,
            "num_layers": 6,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 24,
            "text_len": TEXT_TOKENS,
            "text_len_t5": 8,
        },
        _hunyuan_dit,
        ("blocks",),
        note="long skips from the first half into the second",
    ),
    entry(
        "LuminaNextDiT2DModel",
        {
            "sample_size": LATENT,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 16,
        },
        _lumina,
        ("layers",),
    ),
    entry(
        "Lumina2Transformer2DModel",
        {
            "sample_size": LATENT,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 4,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 16,
        },
        _lumina2,
        ("layers",),
        note="context_refiner and noise_refiner run before the backbone",
    ),
    entry(
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": LATENT,
            "patch_size": 2,
        },
        _text,
    ),
    entry(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": LATENT,
            "num_mmdit_layers": 3,
            "num_single_dit_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        lambda draw, batch: _text(draw, batch) | {"timestep": steps(batch, 0.5)},
        ("joint_transformer_blocks", "single_transformer_blocks"),
        note="the streams are concatenated between the two lists",
    ),
]
