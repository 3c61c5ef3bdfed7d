"""Tiny UNets without cross-attention: pixel models, latent super-resolution, audio."""

from __future__ import annotations

from typing import Any

from .base import HEIGHT, Draw, entry, steps

CLASSES = 10
LEVELS = ("down_blocks", "up_blocks")


def pixels(draw: Draw, batch: int, channels: int = 3, size: int = HEIGHT) -> dict[str, Any]:
    """Returns a noisy image and its timestep."""
    return {"sample": draw(batch, channels, size, size), "timestep": steps(batch)}


def _classes(draw: Draw, batch: int) -> dict[str, Any]:
    return pixels(draw, batch) | {"class_labels": draw.ints(CLASSES, batch)}


def _sigma(draw: Draw, batch: int) -> dict[str, Any]:
    return pixels(draw, batch, size=2 * HEIGHT) | {"timestep": steps(batch, 7.0)}


def _audio(draw: Draw, batch: int) -> dict[str, Any]:
    return {"sample": draw(batch, 2, 32), "timestep": steps(batch)}


_UNET = {
    "sample_size": HEIGHT,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
DDPM = _UNET | {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}
CONSISTENCY = _UNET | {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
}
LDM = _UNET | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "in_channels": 6,
}
SCORE = _UNET | {
    "sample_size": 2 * HEIGHT,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "freq_shift": 0,
    "mid_block_scale_factor": 1.41421356,
    "block_out_channels": (32, 32, 32),  # these attentions normalise in 32 groups
}

AUDIO = {
    "sample_size": 32,
    "extra_in_channels": 16,
    "norm_num_groups": 4,
    "block_out_channels": (8, 32, 32),
    "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
    "up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    "use_timestep_embedding": False,
}

ENTRIES = [
    entry("UNet2DModel", DDPM, pixels, LEVELS, variant="DDPM"),
    entry("UNet2DModel", CONSISTENCY | {"num_class_embeds": CLASSES}, _classes, LEVELS, variant="resnet sampling"),
    entry("UNet2DModel", LDM, lambda draw, batch: pixels(draw, batch, 6), LEVELS, variant="super-resolution"),
    entry("UNet2DModel", SCORE, _sigma, LEVELS, variant="FIR skip"),
    entry("UNet2DModel", DDPM | {"mid_block_type": None}, pixels, LEVELS, variant="no mid block"),
    entry(
        "UNet1DModel",
        AUDIO,
        _audio,
        LEVELS,
        variant="audio",
    ),
]
