"""The timestep's sinusoids, which DiT computes anew in every block, once per evaluation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff.kernels.residual_norm_modulate import Rounding

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Timesteps to their sinusoids and what these were made from; forgotten with the timesteps."""


def obstacle(embedding: Any) -> str:
    """Why `timestep_label_embeddings` cannot stand for a module's forward; empty if it can."""
    projection = type(embedding.time_proj)
    return "" if projection is Timesteps else f"its time_proj is {projection.__name__}, not {Timesteps.__name__}"


def timestep_label_embeddings(
    embedding: Any,
    rounding: Rounding,
    timestep: torch.Tensor,
    class_labels: torch.Tensor,
    hidden_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`CombinedTimestepLabelEmbeddings`: every block has its own layers for what all of them share."""
    sinusoids = _sinusoids(embedding.time_proj, timestep, hidden_dtype)
    return embedding.timestep_embedder(sinusoids) + embedding.class_embedder(class_labels)


def _sinusoids(projection: Any, timestep: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """What a projection makes of timesteps, in a dtype; the same tensor as before while nothing has changed."""
    if timestep.requires_grad or timestep.is_inference() or _captured(timestep):
        return projection(timestep).to(dtype=dtype)
    settings = (projection.num_channels, projection.flip_sin_to_cos, projection.downscale_freq_shift, projection.scale)
    made_from = (timestep._version, dtype, *settings)  # the version counts writes into the tensor
    known = _known.get(timestep)
    if known is None or known[0] != made_from:
        known = _known[timestep] = (made_from, projection(timestep).to(dtype=dtype))
    return known[1]


def _captured(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is recorded, which must compute everything from what its inputs will hold."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
