"""The methods and pipelines that every guarantee is tested on. A new method is one more line here."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from engine.loops import small_unet
from torch import nn

import fastdiff
from fastdiff import Action, ComputePlan, EncoderPropagation, ExitSchedule, FeatureInheritance, LayerSkipping
from fastdiff.backbones import view
from fastdiff.engine import DenoiserRecord
from fastdiff.methods import as_methods
from fastdiff.methods.base import level_of
from tiny.base import build as build_model
from tiny.pipelines import TINY_PIPELINES
from tiny.sampling import BlockCalls, counting
from tiny.unet_pipelines import UNET_PIPELINES
from tiny.unet_unconditional import DDPM
from tiny.uvit import OWN_PIPELINES

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
UNET_METHODS: dict[str, MakeMethods] = {
    "propagate": lambda units, evaluations: EncoderPropagation(keys=3),
    "propagate-singly": lambda units, evaluations: EncoderPropagation(keys=3, parallel=False),
    "inherit-stages": lambda units, evaluations: FeatureInheritance(level="stage", keep_up=1),
    "inherit-branches": lambda units, evaluations: FeatureInheritance(level="branch", keep_up=1),
    "deepcache": lambda units, evaluations: FeatureInheritance.deepcache(3, 1, order=1),
    "propagate-and-inherit": lambda units, evaluations: [
        EncoderPropagation(keys=4, parallel=False),
        FeatureInheritance.deepcache(2),
    ],
}
NEUTRAL = ("full",)
"""Methods that skip nothing."""
ANY_STEPS = [name for name in METHODS if name != "saved-plan"]
"""Methods for transformers that are not tied to a number of steps."""
READING = ("layers-reuse", "inherit-0", "inherit-1", "inherit-2", "saved-plan", "merged")
"""Methods for transformers that keep and read residuals."""
STACKING = ("propagate",)
"""Methods that make several evaluations in one call."""

PIPELINES = ("DiTPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "UViTPipeline")
"""One pipeline for each way in which blocks are called: no text, cross-attention, two streams, two lists, skips."""
UNET_CASES = [
    *[("StableDiffusionPipeline", method) for method in UNET_METHODS if method != "inherit-stages"],
    *[("DDIMPipeline", method) for method in ("propagate", "inherit-stages")],
]
"""UNets with and without text and guidance; every method once at least."""

CASES = [*itertools.product(PIPELINES, METHODS), *UNET_CASES]
EVERY_CASE = pytest.mark.parametrize(("name", "method"), CASES)
EVERY_READING_CASE = pytest.mark.parametrize(
    ("name", "method"), [case for case in CASES if case[1] in (*READING, *UNET_METHODS) and case[1] not in STACKING]
)
EVERY_SINGLE_CASE = pytest.mark.parametrize(("name", "method"), [case for case in CASES if case[1] not in STACKING])
"""Those in which every call makes one evaluation."""
SOME_PIPELINES = pytest.mark.parametrize("name", PIPELINES)
EVERY_KIND = pytest.mark.parametrize("name", [*PIPELINES, "StableDiffusionPipeline", "DDIMPipeline"])
EVERY_PIPELINE = pytest.mark.parametrize("name", [*TINY_PIPELINES, *OWN_PIPELINES])
_CATALOGUE = TINY_PIPELINES | UNET_PIPELINES | OWN_PIPELINES


def build(name: str) -> DiffusionPipeline:
    """Returns a new tiny pipeline; UNets have one layer in each stage."""
    pipe = _CATALOGUE[name].build()
    if name == "StableDiffusionPipeline":
        pipe.unet = small_unet()
    if name == "DDIMPipeline":
        pipe.unet = build_model(UNet2DModel, DDPM | {"layers_per_block": 1})
    return pipe


def component_of(pipe: Any) -> str:
    """Returns the name of a pipeline's denoiser."""
    return "unet" if "unet" in pipe.components else "transformer"


def denoiser_of(pipe: Any) -> nn.Module:
    """Returns a pipeline's denoiser."""
    return getattr(pipe, component_of(pipe))


def accelerated(name: str, method: str, steps: int = STEPS) -> Any:
    """Returns a new tiny pipeline with a method enabled, for calls with this many evaluations."""
    pipe = build(name)
    return fastdiff.enable(pipe, methods_for(pipe, method, steps))


def methods_for(pipe: DiffusionPipeline, method: str, evaluations: int = STEPS) -> Any:
    """Returns what `fastdiff.enable` takes, for this pipeline's denoiser."""
    return (METHODS | UNET_METHODS)[method](view(denoiser_of(pipe)).names, evaluations)


def sample(pipe: DiffusionPipeline, name: str, **arguments: Any) -> torch.Tensor:
    """Returns what one call of a tiny pipeline samples; the arguments are those of `TinyPipeline.inputs`."""
    torch.manual_seed(0)  # DiTPipeline does not hand its generator to the scheduler
    result = pipe(**inputs_of(name, **arguments), return_dict=False)[0]
    return torch.stack([torch.as_tensor(item) for item in result])


def inputs_of(name: str, **arguments: Any) -> dict[str, Any]:
    """Returns the arguments of a call."""
    return _CATALOGUE[name].inputs(**{"steps": STEPS, **arguments})


def record_of(pipe: Any, denoiser: str | None = None) -> DenoiserRecord:
    """Returns the record of a denoiser, by default the first, in the last call."""
    return pipe.fastdiff.last_run.denoisers[denoiser or component_of(pipe)]


def denoiser_calls(pipe: DiffusionPipeline, name: str, **arguments: Any) -> list[dict[str, Any]]:
    """Returns the keyword arguments of every denoiser call that a plain call of the pipeline makes."""
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        calls.append({key: value for key, value in bound.items() if key not in ("self", "return_dict")})

    handle = denoiser_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    sample(pipe, name, **arguments)
    handle.remove()
    return calls


@contextmanager
def counting_blocks(pipe: DiffusionPipeline, name: str, methods: Any = ()) -> Iterator[BlockCalls]:
    """Counts the units that compute in each call of a plain pipeline's denoiser; accelerate it inside."""
    inputs = denoiser_calls(pipe, name, steps=2)[0]
    denoiser = denoiser_of(pipe)
    with counting(denoiser, view(denoiser, level_of(as_methods(methods))).names, inputs) as calls:
        yield calls


def planned_runs(record: DenoiserRecord) -> np.ndarray:
    """Returns which units the lowered plan computes in each denoiser call, of shape `(calls, units)`."""
    (plan,) = record.plans
    first = record.calls[0].evaluation
    return np.array([plan.table[call.evaluation - first] == Action.COMPUTE for call in record.calls])
