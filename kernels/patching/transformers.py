"""Forwards of transformer blocks, their adaptive norms and feed-forward activations, and of whole DiTs and U-ViTs.

Each takes what the forward of the diffusers class takes that it stands for, after the module and the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from fastdiff.kernels.patching.conditions import activated
from fastdiff.kernels.patching.parts import fused_patches, gated, join, patches_together
from fastdiff.kernels.residual_norm_modulate import Rounding

Maybe = torch.Tensor | None
Streams = tuple[Maybe, torch.Tensor]
Options = dict[str, Any] | None

NORM_TYPES = ("layer_norm", "ada_norm_zero", "ada_norm_single")


def basic_obstacle(block: nn.Module) -> str:
    """Why `basic_transformer_block` cannot stand for a block's forward; empty if it can."""
    if block.norm_type not in NORM_TYPES:
        return f"norm_type is {block.norm_type!r}, not one of {', '.join(NORM_TYPES)}"
    return "" if block.pos_embed is None else "it adds positional embeddings"


def basic_transformer_block(
    block: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    attention_mask: Maybe = None,
    encoder_hidden_states: Maybe = None,
    encoder_attention_mask: Maybe = None,
    timestep: Maybe = None,
    cross_attention_kwargs: Options = None,
    class_labels: Maybe = None,
    added_cond_kwargs: Options = None,
) -> Any:
    """`BasicTransformerBlock`: DiT, PixArt, and the transformers in UNets."""
    options = cross_attention_kwargs or {}
    if "gligen" in options or "scale" in options or hidden_states.ndim != 3 or block._chunk_size is not None:
        return NotImplemented
    x = hidden_states
    single = block.norm_type == "ada_norm_single"
    gate = scale = shift = gate_ff = None
    if single:
        assert timestep is not None
        table = block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
        shift_attention, scale_attention, gate, shift, scale, gate_ff = table.unbind(1)
        normed = join(x, norm=block.norm1, scale=scale_attention, shift=shift_attention, rounding=rounding)[1]
    elif block.norm_type == "ada_norm_zero":
        normed, gate, shift, scale, gate_ff = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    else:
        normed = block.norm1(x)
    branch = block.attn1(
        normed,
        encoder_hidden_states=encoder_hidden_states if block.only_cross_attention else None,
        attention_mask=attention_mask,
        **options,
    )
    if block.attn2 is not None:
        x, normed = join(x, branch, gate, None if single else block.norm2, rounding=rounding)
        branch, gate = block.attn2(
            normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **options
        ), None  # fmt: skip
    x, normed = join(x, branch, gate, block.norm2 if single else block.norm3, scale, shift, rounding)
    return join(x, block.ff(normed), gate_ff, rounding=rounding)[0]


def dit(
    model: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    timestep: Maybe = None,
    class_labels: Maybe = None,
    cross_attention_kwargs: Options = None,
    return_dict: bool = True,
) -> Any:
    """`DiTTransformer2DModel`: its blocks are called as ever, and its output layers are one operation."""
    if model.gradient_checkpointing:
        return NotImplemented
    x = model.pos_embed(hidden_states)
    for block in model.transformer_blocks:
        x = block(
            x,
            attention_mask=None,
            encoder_hidden_states=None,
            encoder_attention_mask=None,
            timestep=timestep,
            cross_attention_kwargs=cross_attention_kwargs,
            class_labels=class_labels,
        )
    condition = model.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
    shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
    image = patches_together(x, model.norm_out, scale, shift, model.proj_out_2, model.patch_size, rounding)
    return Transformer2DModelOutput(sample=image) if return_dict else (image,)


def uvit(
    model: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor | float,
    class_labels: Maybe = None,
    encoder_hidden_states: Maybe = None,
    return_dict: bool = True,
) -> Any:
    """`UViT`: its blocks are called as ever, and its output layers up to the convolution are one operation."""
    tokens = model.run_blocks(hidden_states, timestep, class_labels, encoder_hidden_states)
    patches, size = tokens[:, model.extra_tokens :], model.config["patch_size"]
    image = fused_patches(patches, model.norm_out, None, None, model.proj_out, size, rounding)
    image = model.image_of(tokens) if image is None else image
    image = image if model.conv_out is None else model.conv_out(image)
    return Transformer2DModelOutput(sample=image) if return_dict else (image,)


def joint_transformer_block(
    block: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    joint_attention_kwargs: Options = None,
) -> Any:
    """`JointTransformerBlock`: Stable Diffusion 3 and 3.5."""
    if block._chunk_size is not None:
        return NotImplemented
    x, text, options = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    normed, gate, shift, scale, gate_ff, *second = block.norm1(x, emb=temb)
    conditions = block.norm1_context(text, temb) if block.context_pre_only else block.norm1_context(text, emb=temb)
    normed_text, *conditions = (conditions,) if block.context_pre_only else conditions
    branch, text_branch = block.attn(hidden_states=normed, encoder_hidden_states=normed_text, **options)
    if block.use_dual_attention:
        x = join(x, branch, gate, rounding=rounding)[0]
        normed, gate = second
        branch = block.attn2(hidden_states=normed, **options)
    x = _feed_forward(x, branch, (gate, shift, scale, gate_ff), block.norm2, block.ff, rounding)
    if block.context_pre_only:
        return None, x
    return _feed_forward(text, text_branch, conditions, block.norm2_context, block.ff_context, rounding), x


def flux_block(
    block: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: Options = None,
) -> Streams:
    """`FluxTransformerBlock`."""
    normed, *conditions = block.norm1(hidden_states, emb=temb)
    normed_text, *text_conditions = block.norm1_context(encoder_hidden_states, emb=temb)
    branch, text_branch, *adapter = block.attn(
        hidden_states=normed,
        encoder_hidden_states=normed_text,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = _feed_forward(hidden_states, branch, conditions, block.norm2, block.ff, rounding)
    for added in adapter:
        x = x + added
    text = _feed_forward(
        encoder_hidden_states, text_branch, text_conditions, block.norm2_context, block.ff_context, rounding
    )
    return _clipped(text), x


def flux_single_block(
    block: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: Options = None,
) -> Streams:
    """`FluxSingleTransformerBlock`."""
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = block.norm(x, emb=temb)
    hidden = block.act_mlp(block.proj_mlp(normed))
    branch = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = join(x, block.proj_out(torch.cat([branch, hidden], dim=2)), gate, rounding=rounding)[0]
    tokens = encoder_hidden_states.shape[1]
    x = _clipped(x)
    return x[:, :tokens], x[:, tokens:]


def _feed_forward(
    x: torch.Tensor, branch: torch.Tensor, conditions: Any, norm: nn.Module, ff: nn.Module, rounding: Rounding
) -> torch.Tensor:
    """What follows attention in one stream: residual, norm, feed-forward, residual."""
    gate, shift, scale, gate_ff = conditions
    x, normed = join(x, branch, gate, norm, scale, shift, rounding)
    return join(x, ff(normed), gate_ff, rounding=rounding)[0]


def _clipped(x: torch.Tensor) -> torch.Tensor:
    """Kept from infinity, as Flux does it in half precision."""
    limit = torch.finfo(torch.float16).max
    return x.clip(-limit, limit) if x.dtype == torch.float16 else x


# -- adaptive norms ------------------------------------------------------------------------------------------------


def ada_layer_norm_zero(
    norm: Any,
    rounding: Rounding,
    x: torch.Tensor,
    timestep: Maybe = None,
    class_labels: Maybe = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Maybe = None,
) -> tuple[torch.Tensor, ...]:
    """`AdaLayerNormZero`."""
    if norm.emb is not None:
        emb = norm.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *others = norm.linear(activated(norm.silu, emb)).chunk(6, dim=1)
    return join(x, norm=norm.norm, scale=scale, shift=shift, rounding=rounding)[1], *others


def ada_layer_norm_zero_single(
    norm: Any, rounding: Rounding, x: torch.Tensor, emb: Maybe = None
) -> tuple[torch.Tensor, ...]:
    """`AdaLayerNormZeroSingle`."""
    shift, scale, gate = norm.linear(activated(norm.silu, emb)).chunk(3, dim=1)
    return join(x, norm=norm.norm, scale=scale, shift=shift, rounding=rounding)[1], gate


def ada_layer_norm_continuous(
    norm: Any, rounding: Rounding, x: torch.Tensor, conditioning_embedding: torch.Tensor
) -> torch.Tensor:
    """`AdaLayerNormContinuous`."""
    scale, shift = norm.linear(activated(norm.silu, conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return join(x, norm=norm.norm, scale=scale, shift=shift, rounding=rounding)[1]


def sd35_ada_layer_norm_zero(
    norm: Any, rounding: Rounding, hidden_states: torch.Tensor, emb: Maybe = None
) -> tuple[torch.Tensor, ...]:
    """`SD35AdaLayerNormZeroX`, which modulates one norm twice."""
    modulation = norm.linear(activated(norm.silu, emb)).chunk(9, dim=1)
    shift, scale, gate, shift_ff, scale_ff, gate_ff, shift_2, scale_2, gate_2 = modulation
    first, second = (
        join(hidden_states, norm=norm.norm, scale=one, shift=other, rounding=rounding)[1]
        for one, other in ((scale, shift), (scale_2, shift_2))
    )
    return first, gate, shift_ff, scale_ff, gate_ff, second, gate_2


def geglu_layer(layer: Any, rounding: Rounding, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`GEGLU`, the first half of a UNet's feed-forward layer."""
    return NotImplemented if args or kwargs else gated(layer.proj(hidden_states), rounding)
