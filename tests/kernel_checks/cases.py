"""Launches at the shapes of real models, on tensors without memory: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch

from fastdiff.kernels import geglu, lincomb, residual_norm_modulate, rows


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def guided_step(dtype: torch.dtype) -> None:
    lincomb.run(empty(64, 4), tuple(empty(64, 4, 64, 64, dtype=dtype) for _ in range(4)), None)


def block_boundary(width: int, dtype: torch.dtype) -> None:
    x, branch = empty(2, 256, width, dtype=dtype), empty(2, 256, width, dtype=dtype)
    gate, scale, shift = (
        empty(2, 6, width, dtype=dtype).expand(2, 6, width)[:, :3, None].expand(2, 3, 256, width).unbind(1)
    )
    weight, offset = empty(width, dtype=dtype), empty(2)
    residual_norm_modulate.run(x, branch, gate, weight, weight, scale, shift, weight, offset, "layer", 1e-6, "fused")


def feed_forward(approximate: str, dtype: torch.dtype) -> None:
    geglu.run(empty(2, 4096, 5120, dtype=dtype), True, approximate, "fused")


def activation(dtype: torch.dtype) -> None:
    geglu.run(empty(2, 256, 4608, dtype=dtype), False, "tanh", "fused")


def some_samples(scatter: bool, dtype: torch.dtype) -> None:
    batch, part = empty(64, 256, 1152, dtype=dtype), empty(20, 256, 1152, dtype=dtype)
    rows.run(batch if scatter else part, part if scatter else batch, empty(20, dtype=torch.int64), scatter)


CASES: dict[str, tuple[ModuleType, Callable[[torch.dtype], None]]] = {
    "lincomb": (lincomb, guided_step),
    "gather_rows": (rows, partial(some_samples, False)),
    "scatter_rows": (rows, partial(some_samples, True)),
    "geglu": (geglu, partial(feed_forward, "none")),
    "geglu tanh": (geglu, partial(feed_forward, "tanh")),
    "gelu_tanh": (geglu, activation),
    **{
        f"residual_norm_modulate {width}": (residual_norm_modulate, partial(block_boundary, width))
        for width in (1152, 1536, 3072)
    },
}
