"""What the zoo's UNets learn: the text-to-image model with its text encoder, and the unconditional pixel model."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import MAX_TOKENS, PHRASES, all_captions
from .data import CHARACTERS, COLORS, to_tensor
from .denoising import Condition, denoising_loss
from .training_loop import StepLoss

CAPTION_DROPOUT = 0.1
STANDARD_PHRASE_SHARE = 0.5
LATENT_SHAPING_TIMESTEP = 350
PIXEL_SHAPING_TIMESTEP = 500  # an image has twelve times as many values as its latent, so that more noise hides as much


def build_scheduler(*, pixels: bool) -> DDIMScheduler:
    """The noise schedule of both UNets: 1000 steps, linear betas; the rest as in Stable Diffusion.

    Args:
        pixels: of the model of pixels. It predicts clean images, clipped to [-1, 1]: with 16 channels at full
            resolution it has no room to carry the noise of every pixel.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="sample" if pixels else "epsilon",
        clip_sample=pixels,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, hidden_size: int = 96, layers: int = 2) -> CLIPTextModel:
    """An untrained text encoder: token ids (batch, 16) to hidden states (batch, 16, hidden_size)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_text_unet(
    widths: tuple[int, int, int] = (48, 80, 112), cross_attention_dim: int = 96
) -> UNet2DConditionModel:
    """An untrained denoiser of latents (batch, 4, 8, 8) given text features, with the blocks of Stable Diffusion."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,  # the number of heads, under the name that diffusers gives it here
        norm_num_groups=8,
    )


def build_pixel_unet(widths: tuple[int, ...] = (16, 32, 64, 128)) -> UNet2DModel:
    """An untrained denoiser of images (batch, 3, 32, 32), with attention at 4x4 pixels only."""
    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=32,
        down_block_types=(*("DownBlock2D",) * plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * plain),
        block_out_channels=widths,
        layers_per_block=2,
        attention_head_dim=32,
        norm_num_groups=8,
    )


def _use_plain_attention(unet: nn.Module) -> None:
    """Replaces torch's fused attention, whose backward pass is slow on CPU in bfloat16."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def caption_tokens(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Token ids of every caption: int64 (phrases, characters, foregrounds, backgrounds, 16)."""
    counts = len(CHARACTERS), len(COLORS), len(COLORS)
    return torch.stack(
        [tokenize(tokenizer, list(all_captions(phrase))).unflatten(0, counts) for phrase in range(len(PHRASES))]
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (len(texts), 16), padded as `StableDiffusionPipeline` pads them."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids


def caption_condition(tokenizer: CLIPTokenizer, labels: torch.Tensor) -> Condition:
    """Captions of training images: half of them the standard phrase, one in ten empty.

    Args:
        tokenizer: the text encoder's.
        labels: int64 (count, 4): character, font, foreground, background.
    """
    tokens, empty = caption_tokens(tokenizer), tokenize(tokenizer, [""])

    def condition(chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        phrases = torch.randint(len(PHRASES), chosen.shape, generator=generator)
        standard = torch.rand(chosen.shape, generator=generator) < STANDARD_PHRASE_SHARE
        dropped = torch.rand(chosen.shape, generator=generator) < CAPTION_DROPOUT
        character, _, foreground, background = labels[chosen].unbind(1)
        captions = tokens[phrases.masked_fill(standard, 0), character, foreground, background]
        return torch.where(dropped[:, None], empty, captions)

    return condition


def text_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
) -> StepLoss:
    """The denoising loss of the text-to-image model; both of its parts learn.

    Args:
        unet: the denoiser.
        text_encoder: reads the captions' tokens.
        tokenizer: the text encoder's.
        latents: clean latents (count, 4, 8, 8).
        labels: int64 (count, 4): character, font, foreground, background.
        batch_size: latents per step.
    """
    _use_plain_attention(unet)
    text_encoder.set_attn_implementation("eager")

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return unet(noisy, timesteps, text_encoder(tokens).last_hidden_state).sample

    return denoising_loss(
        predict,
        lambda chosen: latents[chosen].float(),
        caption_condition(tokenizer, labels),
        count=len(latents),
        batch_size=batch_size,
        scheduler=build_scheduler(pixels=False),
        shaping_timestep=LATENT_SHAPING_TIMESTEP,
    )


def pixel_loss(unet: UNet2DModel, images: torch.Tensor, batch_size: int) -> StepLoss:
    """The denoising loss of the unconditional model.

    Args:
        unet: the denoiser.
        images: uint8 (count, 32, 32, 3).
        batch_size: images per step.
    """
    _use_plain_attention(unet)
    return denoising_loss(
        lambda noisy, timesteps, nothing: unet(noisy, timesteps).sample,
        lambda chosen: to_tensor(images[chosen]),
        lambda chosen, generator: None,
        count=len(images),
        batch_size=batch_size,
        scheduler=build_scheduler(pixels=True),
        shaping_timestep=PIXEL_SHAPING_TIMESTEP,
    )
