"""What DiT computes of timestep and label in every block anew, once per evaluation; without a kernel, and bit for bit.

diffusers gives every block its own embedding layers. In a checkpoint that was converted from the published ones they
hold the same weights, because DiT itself has one embedding; there, one block's answer is every block's. Models whose
blocks were trained apart share the timestep's sinusoids.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import (
    CombinedTimestepLabelEmbeddings,
    LabelEmbedding,
    TimestepEmbedding,
    Timesteps,
)
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff.kernels import launch
from fastdiff.kernels.patching.parts import plain
from fastdiff.kernels.residual_norm_modulate import Rounding

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Tensors to what was computed of each: by what it is, what it was made from besides, and the result."""

_first: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""Embeddings to the first one of their model."""

_compared: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()
"""Embeddings to the weights that were compared with the first one's, as they were, and whether they were equal."""


def obstacle(embedding: Any) -> str:
    """Why `timestep_label_embeddings` cannot stand for a module's forward; empty if it can."""
    projection = type(embedding.time_proj)
    return "" if projection is Timesteps else f"its time_proj is {projection.__name__}, not {Timesteps.__name__}"


def relate(model: nn.Module) -> None:
    """Remember which embeddings of a model may have the same weights."""
    embeddings = [module for module in model.modules() if type(module) is CombinedTimestepLabelEmbeddings]
    _first.update((embedding, weakref.ref(embeddings[0])) for embedding in embeddings)


def timestep_label_embeddings(
    embedding: Any,
    rounding: Rounding,
    timestep: torch.Tensor,
    class_labels: torch.Tensor,
    hidden_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`CombinedTimestepLabelEmbeddings`, once for all blocks that have the same weights."""

    def embed() -> torch.Tensor:
        sinusoids = _sinusoids(embedding.time_proj, timestep, hidden_dtype)
        embedded: torch.Tensor = embedding.timestep_embedder(sinusoids) + embedding.class_embedder(class_labels)
        return embedded

    first = _first_alike(embedding)
    if first is None or class_labels.is_inference():
        return embed()
    made_from = (class_labels._version, hidden_dtype, _weights(first), _projection(first.time_proj))
    return _remembered(timestep, "embedding", made_from, (first, class_labels), embed)


def activated(activation: nn.Module, embedded: Any) -> torch.Tensor:
    """An activation, once for all blocks that are given the same embedding."""
    if type(activation) is not nn.SiLU or not plain(activation):
        result: torch.Tensor = activation(embedded)
        return result
    return _remembered(embedded, "activated", (), (), lambda: activation(embedded))


def _sinusoids(projection: Any, timestep: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """What a projection makes of timesteps, in a dtype."""
    made_from = (dtype, _projection(projection))
    return _remembered(timestep, "sinusoids", made_from, (), lambda: projection(timestep).to(dtype=dtype))


def _projection(projection: Any) -> tuple[Any, ...]:
    return projection.num_channels, projection.flip_sin_to_cos, projection.downscale_freq_shift, projection.scale


def _remembered(
    tensor: torch.Tensor, what: str, values: tuple[Any, ...], objects: tuple[Any, ...], make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What is made of a tensor; the same as before while neither it nor these values and objects have changed."""
    recorded, recording = _captured(tensor), launch.current_recording()
    if tensor.requires_grad or torch.is_grad_enabled() or tensor.is_inference() or (recorded and recording is None):
        return make()
    made_from = (tensor._version, *values)  # the version counts writes into the tensor
    held = (recording, *objects)
    known = _known.setdefault(tensor, {}).get(what)
    if known is None or known[0] != made_from or any(one is not two for one, two in zip(known[1], held, strict=True)):
        known = _known[tensor][what] = (made_from, held, make())
    result: torch.Tensor = known[2]
    return result


def _captured(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is recorded, which must compute everything from what its inputs will hold."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# -- embeddings with the same weights ----------------------------------------------------------------------------------


def _first_alike(embedding: Any) -> Any:
    """The first embedding of the model if it has the same weights as this one, or is it; else None."""
    reference = _first.get(embedding)
    first = None if reference is None else reference()
    state = None if first is None else (_weights(embedding), _weights(first))
    if state is None or None in state:
        return None
    known = _compared.get(embedding)
    if known is None or known[0] != state:
        own, others = _tensors(embedding), _tensors(first)
        if own[0].is_meta or _captured(own[0]):  # comparing waits for the device
            return None
        known = _compared[embedding] = (state, all(map(_equal, own, others)))
    return first if known[1] else None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.device == other.device and one.dtype == other.dtype and torch.equal(one, other))


def _weights(embedding: Any) -> tuple[Any, ...] | None:
    """Where the weights lie, and how often they were written to; None if calling a layer does more than use them."""
    parts = [embedding.timestep_embedder, embedding.class_embedder, *_layers(embedding)]
    if tuple(map(type, parts)) != (TimestepEmbedding, LabelEmbedding, nn.Linear, nn.Linear, nn.Embedding):
        return None
    if not all(map(plain, parts)):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in _tensors(embedding))


def _layers(embedding: Any) -> tuple[nn.Module, ...]:
    embedder = embedding.timestep_embedder
    return embedder.linear_1, embedder.linear_2, embedding.class_embedder.embedding_table


def _tensors(embedding: Any) -> list[torch.Tensor]:
    parameters = [tensor for layer in _layers(embedding) for tensor in layer._parameters.values()]
    return [tensor for tensor in parameters if tensor is not None]
