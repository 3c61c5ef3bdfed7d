"""Forwards of a UNet's up stages and residual blocks, and of the attention that UNets share with DiT and PixArt."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from fastdiff.backbones import is_compiled
from fastdiff.kernels.concatenation import Skip, may_defer
from fastdiff.kernels.patching.parts import norm_silu, shortcut
from fastdiff.kernels.residual_norm_modulate import Rounding

Maybe = torch.Tensor | None

MANY = 64
"""From this batch size on diffusers copies what it upsamples."""


def up_stage(
    stage: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    res_hidden_states_tuple: tuple[torch.Tensor, ...],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A decoder's stage as it is, with skips that are not put together with its features where nobody needs that."""
    if rounding != "fused" or not may_defer(hidden_states) or any(map(is_compiled, stage.resnets)):
        return NotImplemented
    skips = tuple(skip if isinstance(skip, Skip) else Skip(skip) for skip in res_hidden_states_tuple)
    return type(stage).forward(stage, hidden_states, skips, *args, **kwargs)


def resnet_obstacle(block: Any) -> str:
    """Why `resnet_block` cannot stand for a block's forward; empty if it can."""
    if type(block.norm1) is not nn.GroupNorm or type(block.norm2) is not nn.GroupNorm:
        return "its norms are not nn.GroupNorm"
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    return ""


def resnet_block(
    block: Any, rounding: Rounding, input_tensor: torch.Tensor, temb: Maybe, *args: Any, **kwargs: Any
) -> Any:
    """`ResnetBlock2D`, without dividing by an ``output_scale_factor`` of one."""
    modulated = block.time_embedding_norm == "scale_shift"
    many = block.upsample is not None and len(input_tensor) >= MANY
    untimed = temb is None
    if args or kwargs or many or untimed != (block.time_emb_proj is None) or (modulated and untimed):
        return NotImplemented
    x, hidden = input_tensor, norm_silu(input_tensor, block.norm1, rounding=rounding)
    resample = block.downsample if block.upsample is None else block.upsample
    if resample is not None:
        x, hidden = resample(x), resample(hidden)
    hidden = block.conv1(hidden)
    add = None
    if block.time_emb_proj is not None:
        add = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
    if modulated:
        assert add is not None
        scale, shift = add.chunk(2, dim=1)
        hidden = norm_silu(hidden, block.norm2, scale=scale, shift=shift, rounding=rounding)
    else:
        added = add if block.time_embedding_norm == "default" else None
        hidden = norm_silu(hidden, block.norm2, added, rounding=rounding)
    hidden = block.conv2(block.dropout(hidden))
    x = x if block.conv_shortcut is None else shortcut(x, block.conv_shortcut, rounding)
    return _over(x + hidden, block.output_scale_factor)


def attention_obstacle(attn: Any) -> str:
    """Why `attention` gains nothing for a layer; empty if it does."""
    processor = type(attn.processor)
    if processor is not AttnProcessor2_0:
        return f"its processor is {processor.__name__}, not {AttnProcessor2_0.__name__}"
    return "" if attn.spatial_norm is None else "it has a spatial norm"


def attention(
    attn: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    encoder_hidden_states: Maybe = None,
    attention_mask: Maybe = None,
    **cross_attention_kwargs: Any,
) -> Any:
    """`Attention` with its default processor, without looking up what that takes and without dividing by one."""
    # The timestep's embedding is for a spatial norm, and of no use without one.
    unknown = cross_attention_kwargs.keys() - {"temb"} or attn.spatial_norm is not None
    if unknown or type(attn.processor) is not AttnProcessor2_0:
        return NotImplemented
    x = hidden_states
    shape = x.shape
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    batch, tokens, _ = (x if encoder_hidden_states is None else encoder_hidden_states).shape
    if attention_mask is not None:
        attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
        attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    context = x if encoder_hidden_states is None else encoder_hidden_states
    if attn.norm_cross and encoder_hidden_states is not None:
        context = attn.norm_encoder_hidden_states(context)
    query, key, value = (
        part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for part in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
    )
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    x = x.transpose(1, 2).flatten(2).to(query.dtype)
    for layer in attn.to_out:
        x = layer(x)
    if len(shape) == 4:
        x = x.transpose(1, 2).reshape(shape)
    x = x + hidden_states if attn.residual_connection else x
    return _over(x, attn.rescale_output_factor)


def _over(x: torch.Tensor, factor: Any) -> torch.Tensor:
    """A quotient; the dividend itself where the divisor is one."""
    return x if isinstance(factor, (int, float)) and factor == 1 else x / factor
