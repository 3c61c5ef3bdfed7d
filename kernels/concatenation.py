"""A decoder's features and a long skip side by side, put together only for those who read them as one.

The up stages of UNets concatenate features and a skip in front of every residual block. Where they are handed `Skip`
for a skip, that yields a `Concatenated`, whose parts an operation may read where they lie, with the skip's factor as
algebra. Every other operation finds an ordinary tensor, computed when it first is read: whatever stands between stage
and block, and whatever runs instead of either, computes what it always did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fastdiff.kernels.dispatch import image_layout, mode, obstacle

Factor = float | torch.Tensor
"""A number; or a tensor without dimensions on the host; or one with a number for each run of samples in the batch."""


class Deferred(torch.Tensor):
    """A tensor that is computed when an operation reads it. Gradients do not pass."""

    _value: torch.Tensor | None = None

    @classmethod
    def _like(cls, part: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, strides, dtype=part.dtype, device=part.device)

    def compute(self) -> torch.Tensor:
        """The tensor."""
        raise NotImplementedError

    @property
    def value(self) -> torch.Tensor:
        """The tensor, computed once."""
        if self._value is None:
            self._value = self.compute()
        return self._value

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.value!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note a concatenation; give all else the tensors that are meant."""
        if function is torch.ops.aten.cat.default and (beside := _concatenation(*args, **(kwargs or {}))) is not None:
            return beside
        args, kwargs = pytree.tree_map_only(Deferred, lambda tensor: tensor.value, (args, kwargs or {}))
        return function(*args, **kwargs)


class Skip(Deferred):
    """A long skip, times a factor.

    Args:
        features: shape ``(batch, channels, height, width)``.
        factor: None for one.
    """

    def __new__(cls, features: torch.Tensor, factor: Factor | None = None) -> Skip:
        """The tensor that the product is."""
        return cls._like(features, features.shape, features.stride())

    def __init__(self, features: torch.Tensor, factor: Factor | None = None) -> None:
        self.features = features
        self.factor = factor

    def compute(self) -> torch.Tensor:
        """The product."""
        return self.features if self.factor is None else times(self.features, self.factor)


class Concatenated(Deferred):
    """Features, and behind their channels those of a skip.

    Args:
        x: shape ``(batch, channels, height, width)``.
        skip: of the same batch, height, width, dtype and layout.
    """

    def __new__(cls, x: torch.Tensor, skip: Skip) -> Concatenated:
        """The tensor that the concatenation is."""
        batch, channels, height, width = x.shape
        channels += skip.shape[1]
        last = image_layout(x) == torch.channels_last
        strides = (1, width * channels, channels) if last else (height * width, width, 1)
        return cls._like(x, (batch, channels, height, width), (channels * height * width, *strides))

    def __init__(self, x: torch.Tensor, skip: Skip) -> None:
        self.x = x
        self.skip = skip

    def compute(self) -> torch.Tensor:
        """The concatenation."""
        return torch.cat([self.x, self.skip.value], dim=1)

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, Factor]:
        """The features, the skip's, and its factor: a number, or a tensor of shape ``(batch,)``."""
        factor = self.skip.factor
        if isinstance(factor, torch.Tensor):
            factor = by_sample(factor, len(self.x)) if factor.ndim else float(factor)
        return self.x, self.skip.features, 1.0 if factor is None else factor


def _concatenation(tensors: list[torch.Tensor], dim: int = 0) -> Concatenated | None:
    """Features and a skip next to each other along the channels, if that is what is concatenated."""
    if dim != 1 or len(tensors) != 2 or not isinstance(tensors[1], Skip) or isinstance(tensors[0], Deferred):
        return None
    x, skip = tensors[0], tensors[1].features
    if x.ndim != 4 or (x.dtype, x.device, len(x), x.shape[2:]) != (skip.dtype, skip.device, len(skip), skip.shape[2:]):
        return None
    layout = image_layout(x)
    return None if layout is None or image_layout(skip) != layout else Concatenated(x, tensors[1])


def may_defer(x: torch.Tensor) -> bool:
    """Whether kernels that read parts may run on such a tensor, here and now."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return mode() == "torch" or not obstacle(x)


def times(features: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Features times a factor, in their dtype."""
    if not isinstance(factor, torch.Tensor) or not factor.ndim:
        return features * factor
    rows = by_sample(factor, len(features)).view(-1, *[1] * (features.ndim - 1))
    return (features * rows).to(features.dtype)


def by_sample(factor: torch.Tensor, batch: int) -> torch.Tensor:
    """A factor for each sample of a batch in which runs of equal length have one each."""
    return factor.repeat_interleave(batch // len(factor))
