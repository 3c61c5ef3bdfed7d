"""Kernels that take one sample at a time, so that what a model makes of a sample does not depend on its batch.

Kernels group their sums as the whole batch's shape and strides suggest, and one sample comes out a few ulps apart.
Under `one_sample_at_a_time` several evaluations stacked into one call can be compared bit by bit with as many calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

BATCHED: dict[Callable[..., Any], int] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d), 1),
    **dict.fromkeys((F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm), 1),
    **dict.fromkeys((F.silu, F.gelu, torch.sin, torch.cos), 1),
    **dict.fromkeys((torch.bmm, torch.matmul), 2),
    **dict.fromkeys((F.scaled_dot_product_attention, torch.baddbmm), 3),
}
"""Functions with the number of their leading arguments that hold one entry per sample."""

BATCHED_KEYWORDS = ("attn_mask", "key", "value")


class _OneSampleAtATime(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        samples = first.shape[0] if func in BATCHED and isinstance(first, torch.Tensor) and first.ndim > 1 else 0
        if not samples:
            return func(*args, **kwargs)

        def cut(value: Any, index: int) -> Any:
            is_batched = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == samples
            # Contiguous, because sums are grouped by the memory's layout too, of which one sample alone has several.
            return value[index : index + 1].clone(memory_format=torch.contiguous_format) if is_batched else value

        parts = []
        for index in range(samples):
            own = [cut(value, index) for value in args[: BATCHED[func]]]
            named = {name: cut(value, index) if name in BATCHED_KEYWORDS else value for name, value in kwargs.items()}
            parts.append(func(*own, *args[BATCHED[func] :], **named))
        return torch.cat(parts)


def one_sample_at_a_time() -> TorchFunctionMode:
    """A context in which kernels that sum or round by their batch's shape run for each sample alone, contiguous."""
    return _OneSampleAtATime()
