"""Tiny denoisers of audio and of embeddings: not image models, but built from the same kind of block lists."""

from __future__ import annotations

from typing import Any

import torch

from .base import HEADS, TEXT_DIM, TEXT_TOKENS, TOKENS, Draw, entry, steps


def _prior(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 8),
        "timestep": steps(batch),
        "proj_embedding": draw(batch, 8),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, 8),
    }


def _waveform(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, TOKENS),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
    }


def _stable_audio(draw: Draw, batch: int) -> dict[str, Any]:
    angles = draw(TOKENS + 1, 8)
    return _waveform(draw, batch) | {
        "global_hidden_states": draw(batch, 1, 24),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def _stable_audio3(draw: Draw, batch: int) -> dict[str, Any]:
    return _waveform(draw, batch) | {"global_hidden_states": draw(batch, 24)}


def _ace_step(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, TOKENS, 4),
        "timestep": steps(batch, 0.5),
        "timestep_r": steps(batch, 0.25),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "context_latents": draw(batch, TOKENS, 8),
    }


def _longcat_audio(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, TOKENS, 4),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.bool),
        "attention_mask": torch.ones(batch, TOKENS, dtype=torch.bool),
        "latent_cond": draw(batch, TOKENS, 4),
    }


def _minimax_music(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, TOKENS),
        "timestep": steps(batch, 0.5),
        "encoder_hidden_states": draw(batch, TOKENS, TEXT_DIM),
    }


ENTRIES = [
    entry(
        "PriorTransformer",
        HEADS | {"num_layers": 3, "embedding_dim": 8, "num_embeddings": TEXT_TOKENS, "additional_embeddings": 4},
        _prior,
        note="denoises one image embedding, which its input and output are; the blocks see no timestep argument",
    ),
    entry(
        "StableAudioDiTModel",
        HEADS
        | {
            "sample_size": TOKENS,
            "in_channels": 4,
            "num_layers": 3,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": TEXT_DIM,
            "time_proj_dim": 16,
            "global_states_input_dim": 24,
            "cross_attention_input_dim": TEXT_DIM,
        },
        _stable_audio,
    ),
    entry(
        "StableAudio3DiTModel",
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "cond_token_dim": TEXT_DIM,
            "global_cond_dim": 24,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "num_memory_tokens": 2,
        },
        _stable_audio3,
        note="memory tokens precede the audio tokens in the stream",
    ),
    entry(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
            "encoder_hidden_size": TEXT_DIM,
        },
        _ace_step,
        ("layers",),
        note="even layers attend within a window and get another mask than odd ones",
    ),
    entry(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": TEXT_DIM, "latent_dim": 4},
        _longcat_audio,
        ("blocks",),
        note="the embedded input is added to the last block's output",
    ),
    entry(
        "MiniMaxMusic3Transformer1DModel",
        HEADS
        | {
            "in_channels": 4,
            "condition_dim": TEXT_DIM,
            "num_layers": 3,
            "ff_inner_dim": 32,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        _minimax_music,
        note="the timestep is a token of the stream; the blocks see no timestep argument",
    ),
]
