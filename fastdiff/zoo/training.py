"""What each model of the zoo learns: architectures and losses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import LabelEmbedding

from fastdiff.methods import ExitSchedule

from .data import CHARACTERS, to_tensor
from .reader import GlyphReader
from .training_loop import StepLoss

Predictor = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy latents, timesteps, class labels) to the predicted noise."""

KL_WEIGHT = 1e-3
CLASS_DROPOUT = 0.1
NULL_CLASS = 1000  # fixed in DiTPipeline's guidance, and the reason for 1001 label rows where 37 would do
MIN_SNR_GAMMA = 5.0


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder: images (batch, 3, 32, 32) to latents (batch, 4, 8, 8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 40, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, batch_size: int) -> StepLoss:
    """Mean absolute reconstruction error plus a light pull of the latents towards a standard normal.

    Args:
        vae: the model to train.
        images: uint8 (count, 32, 32, 3).
        batch_size: images per step.
    """

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = to_tensor(images[torch.randint(len(images), (batch_size,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(batch))
        posterior = DiagonalGaussianDistribution(moments.float())
        latents = posterior.sample(generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decoder(vae.post_quant_conv(latents)).float()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return F.l1_loss(decoded, batch) + KL_WEIGHT * divergence

    return loss


def reader_loss(reader: GlyphReader, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> StepLoss:
    """Mean cross-entropy of the four questions, on images with a little noise so that features do not hang on texture.

    Args:
        reader: the model to train.
        images: uint8 (count, 32, 32, 3).
        labels: int64 (count, 4): character, font, foreground, background.
        batch_size: images per step.
    """

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        batch = to_tensor(images[chosen])
        strength = 0.2 * torch.rand(batch_size, 1, 1, 1, generator=generator)
        batch = batch + strength * torch.randn(batch.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            answers = reader(batch).to_tuple()
        losses = [
            F.cross_entropy(answer.float(), label) for answer, label in zip(answers, labels[chosen].T, strict=True)
        ]
        return torch.stack(losses).mean()

    return loss


def normalize_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Gives every latent channel zero mean and unit variance over ``images``, without changing any reconstruction.

    The affine map goes into the 1x1 convolutions on both sides of the latent, so ``scaling_factor`` stays exactly 1.
    """
    latents = encode(vae, images).float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        scale = torch.cat([1 / std, torch.ones_like(std)])
        into.weight.mul_(scale[:, None, None, None])
        into.bias.mul_(scale).sub_(torch.cat([mean / std, 2 * std.log()]))  # moments: mean, then log variance
        out.bias.add_(out.weight[:, :, 0, 0] @ mean)
        out.weight.mul_(std[None, :, None, None])


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """The posterior means of uint8 images (count, 32, 32, 3): float16 latents (count, 4, 8, 8)."""
    parts = [vae.encode(to_tensor(batch)).latent_dist.mean for batch in images.split(batch_size)]
    return (torch.cat(parts) * vae.config.scaling_factor).half().contiguous()


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


def freeze_timestep_embedders(transformer: DiTTransformer2DModel) -> None:
    """Excludes every block's timestep embedder from training, as ASE's recipe does."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.timestep_embedder.requires_grad_(False)


def noisy_batch(
    latents: torch.Tensor, labels: torch.Tensor, batch_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws what a denoising step needs.

    Half of the timesteps are uniform, half lie around the noise levels at which a glyph takes its shape.

    Returns:
        clean latents float32 (batch, 4, 8, 8), noise of the same shape, int64 timesteps (batch,) and int64 class
        labels (batch,) of which one in ten is the null class.
    """
    chosen = torch.randint(len(latents), (batch_size,), generator=generator)
    noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
    uniform = torch.randint(1000, (batch_size,), generator=generator)
    shaping = (350 + 150 * torch.randn(batch_size, generator=generator)).long().clamp(0, 999)
    timesteps = torch.where(torch.rand(batch_size, generator=generator) < 0.5, uniform, shaping)
    dropped = torch.rand(batch_size, generator=generator) < CLASS_DROPOUT
    return latents[chosen].float(), noise, timesteps, labels[chosen].masked_fill(dropped, NULL_CLASS)


def denoiser_loss(
    predict: Predictor,
    latents: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
) -> StepLoss:
    """Mean squared error of the predicted noise, weighted down where there is hardly any noise (min-SNR).

    Args:
        predict: (noisy latents, timesteps, class labels) to the predicted noise.
        latents: clean latents (count, 4, 8, 8).
        labels: int64 class labels (count,).
        batch_size: latents per step.
    """
    scheduler = build_scheduler()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=MIN_SNR_GAMMA) / snr

    def loss(generator: torch.Generator) -> torch.Tensor:
        clean, noise, timesteps, classes = noisy_batch(latents, labels, batch_size, generator)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = predict(scheduler.add_noise(clean, noise, timesteps), timesteps, classes)
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        return (weights[timesteps] * error).mean()

    return loss
