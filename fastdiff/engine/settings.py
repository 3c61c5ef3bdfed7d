"""What a model is made of, so that a recording of its calls can be told from one of the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
PASSED_OVER = ("_parameters", "_buffers", "_modules", "_child_registries_cache")
"""Attributes that are looked at in another way, or that change without meaning."""
HOOKS = ("_forward_", "_backward_", "_state_dict_", "_load_state_dict_")
"""What the names of torch's own hooks begin with."""
DEPTH = 2
"""How far attributes of attributes are followed: those of an attention processor are the last."""


class Settings:
    """A model's modules, where its tensors lie, and the plain attributes of modules and of what these hold.

    Adapters that are loaded or scaled, weights that are moved, other processors and other hooks all make a difference;
    new values in the same tensors make none. Equal settings are those of the same objects, which are kept alive.

    Args:
        parts: plain values, and objects that only equal themselves.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, model: nn.Module) -> Settings:
        """Look at a model."""
        return cls([part for module in model.modules() for part in _parts_of(module)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Settings) or len(self._parts) != len(other._parts):
            return False
        pairs = zip(self._parts, other._parts, strict=True)
        return all(
            one is two or (type(one) is type(two) and isinstance(one, (*PLAIN, tuple)) and one == two)
            for one, two in pairs
        )

    __hash__ = None  # type: ignore[assignment]


def _parts_of(module: nn.Module) -> Iterator[Any]:
    yield module
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            yield name
            yield from _followed(tensor, 0)
    for name, value in vars(module).items():
        if name not in PASSED_OVER and not name.startswith(HOOKS):
            yield name
            yield from _followed(value, DEPTH)


def _followed(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
    elif isinstance(value, PLAIN):
        yield value
    elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
        yield len(value)
        for item in value.items() if isinstance(value, Mapping) else value:
            yield from _followed(item, depth)
    else:
        yield value
        if depth and not isinstance(value, (nn.Module, type)):
            for item in getattr(value, "__dict__", {}).values():
                yield from _followed(item, depth - 1)
