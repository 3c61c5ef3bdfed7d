"""Forwards of the attention layers of Flux and Stable Diffusion 3.5, which normalise every head of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from fastdiff.kernels import qk_norm_rope
from fastdiff.kernels.dispatch import DTYPES, fused
from fastdiff.kernels.patching.parts import plain
from fastdiff.kernels.residual_norm_modulate import Rounding

Maybe = torch.Tensor | None
Angles = tuple[torch.Tensor, torch.Tensor] | None
Stream = tuple[torch.Tensor, Any]
"""Queries or keys, shape ``(batch, tokens, heads, width)``, and their norm."""


def flux_obstacle(attn: Any) -> str:
    """Why `flux_attention` cannot stand for a layer's forward; empty if it can."""
    if type(attn.processor) is not FluxAttnProcessor:
        return f"its processor is {type(attn.processor).__name__}, not {FluxAttnProcessor.__name__}"
    return "its projections are fused" if attn.fused_projections else _norm_obstacle(attn)


def joint_obstacle(attn: Any) -> str:
    """Why `joint_attention` gains nothing for a layer with the joint processor; empty if it does."""
    return "it does not normalise queries and keys" if attn.norm_q is None else _norm_obstacle(attn)


def _norm_obstacle(attn: Any) -> str:
    norms = [attn.norm_q, attn.norm_k]
    if attn.added_kv_proj_dim is not None:
        norms += [attn.norm_added_q, attn.norm_added_k]
    unknown = next((norm for norm in norms if not _is_known(norm)), attn)
    return "" if unknown is attn else f"a norm of its heads is {type(unknown).__name__}, not an RMSNorm without bias"


def _is_known(norm: Any) -> bool:
    return type(norm) in (nn.RMSNorm, RMSNorm) and getattr(norm, "bias", None) is None and norm.eps is not None


def flux_attention(
    attn: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    encoder_hidden_states: Maybe = None,
    attention_mask: Maybe = None,
    image_rotary_emb: Angles = None,
    **kwargs: Any,
) -> Any:
    """`FluxAttention` with its own processor: over the text and the image, or over both as one stream."""
    processor, alone = attn.processor, encoder_hidden_states is None
    if kwargs or type(processor) is not FluxAttnProcessor or alone != (attn.added_kv_proj_dim is None):
        return NotImplemented
    if attn.fused_projections or processor._parallel_config is not None:
        return NotImplemented
    queries: list[Stream] = [(_heads(attn.to_q(hidden_states), attn.head_dim), attn.norm_q)]
    keys: list[Stream] = [(_heads(attn.to_k(hidden_states), attn.head_dim), attn.norm_k)]
    values = [_heads(attn.to_v(hidden_states), attn.head_dim)]
    if encoder_hidden_states is not None:
        queries.insert(0, (_heads(attn.add_q_proj(encoder_hidden_states), attn.head_dim), attn.norm_added_q))
        keys.insert(0, (_heads(attn.add_k_proj(encoder_hidden_states), attn.head_dim), attn.norm_added_k))
        values.insert(0, _heads(attn.add_v_proj(encoder_hidden_states), attn.head_dim))
    query, key = (normed(streams, image_rotary_emb, rounding) for streams in (queries, keys))
    backend = processor._attention_backend
    x = dispatch_attention_fn(query, key, _joined(values), attn_mask=attention_mask, backend=backend)
    x = x.flatten(2, 3).to(query.dtype)
    if encoder_hidden_states is None:
        return x
    tokens = encoder_hidden_states.shape[1]
    text, x = x[:, :tokens].contiguous(), x[:, tokens:].contiguous()
    for layer in attn.to_out:
        x = layer(x)
    return x, attn.to_add_out(text)


def joint_attention(
    attn: Any,
    rounding: Rounding,
    hidden_states: torch.Tensor,
    encoder_hidden_states: Maybe = None,
    attention_mask: Maybe = None,
    **cross_attention_kwargs: Any,
) -> Any:
    """`Attention` with the joint processor: over the image and the text, or over the image alone."""
    if cross_attention_kwargs or type(attn.processor) is not JointAttnProcessor2_0 or attn.norm_q is None:
        return NotImplemented
    key = attn.to_k(hidden_states)
    width = key.shape[-1] // attn.heads
    queries: list[Stream] = [(_heads(attn.to_q(hidden_states), width), attn.norm_q)]
    keys: list[Stream] = [(_heads(key, width), attn.norm_k)]
    values = [_heads(attn.to_v(hidden_states), width)]
    if encoder_hidden_states is not None:
        queries.append((_heads(attn.add_q_proj(encoder_hidden_states), width), attn.norm_added_q))
        keys.append((_heads(attn.add_k_proj(encoder_hidden_states), width), attn.norm_added_k))
        values.append(_heads(attn.add_v_proj(encoder_hidden_states), width))
    query, key = (normed(streams, None, rounding).transpose(1, 2) for streams in (queries, keys))
    x = F.scaled_dot_product_attention(query, key, _joined(values).transpose(1, 2))
    x = x.transpose(1, 2).flatten(2).to(query.dtype)
    tokens = hidden_states.shape[1]
    x, text = x[:, :tokens], x[:, tokens:]
    for layer in attn.to_out:
        x = layer(x)
    if encoder_hidden_states is None:
        return x
    return x, text if attn.context_pre_only else attn.to_add_out(text)


def normed(streams: Sequence[Stream], angles: Angles, rounding: Rounding) -> torch.Tensor:
    """Queries or keys of streams, one after the other, with every head normalised and then turned.

    Args:
        streams: in the order in which attention reads them.
        angles: cosines and sines, each of shape ``(tokens of all streams, width)``; None where heads are not turned.
        rounding: as in `qk_norm_rope`.

    Returns:
        Heads of shape ``(batch, tokens of all streams, heads, width)``.
    """
    x = streams[0][0]
    cos, sin = (None, None) if angles is None else (part.to(x.device) for part in angles)
    ends = list(accumulate((part.shape[1] for part, _ in streams), initial=0))
    spans = [slice(*pair) for pair in pairwise(ends)]
    calls = [
        (part, norm.weight, None if cos is None else cos[span], None if sin is None else sin[span])
        for (part, norm), span in zip(streams, spans, strict=True)
    ]
    readable = all(_is_readable(part, norm, cos, sin, ends[-1], rounding) for part, norm in streams)
    if readable and all(fused("qk_norm_rope", qk_norm_rope.supported, part, None, *others) for part, *others in calls):
        joint = x.new_empty(len(x), ends[-1], *x.shape[2:])
        for call, (_, norm), span in zip(calls, streams, spans, strict=True):
            qk_norm_rope.qk_norm_rope(*call, eps=norm.eps, rounding=rounding, out=joint[:, span])
        return joint
    joint = _joined([norm(part) for part, norm in streams])
    return joint if angles is None else apply_rotary_emb(joint, angles, sequence_dim=1)


def _is_readable(x: torch.Tensor, norm: Any, cos: Maybe, sin: Maybe, tokens: int, rounding: Rounding) -> bool:
    """Whether the operation computes what norm and rotary embedding do, and reads weights that nobody loads later."""
    if not (_is_known(norm) and plain(norm) and x.dtype in DTYPES):
        return False
    if norm.weight is not None and (norm.weight.dtype != x.dtype or norm.weight.shape != x.shape[-1:]):
        return False
    if rounding == "match_eager" and type(norm) is RMSNorm and x.dtype != torch.float32:
        return False  # diffusers' norm rounds before it multiplies with the weight
    shape = (tokens, x.shape[-1])
    return all(part is None or (part.dtype == torch.float32 and part.shape == shape) for part in (cos, sin))


def _heads(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, width))


def _joined(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    return streams[0] if len(streams) == 1 else torch.cat(list(streams), dim=1)
