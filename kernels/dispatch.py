"""Which of a kernel and its reference runs.

The environment variable ``FASTDIFF_KERNELS`` is read at every call:

| value | meaning |
|---|---|
| ``auto`` (default) | the kernel where it is supported, the reference elsewhere |
| ``triton`` | the kernel, on CPUs in Triton's interpreter; an error where it is not supported |
| ``torch`` | the reference |
| ``explain`` | as ``auto``, and every new decision is logged with its reason |

Code that is being compiled sees the reference, which a compiler fuses with what stands around it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch

from fastdiff.errors import ConfigError, FastDiffError
from fastdiff.kernels import launch

Verdict = tuple[bool, str]
"""Whether a kernel can run, and the reason if it cannot."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MODES = ("auto", "triton", "torch", "explain")
OLDEST = (8, 0)
"""Compute capability of the oldest GPUs for which the kernels are compiled in the tests."""

LIBRARY = torch.library.Library("fastdiff", "DEF")
"""The kernels as operators of torch, ``torch.ops.fastdiff``, for compiled and exported programs."""

log = logging.getLogger("fastdiff.kernels")


class KernelInputError(FastDiffError, ValueError):
    """Tensors that do not fit each other or the operation."""


class KernelUnavailableError(FastDiffError, RuntimeError):
    """``FASTDIFF_KERNELS=triton`` where the kernel cannot run."""


def mode() -> str:
    """The value of ``FASTDIFF_KERNELS``.

    Raises:
        ConfigError: if it is none of `MODES`.
    """
    value = os.environ.get("FASTDIFF_KERNELS", "auto")
    if value not in MODES:
        raise ConfigError(f"FASTDIFF_KERNELS is {value!r}; it must be one of {', '.join(MODES)}.")
    return value


def use_kernel(name: str, supported: Callable[..., Verdict], *args: Any) -> bool:
    """Whether the kernel of this name runs on these arguments; `supported` is its predicate.

    Raises:
        KernelUnavailableError: if the mode is ``triton`` and the kernel cannot run.
    """
    if torch.compiler.is_compiling() or _plain.get() or (wanted := mode()) == "torch":
        return False
    runs, reason = supported(*args)
    if not runs and wanted == "triton":
        raise KernelUnavailableError(f"{name}: {reason}. FASTDIFF_KERNELS=auto uses the reference here.")
    if wanted == "explain" or not runs:
        _note(name, reason, logging.WARNING if wanted == "explain" else logging.INFO)
    return runs


def fused(name: str, supported: Callable[..., Verdict], *args: Any) -> bool:
    """Whether an operation, by its kernel or its reference, takes the place of torch's own operations.

    These are as fast as torch has it and change no bit, so without a kernel they stay; ``FASTDIFF_KERNELS=torch`` asks
    for the reference.

    Raises:
        KernelUnavailableError: if the mode is ``triton`` and the kernel cannot run.
    """
    return mode() == "torch" or use_kernel(name, supported, *args)


_plain: ContextVar[bool] = ContextVar("fastdiff_plain", default=False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within the block no kernel runs, for counters that only know torch's operations."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@lru_cache(maxsize=1024)
def _note(name: str, reason: str, level: int) -> None:
    """Log a decision the first time it is taken."""
    log.log(level, "%s: %s", name, f"reference, because {reason}" if reason else "kernel")


def obstacle(*tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str:
    """Why no kernel may run on these tensors, whatever the kernel; empty if one may."""
    given = [tensor for tensor in tensors if tensor is not None]
    if launch.triton is None:
        return "Triton is not installed"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "gradients are needed and the kernels have none"
    for tensor in given:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"a tensor is a {type(tensor).__name__}, which may hold its numbers in another way"
        if tensor.dtype not in dtypes:
            return f"{tensor.dtype} is none of {', '.join(map(str, dtypes))}"
    return _device_obstacle(given[0].device, mode() == "triton")


@lru_cache(maxsize=64)
def _device_obstacle(device: torch.device, forced: bool) -> str:
    if device.type != "cuda":
        interpreted = launch.INTERPRETED and forced and device.type == "cpu"
        return "" if interpreted else f"the tensors are on the device {device.type!r}"
    if torch.version.hip is not None:
        return "the kernels are not tested on AMD's GPUs"
    if launch.INTERPRETED:
        return "TRITON_INTERPRET=1 makes the kernels run on the CPU"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= OLDEST else f"compute capability {capability} is below {OLDEST}"


def check_devices(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors are on one device.

    Raises:
        KernelInputError: if they are not.
    """
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise KernelInputError(f"{name}: tensors on {' and '.join(sorted(devices))}. Move them to one device.")


def image_layout(x: torch.Tensor) -> torch.memory_format | None:
    """How a sample lies in memory; None if in neither of the ways the kernels read."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    for layout in (torch.contiguous_format, last):
        if layout is not None and x[:1].is_contiguous(memory_format=layout):
            return layout
    return None


def register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make a function an operator of torch.

    Args:
        schema: name, arguments and results in torch's notation.
        function: what runs, on every device.
        fake: what tells the results' shapes, strides and dtypes.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=LIBRARY)


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The precision in which references compute: float64 where it is given, float32 otherwise."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A tensor in another dtype, if there is one."""
    return None if tensor is None else tensor.to(dtype)
