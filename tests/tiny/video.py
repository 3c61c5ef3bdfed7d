"""Tiny video transformers: two latent frames, small enough to run in milliseconds."""

from __future__ import annotations

from typing import Any

import torch

from .base import HEADS, HEIGHT, TEXT_DIM, TEXT_TOKENS, TOKENS, Draw, entry, steps
from .image import PIXART, SANA

FRAMES = 2
BLOCKS = ("blocks",)
DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")


def text_to_video(draw: Draw, batch: int, channels: int = 4, frames: int = FRAMES) -> dict[str, Any]:
    """Returns a latent of 4x4 patches per frame, its timestep and the text states."""
    return {
        "hidden_states": draw(batch, channels, frames, HEIGHT, HEIGHT),
        "timestep": steps(batch),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
    }


def _masked(draw: Draw, batch: int) -> dict[str, Any]:
    return text_to_video(draw, batch) | {"encoder_attention_mask": torch.ones(batch, TEXT_TOKENS)}


def _frames_first(draw: Draw, batch: int) -> dict[str, Any]:
    inputs = text_to_video(draw, batch)
    return inputs | {"hidden_states": inputs["hidden_states"].transpose(1, 2)}


def _consisid(draw: Draw, batch: int) -> dict[str, Any]:
    return _frames_first(draw, batch) | {"id_cond": draw(batch, 2), "id_vit_hidden": [draw(batch, 2, 2)]}


def _ltx(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, FRAMES * TOKENS, 4),
        "timestep": steps(batch),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
        "num_frames": FRAMES,
        "height": 4,
        "width": 4,
    }


def _ltx2(draw: Draw, batch: int) -> dict[str, Any]:
    return _ltx(draw, batch) | {
        "audio_hidden_states": draw(batch, 4, 4),
        "audio_encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "audio_encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
        "audio_num_frames": 4,
    }


def _ltx2_refiner(draw: Draw, batch: int) -> dict[str, Any]:
    inputs, angles = _ltx(draw, batch), draw(batch, FRAMES * TOKENS, 32)
    kept = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    return {name: inputs[name] for name in kept} | {"video_rotary_emb": (angles.cos(), angles.sin())}


def _hunyuan_video(draw: Draw, batch: int) -> dict[str, Any]:
    return _masked(draw, batch) | {"pooled_projections": draw(batch, 24), "guidance": steps(batch, 6000.0)}


def _hunyuan_video15(draw: Draw, batch: int) -> dict[str, Any]:
    return _masked(draw, batch) | {
        "encoder_hidden_states_2": draw(batch, 3, TEXT_DIM),
        "encoder_attention_mask_2": torch.ones(batch, 3),
        "image_embeds": draw(batch, 2, TEXT_DIM),
    }


def _framepack(draw: Draw, batch: int) -> dict[str, Any]:
    def history(frames: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.arange(first, first + frames)
        return draw(batch, 4, frames, HEIGHT, HEIGHT), indices

    clean, clean_at = history(2, 0)
    twice, twice_at = history(2, 2)
    four, four_at = history(4, 4)
    return _hunyuan_video(draw, batch) | {
        "image_embeds": draw(batch, 2, TEXT_DIM),
        "indices_latents": torch.arange(8, 8 + FRAMES),
        "latents_clean": clean,
        "indices_latents_clean": clean_at,
        "latents_history_2x": twice,
        "indices_latents_history_2x": twice_at,
        "latents_history_4x": four,
        "indices_latents_history_4x": four_at,
    }


def _vace(draw: Draw, batch: int) -> dict[str, Any]:
    return text_to_video(draw, batch) | {"control_hidden_states": draw(batch, 6, FRAMES, HEIGHT, HEIGHT)}


def _wan_animate(draw: Draw, batch: int) -> dict[str, Any]:
    return text_to_video(draw, batch, channels=12, frames=3) | {
        "encoder_hidden_states_image": draw(batch, 2, TEXT_DIM),
        "pose_hidden_states": draw(batch, 4, 2, HEIGHT, HEIGHT),
        "face_pixel_values": draw(batch, 3, 5, 16, 16),
    }


def _anyflow(draw: Draw, batch: int) -> dict[str, Any]:
    return _frames_first(draw, batch) | {
        "timestep": torch.full((batch, FRAMES), 500.0),
        "r_timestep": torch.full((batch, FRAMES), 400.0),
    }


def _channels_last(draw: Draw, batch: int) -> dict[str, Any]:
    inputs = text_to_video(draw, batch)
    return inputs | {
        "hidden_states": inputs["hidden_states"].movedim(1, -1).contiguous(),
        "pooled_projections": draw(batch, 24),
    }


def _kandinsky5(draw: Draw, batch: int) -> dict[str, Any]:
    return _channels_last(draw, batch) | {
        "visual_rope_pos": (torch.arange(FRAMES), torch.arange(4), torch.arange(4)),
        "text_rope_pos": torch.arange(TEXT_TOKENS),
    }


def _kandinsky6(draw: Draw, batch: int) -> dict[str, Any]:
    return _channels_last(draw, batch) | {"audio_hidden_states": draw(batch, 4, 4)}


def _joy_edit_plus(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, TOKENS, 4, 1, 2, 2),
        "timestep": steps(batch),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "shape_list": [[(1, 4, 4)]] * batch,
    }


def _minimax_h3(draw: Draw, batch: int) -> dict[str, Any]:
    audio = 4
    length = TEXT_TOKENS + TOKENS + audio
    tags = torch.tensor([0] * TEXT_TOKENS + [1] * TOKENS + [2] * audio)
    return {
        "hidden_states": draw(batch, TOKENS, 16),
        "audio_hidden_states": draw(batch, audio, 4),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, TEXT_DIM),
        "timestep": steps(1),
        "timestep_indices": torch.zeros(length, dtype=torch.long),
        "token_tags": tags,
        "position_ids": torch.arange(length)[:, None].repeat(1, 3),
        "text_indices": (tags == 0).nonzero()[:, 0],
        "video_indices": (tags == 1).nonzero()[:, 0],
        "audio_indices": (tags == 2).nonzero()[:, 0],
    }


def _cosmos3(draw: Draw, batch: int) -> dict[str, Any]:
    vision = torch.arange(TEXT_TOKENS, TEXT_TOKENS + batch * TOKENS)
    length = TEXT_TOKENS + len(vision)
    return {
        "input_ids": draw.ints(32, TEXT_TOKENS),
        "text_indexes": torch.arange(TEXT_TOKENS),
        "position_ids": torch.arange(length).repeat(3, 1),
        "und_len": TEXT_TOKENS,
        "sequence_length": length,
        "vision_tokens": [draw(1, 4, 1, HEIGHT, HEIGHT) for _ in range(batch)],
        "vision_token_shapes": [(1, 4, 4)] * batch,
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": steps(len(vision)),
        "vision_noisy_frame_indexes": [torch.zeros(1, dtype=torch.long)] * batch,
    }


def _sana_wm(draw: Draw, batch: int) -> dict[str, Any]:
    inputs = text_to_video(draw, batch)
    return inputs | {
        "timestep": torch.full((batch, 1, FRAMES), 500.0),
        "encoder_hidden_states": inputs["encoder_hidden_states"][:, None],
        "mask": torch.ones(batch, 1, 1, TEXT_TOKENS),
    }


_IN_OUT = HEADS | {"in_channels": 4, "out_channels": 4}
_WAN = _IN_OUT | {"text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3}
WAN = _WAN | {"rope_max_seq_len": 32}
COGVIDEOX = _IN_OUT | {
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 3,
    "sample_width": HEIGHT,
    "sample_height": HEIGHT,
    "sample_frames": 5,
    "max_text_seq_length": TEXT_TOKENS,
}
LTX = _IN_OUT | {"cross_attention_dim": 32, "num_layers": 3, "caption_channels": TEXT_DIM}
_LTX2 = LTX | {
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}
_HUNYUAN_VIDEO = _IN_OUT | {
    "num_layers": 3,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}
_KANDINSKY = {
    "in_visual_dim": 4,
    "in_text_dim": TEXT_DIM,
    "in_text_dim2": 24,
    "time_dim": 16,
    "out_visual_dim": 4,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 6, 6),
    "visual_cond": False,
}
_JOY = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": TEXT_DIM,
    "num_layers": 3,
    "rope_dim_list": [4, 6, 6],
}

ENTRIES = [
    entry("WanTransformer3DModel", WAN, text_to_video, BLOCKS),
    entry(
        "WanVACETransformer3DModel",
        WAN | {"vace_layers": [0, 1, 2], "vace_in_channels": 6},
        _vace,
        BLOCKS,
        note="vace_blocks run first on a control stream; their results are added after the backbone's blocks",
    ),
    entry(
        "WanAnimateTransformer3DModel",
        WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "num_layers": 4,
            "image_dim": TEXT_DIM,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _wan_animate,
        BLOCKS,
        note="a face adapter adds to the hidden state after every second block",
    ),
    entry("SkyReelsV2Transformer3DModel", WAN, text_to_video, BLOCKS),
    entry("ChronoEditTransformer3DModel", WAN, text_to_video, BLOCKS),
    entry(
        "HeliosTransformer3DModel",
        _WAN | {"rope_dim": (4, 6, 6)},
        text_to_video,
        BLOCKS,
        note="history frames may precede the denoised ones in the stream",
    ),
    entry("AnyFlowTransformer3DModel", WAN, _anyflow, BLOCKS),
    entry("CogVideoXTransformer3DModel", COGVIDEOX, _frames_first),
    entry(
        "ConsisIDTransformer3DModel",
        COGVIDEOX
        | {
            "num_layers": 4,
            "is_train_face": True,
            "cross_attn_interval": 2,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        _consisid,
        note="a face cross-attention adds to the hidden state after every second block",
    ),
    entry(
        "AllegroTransformer3DModel",
        HEADS
        | {
            "num_layers": 3,
            "cross_attention_dim": 32,
            "caption_channels": TEXT_DIM,
            "sample_height": HEIGHT,
            "sample_width": HEIGHT,
            "sample_frames": FRAMES,
        },
        text_to_video,
    ),
    entry(
        "LatteTransformer3DModel",
        PIXART
        | {
            "in_channels": 4,
            "out_channels": 8,
            "patch_size": 2,
            "num_layers": 3,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": FRAMES,
        },
        text_to_video,
        ("transformer_blocks", "temporal_transformer_blocks"),
        note="the two lists run interleaved; the hidden state is transposed between them",
    ),
    entry("LTXVideoTransformer3DModel", LTX, _ltx),
    entry(
        "LTX2VideoTransformer3DModel",
        _LTX2,
        _ltx2,
        note="a video and an audio stream, both of which are outputs",
    ),
    entry("SanaWMLTX2RefinerTransformer3DModel", _LTX2, _ltx2_refiner),
    entry(
        "MochiTransformer3DModel",
        _IN_OUT
        | {
            "num_layers": 3,
            "pooled_projection_dim": 32,
            "text_embed_dim": TEXT_DIM,
            "time_embed_dim": 16,
        },
        _masked,
        note="the last block passes the text stream through",
    ),
    entry("HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO, _hunyuan_video, DOUBLE_SINGLE),
    entry(
        "HunyuanVideoFramepackTransformer3DModel",
        _HUNYUAN_VIDEO | {"has_image_proj": True, "image_proj_dim": TEXT_DIM, "has_clean_x_embedder": True},
        _framepack,
        DOUBLE_SINGLE,
        note="history tokens precede the denoised ones in the image stream",
    ),
    entry(
        "HunyuanVideo15Transformer3DModel",
        _IN_OUT
        | {
            "num_layers": 3,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "text_embed_dim": TEXT_DIM,
            "text_embed_2_dim": TEXT_DIM,
            "image_embed_dim": TEXT_DIM,
            "rope_axes_dim": (4, 6, 6),
        },
        _hunyuan_video15,
        note="4 million weights: the width of its second text projection is not configurable",
    ),
    entry(
        "MotifVideoTransformer3DModel",
        _IN_OUT
        | {
            "num_layers": 3,
            "num_single_layers": 4,
            "num_decoder_layers": 1,
            "text_embed_dim": TEXT_DIM,
            "rope_axes_dim": (4, 6, 6),
        },
        _masked,
        DOUBLE_SINGLE,
        note="the last single block decodes: it starts from the embedded latent and reads the image stream as its text",
    ),
    entry(
        "EasyAnimateTransformer3DModel",
        _IN_OUT
        | {
            "patch_size": 2,
            "num_layers": 4,
            "mmdit_layers": 2,
            "time_embed_dim": 16,
            "text_embed_dim": TEXT_DIM,
        },
        text_to_video,
    ),
    entry(
        "CosmosTransformer3DModel",
        _IN_OUT
        | {
            "num_layers": 3,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_DIM,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,
        },
        text_to_video,
    ),
    entry(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 32,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "vocab_size": 32,
            "rope_axes_dim": [4, 2, 2],
        },
        _cosmos3,
        ("layers",),
        timestep="vision_timesteps",
        note="two packed streams without a batch axis; only the second one is denoised",
    ),
    entry(
        "SanaVideoTransformer3DModel",
        SANA | {"patch_size": (1, 2, 2), "rope_max_seq_len": 32},
        text_to_video,
    ),
    entry(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "patch_size": (1, 2, 2),
            "linear_head_dim": 16,
            "caption_channels": TEXT_DIM,
        },
        _sana_wm,
        BLOCKS,
    ),
    entry("Kandinsky5Transformer3DModel", _KANDINSKY, _kandinsky5, ("visual_transformer_blocks",)),
    entry(
        "Kandinsky6Transformer3DModel",
        _KANDINSKY | {"in_audio_dim": 4, "out_audio_dim": 4},
        _kandinsky6,
        ("visual_transformer_blocks",),
        note="a video and an audio stream, both of which are outputs",
    ),
    entry(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
        lambda draw, batch: {"hidden_states": draw(batch, 1, HEIGHT, HEIGHT, 9), "timestep": steps(batch)},
        ("visual_transformer_blocks",),
    ),
    entry("JoyImageEditTransformer3DModel", _JOY, text_to_video, ("double_blocks",)),
    entry("JoyImageEditPlusTransformer3DModel", _JOY, _joy_edit_plus, ("double_blocks",)),
    entry(
        "MiniMaxH3Transformer3DModel",
        HEADS
        | {
            "hidden_size": 32,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": TEXT_DIM,
            "freq_dim": 16,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
        note="one stream of text, video and audio tokens; both modalities are outputs",
    ),
]
