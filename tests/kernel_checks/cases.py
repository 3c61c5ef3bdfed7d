"""Launches at the shapes of real models, on tensors without memory: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from fastdiff.kernels import lincomb


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def guided_step(dtype: torch.dtype) -> None:
    lincomb.run(empty(64, 4), tuple(empty(64, 4, 64, 64, dtype=dtype) for _ in range(4)), None)


CASES: dict[str, tuple[ModuleType, Callable[[torch.dtype], None]]] = {
    "lincomb": (lincomb, guided_step),
}
