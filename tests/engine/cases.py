"""The methods and pipelines that every guarantee is tested on. A new method is one more line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import fastdiff
from fastdiff import Action, ComputePlan, ExitSchedule, FeatureInheritance, LayerSkipping
from fastdiff.backbones import view
from fastdiff.engine import DenoiserRecord
from tiny.pipelines import TINY_PIPELINES
from tiny.sampling import BlockCalls, counting

STEPS = 7
"""Long enough for two keys of every method below and what lies between them; not a multiple of their intervals."""


def saved_plan(units: Sequence[str], evaluations: int) -> ComputePlan:
    """Returns a valid plan that mixes every action, with different rows throughout."""
    rows, columns = np.indices((evaluations, len(units)))
    mixed = np.array([Action.COMPUTE, Action.REUSE, Action.COMPUTE, Action.FORECAST, Action.SKIP])
    table = mixed[(rows + 2 * columns) % len(mixed)]
    table[:2] = Action.COMPUTE
    table[-1, -1] = Action.EXIT
    return ComputePlan(table, tuple(units), {"methods": ["mixed"], "forecast_order": 1})


MakeMethods = Callable[[Sequence[str], int], Any]
"""Unit names and number of evaluations to what `fastdiff.enable` takes."""

METHODS: dict[str, MakeMethods] = {
    "full": lambda units, evaluations: ExitSchedule("full"),
    "ase-demo": lambda units, evaluations: ExitSchedule("ase-demo"),
    "exit-step": lambda units, evaluations: ExitSchedule.step(full=4, t_switch=500, d_low=2),
    "layers-reuse": lambda units, evaluations: LayerSkipping(),
    "layers-skip": lambda units, evaluations: LayerSkipping(fill="skip"),
    "inherit-0": lambda units, evaluations: FeatureInheritance(),
    "inherit-1": lambda units, evaluations: FeatureInheritance(order=1, span=(1, -1)),
    "inherit-2": lambda units, evaluations: FeatureInheritance(order=2, interval=3),
    "saved-plan": lambda units, evaluations: saved_plan(units, evaluations),
    "merged": lambda units, evaluations: [ExitSchedule("ase-demo"), FeatureInheritance(order=1)],
}
NEUTRAL = ("full",)
"""Methods that skip nothing."""
ANY_STEPS = [name for name in METHODS if name != "saved-plan"]
"""Methods that are not tied to a number of steps."""
READING = ("layers-reuse", "inherit-0", "inherit-1", "inherit-2", "saved-plan", "merged")
"""Methods that keep and read residuals."""

PIPELINES = ("DiTPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
"""One pipeline for each way in which blocks are called: no text, cross-attention, two streams, two block lists."""

EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_ACTIVE_METHOD = pytest.mark.parametrize("method", [name for name in METHODS if name not in NEUTRAL])
EVERY_READING_METHOD = pytest.mark.parametrize("method", READING)
SOME_PIPELINES = pytest.mark.parametrize("name", PIPELINES)
EVERY_PIPELINE = pytest.mark.parametrize("name", TINY_PIPELINES)


def build(name: str) -> DiffusionPipeline:
    """Returns a new tiny pipeline."""
    return TINY_PIPELINES[name].build()


def accelerated(name: str, method: str, steps: int = STEPS) -> Any:
    """Returns a new tiny pipeline with a method enabled, for calls with this many evaluations."""
    pipe = build(name)
    return fastdiff.enable(pipe, methods_for(pipe, method, steps))


def methods_for(pipe: DiffusionPipeline, method: str, evaluations: int = STEPS) -> Any:
    """Returns what `fastdiff.enable` takes, for this pipeline's denoiser."""
    return METHODS[method](view(pipe.transformer).names, evaluations)


def sample(pipe: DiffusionPipeline, name: str, **arguments: Any) -> torch.Tensor:
    """Returns what one call of a tiny pipeline samples; the arguments are those of `TinyPipeline.inputs`."""
    torch.manual_seed(0)  # DiTPipeline does not hand its generator to the scheduler
    result = pipe(**TINY_PIPELINES[name].inputs(**{"steps": STEPS, **arguments}), return_dict=False)[0]
    return torch.stack([torch.as_tensor(item) for item in result])


def record_of(pipe: Any, denoiser: str = "transformer") -> DenoiserRecord:
    """Returns the record of a denoiser in the last call."""
    return pipe.fastdiff.last_run.denoisers[denoiser]


def denoiser_calls(
    pipe: DiffusionPipeline, name: str, denoiser: str = "transformer", **arguments: Any
) -> list[dict[str, Any]]:
    """Returns the keyword arguments of every denoiser call that a plain call of the pipeline makes."""
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        calls.append({key: value for key, value in bound.items() if key not in ("self", "return_dict")})

    handle = getattr(pipe, denoiser).register_forward_pre_hook(note, with_kwargs=True)
    sample(pipe, name, **arguments)
    handle.remove()
    return calls


@contextmanager
def counting_blocks(pipe: DiffusionPipeline, name: str) -> Iterator[BlockCalls]:
    """Counts the blocks that compute in each call of a plain pipeline's denoiser; accelerate it inside."""
    inputs = denoiser_calls(pipe, name, steps=2)[0]
    with counting(pipe.transformer, view(pipe.transformer).names, inputs) as calls:
        yield calls


def planned_runs(record: DenoiserRecord) -> np.ndarray:
    """Returns which units the lowered plan computes in each denoiser call, of shape `(calls, units)`."""
    (plan,) = record.plans
    first = record.calls[0].evaluation
    return np.array([plan.table[call.evaluation - first] == Action.COMPUTE for call in record.calls])
