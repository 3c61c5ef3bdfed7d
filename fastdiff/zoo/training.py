"""What the zoo's autoencoder and reader learn: architectures and losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .data import to_tensor
from .reader import GlyphReader
from .training_loop import StepLoss

KL_WEIGHT = 1e-3


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
