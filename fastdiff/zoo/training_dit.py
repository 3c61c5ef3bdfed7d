"""What the zoo's transformers learn: the class-conditional denoiser and its early-exit copy."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding

from fastdiff.methods import ExitSchedule

from .data import CHARACTERS
from .denoising import Condition, Predictor, denoising_loss
from .training_loop import StepLoss

CLASS_DROPOUT = 0.1
NULL_CLASS = 1000  # fixed in DiTPipeline's guidance, and the reason for 1001 label rows where 37 would do
SHAPING_TIMESTEP = 350


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of DiT: 1000 steps, linear betas, noise prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_transformer(
    num_layers: int = 14, num_attention_heads: int = 4, attention_head_dim: int = 28
) -> DiTTransformer2DModel:
    """An untrained denoiser of latents (batch, 4, 8, 8), initialised so that every block starts as the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
        if isinstance(module, LabelEmbedding):
            torch.nn.init.zeros_(module.embedding_table.weight)
            used = [*range(len(CHARACTERS)), NULL_CLASS]
            module.embedding_table.weight.data[used] = 0.5 * torch.randn(len(used), model.inner_dim)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
    torch.nn.init.zeros_(model.proj_out_1.weight)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    disable_label_dropout(model)
    return model


def disable_label_dropout(transformer: DiTTransformer2DModel) -> None:
    """Leaves label dropout to the loss: each block owns an embedder, which would drop labels on its own."""
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def forward_at_depths(
    transformer: DiTTransformer2DModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    depths: torch.Tensor,
) -> torch.Tensor:
    """The prediction of each sample as if only its first blocks existed, as ASE trains with.

    Every block runs on the whole batch and the output layers read each sample's own exit feature. That costs more
    than dropping the samples that have left, but all shapes are fixed, so the whole step compiles to one graph.

    Args:
        transformer: the denoiser.
        latents: noisy latents (batch, 4, 8, 8).
        timesteps: int64 (batch,).
        class_labels: int64 (batch,).
        depths: int64 (batch,), blocks to run for each sample, from 1 to the number of blocks.

    Returns:
        The predicted noise (batch, 4, 8, 8). Blocks beyond a sample's depth get no gradient from it.
    """
    hidden = transformer.pos_embed(latents)
    exits = torch.zeros_like(hidden)
    for index, block in enumerate(transformer.transformer_blocks, start=1):
        hidden = block(hidden, timestep=timesteps, class_labels=class_labels)
        exits = torch.where((depths == index)[:, None, None], hidden, exits)
    conditioning = transformer.transformer_blocks[0].norm1.emb(timesteps, class_labels, hidden_dtype=exits.dtype)
    shift, scale = transformer.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
    patches = transformer.proj_out_2(transformer.norm_out(exits) * (1 + scale[:, None]) + shift[:, None])
    side, patch, channels = (
        transformer.height // transformer.patch_size,
        transformer.patch_size,
        transformer.out_channels,
    )
    pixels = patches.reshape(-1, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(-1, channels, side * patch, side * patch)


def denoiser_predictor(transformer: DiTTransformer2DModel, schedule: ExitSchedule | None, compiled: bool) -> Predictor:
    """The training forward of the full model, or of the model that exits under ``schedule``."""
    # torch's fused attention is slow backwards on CPU in bfloat16: two thirds of a step with 16 tokens.
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    if schedule is None:
        forward = torch.compile(transformer) if compiled else transformer
        return lambda noisy, timesteps, classes: forward(noisy, timestep=timesteps, class_labels=classes).sample
    at_depths = torch.compile(forward_at_depths) if compiled else forward_at_depths
    units = len(transformer.transformer_blocks)
    depth_of = torch.from_numpy(schedule.depth_at(np.arange(1000), units))
    return lambda noisy, timesteps, classes: at_depths(transformer, noisy, timesteps, classes, depth_of[timesteps])


def freeze_timestep_embedders(transformer: torch.nn.Module) -> None:
    """Excludes every timestep embedder of a denoiser from training, as ASE's recipe does."""
    for module in transformer.modules():
        if isinstance(module, TimestepEmbedding):
            module.requires_grad_(False)


def class_condition(labels: torch.Tensor, null_class: int = NULL_CLASS) -> Condition:
    """Class labels of training samples, of which one in ten is the null class.

    Args:
        labels: int64 class labels (count,).
        null_class: the class that stands for no class.
    """

    def condition(chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        dropped = torch.rand(chosen.shape, generator=generator) < CLASS_DROPOUT
        return labels[chosen].masked_fill(dropped, null_class)

    return condition


def denoiser_loss(
    predict: Predictor, latents: torch.Tensor, labels: torch.Tensor, batch_size: int, null_class: int = NULL_CLASS
) -> StepLoss:
    """The denoising loss of a class-conditional model.

    Args:
        predict: (noisy latents, timesteps, class labels) to the predicted noise.
        latents: clean latents (count, 4, 8, 8).
        labels: int64 class labels (count,).
        batch_size: latents per step.
        null_class: the class that stands for no class.
    """
    return denoising_loss(
        predict,
        lambda chosen: latents[chosen].float(),
        class_condition(labels, null_class),
        count=len(latents),
        batch_size=batch_size,
        scheduler=build_scheduler(),
        shaping_timestep=SHAPING_TIMESTEP,
    )
