"""What the zoo's U-ViTs learn: the DiT's task with long skips, and its early-exit copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from fastdiff.backbones import view
from fastdiff.methods import ExitSchedule
from fastdiff.methods.exit_schedule import exit_at_depths
from fastdiff.models import UViT, UViTPipeline

from . import training_dit
from .data import CHARACTERS
from .denoising import Predictor
from .export import half_copy

NULL_CLASS = len(CHARACTERS)


def build_transformer(num_layers: int = 12, num_attention_heads: int = 4, attention_head_dim: int = 28) -> UViT:
    """An untrained denoiser of latents (batch, 4, 8, 8), of ``num_layers`` blocks and a middle one.

    Every block starts as the identity, and the other layers larger than U-ViT's own 0.02, which is meant for wide
    models: in a trial of 400 steps of 64 the loss fell to 0.146, and from U-ViT's own weights to 0.228.
    """
    model = UViT(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        num_classes=len(CHARACTERS),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for module in model.modules():
        if isinstance(module, BasicTransformerBlock):
            nn.init.zeros_(module.attn1.to_out[0].weight)
            nn.init.zeros_(module.ff.net[2].weight)
    return model


def denoiser_predictor(transformer: UViT, compiled: bool) -> Predictor:
    """The training forward of the full model."""
    transformer.set_attn_processor(AttnProcessor())  # fused attention is slow backwards on CPU, as for the DiT
    forward = torch.compile(transformer) if compiled else transformer
    return lambda noisy, timesteps, classes: forward(noisy, timestep=timesteps, class_labels=classes).sample


def exiting_predictor(transformer: UViT, schedule: ExitSchedule) -> Predictor:
    """The training forward of the model under an exit schedule: each sample runs the blocks of its own timestep."""
    depth_of = torch.from_numpy(schedule.depths_for(view(transformer), np.arange(1000)))
    full = denoiser_predictor(transformer, compiled=False)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        with exit_at_depths(transformer, depth_of[timesteps], schedule.order):
            return full(noisy, timesteps, classes)

    return predict


def export(transformer: UViT, vae: AutoencoderKL, folder: Path) -> None:
    """Writes a `UViTPipeline` in float16.

    Args:
        transformer: the denoiser.
        vae: the autoencoder.
        folder: replaced if it exists.
    """
    pipe = UViTPipeline(
        transformer=half_copy(transformer),
        scheduler=training_dit.build_scheduler(),
        vae=half_copy(vae),
        id2label=dict(enumerate(CHARACTERS)),
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
