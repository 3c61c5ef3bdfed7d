"""Triton where it is installed, and the one place that starts its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not made for every platform; the references work without it
    triton = tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU; Triton settles this when a kernel is defined."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is where Triton is missing and nothing will launch it."""
    return function if triton is None else triton.jit(function)


def launch(kernel: Any, programs: tuple[int, ...], *args: Any, fp_fusion: bool = True, **options: Any) -> None:
    """Start a kernel on the device of its first argument; nothing happens where there is nothing to do.

    Args:
        kernel: what `jit` made.
        programs: the grid.
        *args: the kernel's arguments, a tensor first.
        fp_fusion: whether a product and a sum may become one instruction that rounds once. Given at every launch,
            because Triton's own choice differs between its versions.
        **options: the kernel's compile-time constants, and Triton's options such as ``num_warps``.
    """
    if 0 in programs:
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever device its tensors are on.
        with torch.cuda.device(device):
            kernel[programs](*args, enable_fp_fusion=fp_fusion, **options)
    else:
        kernel[programs](*args, enable_fp_fusion=fp_fusion, **options)


_recording: ContextVar[object | None] = ContextVar("fastdiff_recording", default=None)


@contextmanager
def recording() -> Iterator[None]:
    """Within the block one CUDA graph is recorded: what is computed there may be used there again, and nowhere else."""
    token = _recording.set(object())
    try:
        yield
    finally:
        _recording.reset(token)


def current_recording() -> object | None:
    """Stands for the CUDA graph that is being recorded; None if none is."""
    return _recording.get()


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()
