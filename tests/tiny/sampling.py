"""Evaluations of a tiny denoiser one after the other, and a count of the blocks that really ran in them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdiff.engine import RunRecord, sampling_run

from .base import TinyModel

Calls = Sequence[dict[str, Any]]
"""Keyword arguments of a denoiser, one dictionary for each evaluation."""


def calls_of(tiny: TinyModel, evaluations: int, batch: int = 2) -> list[dict[str, Any]]:
    """Returns the same inputs for every evaluation, at a timestep that falls from its start to half of it."""
    inputs = tiny.inputs(batch, 0)
    start = inputs[tiny.timestep]
    shares = 1 - np.arange(evaluations) / (2 * evaluations)
    return [inputs | {tiny.timestep: (start * float(share)).to(start.dtype)} for share in shares]


def calls_at(tiny: TinyModel, timesteps: Sequence[float], batch: int = 2) -> list[dict[str, Any]]:
    """Returns the same inputs for every evaluation, at training timesteps in the unit that the model takes."""
    inputs = tiny.inputs(batch, 0)
    start = inputs[tiny.timestep]
    unit = 1000 if start.max() <= 1 else 1
    return [inputs | {tiny.timestep: torch.full_like(start, timestep / unit)} for timestep in timesteps]


@torch.no_grad()
def evaluate(model: nn.Module, calls: Calls, return_dict: bool = False) -> list[Any]:
    """Returns what the plain model predicts in each evaluation."""
    return [model(**call, return_dict=return_dict) for call in calls]


@torch.no_grad()
def accelerate(
    model: nn.Module, calls: Calls, methods: Any, timesteps: Sequence[float], return_dict: bool = False
) -> tuple[list[Any], RunRecord]:
    """Returns what an accelerated model predicts in each evaluation, and the record of it."""
    outputs = []
    with sampling_run(model, methods, timesteps=torch.tensor(timesteps, dtype=torch.float64)) as run:
        for call in calls:
            outputs.append(model(**call, return_dict=return_dict))
            run.tick()
    return outputs, run.record


class BlockCalls:
    """Which blocks computed in each forward of a model."""

    def __init__(self) -> None:
        self.rows: list[Counter[str]] = []

    def table(self, names: Sequence[str]) -> np.ndarray:
        """Calls of each block in each forward, of shape `(forwards, blocks)`."""
        return np.array([[row[name] for name in names] for row in self.rows])


@contextmanager
def counting(model: nn.Module, names: Sequence[str], inputs: dict[str, Any]) -> Iterator[BlockCalls]:
    """Counts the blocks that compute, seen from inside: a submodule of each block that one forward calls once.

    The engine replaces a block's forward, and torch runs a block's own hooks even where that computes nothing. Where a
    block has no such submodule, its forward is counted before the engine wraps it.

    Args:
        model: Any denoiser, not accelerated yet.
        names: Dotted paths of its blocks.
        inputs: Keyword arguments of one plain forward, which shows what each block calls.
    """
    calls = BlockCalls()
    handles = [model.register_forward_pre_hook(lambda *_: calls.rows.append(Counter()))]
    for name in names:
        inside = _called_once(model, name, inputs)
        if inside is None:
            handles.append(_CountedForward(model.get_submodule(name), lambda name=name: calls.rows[-1].update([name])))
        else:
            handles.append(inside.register_forward_hook(lambda *_, name=name: calls.rows[-1].update([name])))
    calls.rows.clear()
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class _CountedForward:
    """A forward that tells of its calls, until `remove`."""

    def __init__(self, module: nn.Module, note: Callable[[], None]) -> None:
        forward = module.forward
        self._module = module

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            note()
            return forward(*args, **kwargs)

        module.forward = counted

    def remove(self) -> None:
        vars(self._module).pop("forward", None)


def _called_once(model: nn.Module, name: str, inputs: dict[str, Any]) -> nn.Module | None:
    block = model.get_submodule(name)
    seen: Counter[nn.Module] = Counter()
    handles = [
        module.register_forward_hook(lambda module, *_: seen.update([module]))
        for module in block.modules()
        if module is not block
    ]
    evaluate(model, [inputs])
    for handle in handles:
        handle.remove()
    return next((module for module, times in seen.items() if times == 1), None)


def traces(model: nn.Module) -> list[str]:
    """Returns the names of submodules that hold anything a hook leaves behind."""
    left = ("_diffusers_hook", "forward", "_old_forward", "cache_context")
    return [
        name
        for name, module in model.named_modules()
        if any(key in vars(module) for key in left) or module._forward_hooks or module._forward_pre_hooks
    ]


def without(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Returns the model with these blocks taken out of their lists, which changes it.

    In a U-ViT, which pairs its blocks by their places, something that does nothing takes their place.
    """
    for name in reversed(list(names)):
        path, _, index = name.rpartition(".")
        if hasattr(model, "transformer_mid_block"):
            model.get_submodule(path)._modules[index] = _Passing()
        else:
            del model.get_submodule(path)[int(index)]
    return model


class _Passing(nn.Module):
    """Hands on the first of its arguments."""

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden_states
