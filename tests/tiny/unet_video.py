"""Tiny UNets for video."""

from __future__ import annotations

from typing import Any

import torch

from .base import HEIGHT, TEXT_DIM, TEXT_TOKENS, Draw, entry, steps
from .unet_unconditional import LEVELS

FRAMES = 2


def video(draw: Draw, batch: int, channels: int = 4) -> dict[str, Any]:
    """Returns a latent video with frames after channels, its timestep and the text states."""
    return {
        "sample": draw(batch, channels, FRAMES, HEIGHT, HEIGHT),
        "timestep": steps(batch),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
    }


def _motion(draw: Draw, batch: int) -> dict[str, Any]:
    inputs = video(draw, batch)
    return inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].repeat_interleave(FRAMES, 0)}


def _spatio_temporal(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "sample": draw(batch, FRAMES, 8, HEIGHT, HEIGHT),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, 1, TEXT_DIM),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1),
    }


def _i2vgen(draw: Draw, batch: int) -> dict[str, Any]:
    return video(draw, batch) | {
        "fps": torch.full((batch,), 16),
        "image_latents": draw(batch, 4, FRAMES, HEIGHT, HEIGHT),
        "image_embeddings": draw(batch, 1, TEXT_DIM),
    }


_UNET = {
    "sample_size": HEIGHT,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_DIM,
}
MOTION = _UNET | {
    "down_block_types": ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 8,
}
THREE_D = _UNET | {
    "block_out_channels": (32, 32, 32),  # its temporal convolutions normalise in groups of 32 channels
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
    "attention_head_dim": 8,
}
SVD = {
    "sample_size": HEIGHT,
    "block_out_channels": (32, 64, 64),  # in 32 groups of one channel the timestep would be normalised away
    "down_block_types": (
        "CrossAttnDownBlockSpatioTemporal",
        "CrossAttnDownBlockSpatioTemporal",
        "DownBlockSpatioTemporal",
    ),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "cross_attention_dim": TEXT_DIM,
    "num_attention_heads": (2, 2, 2),
    "num_frames": FRAMES,
}

ENTRIES = [
    entry("UNetMotionModel", MOTION, _motion, LEVELS),
    entry("UNet3DConditionModel", THREE_D, video, LEVELS),
    entry("UNetSpatioTemporalConditionModel", SVD, _spatio_temporal, LEVELS),
    entry("I2VGenXLUNet", THREE_D, _i2vgen, LEVELS),
]
