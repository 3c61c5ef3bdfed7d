"""Several evaluations as one call: arguments for all of them, and the output taken apart again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import nn

from fastdiff.engine.clock import Grid
from fastdiff.engine.kept import repeated, transformed

TIMESTEP = ("timestep", "timesteps", "t", "timestep_ratio")
"""Names under which denoisers take their timestep."""

CONTROL = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
"""Names under which UNets take what ControlNets and T2I-Adapters add to the encoder's features."""

DECODER_MEMORY = 8
"""Memory that decoding takes for each evaluation, as a multiple of the features it reads; a generous guess."""


def timestep_name(arguments: Mapping[str, Any]) -> str | None:
    """The name under which a call gives its timestep."""
    return next((name for name in TIMESTEP if name in arguments), None)


def is_at(grid: Grid, row: int, arguments: Mapping[str, Any]) -> bool:
    """Whether a call is given the timestep that the scheduler has for a row, in the scheduler's own unit.

    Entries of the scheduler's tensor are told by where they lie, without waiting for the device.
    """
    value = arguments.get(timestep_name(arguments) or "")
    if value is None or grid.given is None:
        return False
    expected = grid.given[row]
    if not isinstance(value, torch.Tensor):
        return float(value) == float(expected)
    if value.untyped_storage().data_ptr() == expected.untyped_storage().data_ptr():
        return value.storage_offset() == expected.storage_offset()
    return float(value.flatten()[0]) == float(expected)


def stacked(arguments: Mapping[str, Any], sample: torch.Tensor, grid: Grid, rows: Sequence[int]) -> dict[str, Any]:
    """A call's arguments for several evaluations that differ in their timesteps alone.

    Args:
        arguments: those of one evaluation, by name.
        sample: the noisy sample among them, of shape ``(batch, ...)``.
        grid: the call's evaluations.
        rows: the evaluations to make.

    Returns:
        The arguments with ``len(rows) * batch`` samples: all of the first evaluation, then all of the next.
    """
    times, batch = len(rows), sample.shape[0]
    frames = sample.shape[1:3] if sample.ndim == 5 else ()  # videos may come with one row for every frame
    row_counts = {batch, *(batch * size for size in frames)}

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return repeated(tensor, times) if tensor.ndim and tensor.shape[0] in row_counts else tensor

    together = {name: transformed(repeat, value) for name, value in arguments.items()}
    for name in CONTROL:
        if arguments.get(name) is not None:
            together[name] = transformed(lambda tensor: repeated(tensor, times), arguments[name])
    timestep = timestep_name(arguments)
    assert timestep is not None
    assert grid.given is not None
    timesteps = grid.given[list(rows)].repeat_interleave(batch)
    given = arguments[timestep]
    together[timestep] = timesteps.to(given.device, given.dtype) if isinstance(given, torch.Tensor) else timesteps
    return together


def taken_apart(output: Any, evaluations: int) -> list[Any]:
    """The output of each evaluation of a stacked call."""

    def part(tensor: torch.Tensor, index: int) -> torch.Tensor:
        size = tensor.shape[0] // evaluations
        return tensor[index * size : (index + 1) * size]

    return [transformed(lambda tensor, i=index: part(tensor, i), output) for index in range(evaluations)]


def room_for(feature_bytes: int, device: torch.device) -> int:
    """How many evaluations may be decoded at once in half of the memory that is free; at least one."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = psutil.virtual_memory().available
    return max(1, int(free / 2 / (DECODER_MEMORY * max(1, feature_bytes))))


OBSERVED = (
    "AttendExciteAttnProcessor",
    "CrossAttnStoreProcessor",
    "LEDITSCrossAttnProcessor",
    "Pix2PixZeroAttnProcessor",
)
"""Attention processors that keep what they saw for their pipeline, which reads it after every call."""


def processors(denoiser: nn.Module) -> Iterator[type]:
    """The classes of a denoiser's attention processors."""
    attentions = (module for module in denoiser.modules() if hasattr(module, "set_processor"))
    return (type(module.processor) for module in attentions if getattr(module, "processor", None) is not None)


def mixing_processor(kinds: Iterable[type]) -> str | None:
    """The name of an attention processor that may mix the rows of a batch, as those of some pipelines do."""
    unknown = (kind for kind in kinds if not kind.__module__.startswith("diffusers.models.") or "PAG" in kind.__name__)
    return next((kind.__name__ for kind in unknown), None)


def observed_processor(kinds: Iterable[type]) -> str | None:
    """The name of an attention processor whose pipeline needs it to run in every call."""
    return next((kind.__name__ for kind in kinds if kind.__name__ in OBSERVED), None)
