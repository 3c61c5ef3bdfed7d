"""A sampling loop as pipelines write it, around a tiny UNet, and the reuse of features written down a second time."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from fastdiff.engine import DenoiserRecord, sampling_run
from tiny.base import TEXT_DIM, TEXT_TOKENS, Draw, build
from tiny.unet_condition import SMALL_SD

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""Noise levels of Stable Diffusion."""
SCALE = 3.0


def small_unet(**changes: Any) -> UNet2DConditionModel:
    """Returns a UNet of three stages with one layer each, whose sizes are rounded where they are no multiple of 4."""
    return build(UNet2DConditionModel, SMALL_SD | {"layers_per_block": 1} | changes)


def make_scheduler(name: str = "DDIM", **config: Any) -> Any:
    """Returns a scheduler with Stable Diffusion's noise levels."""
    cls = getattr(diffusers, f"{name}Scheduler")
    unclipped = {"clip_sample": False} if "clip_sample" in inspect.signature(cls.__init__).parameters else {}
    return cls(**NOISE | unclipped | config)


@dataclass
class Sampled:
    """What a loop made: the latents, each evaluation's prediction before guidance, and the record."""

    latents: torch.Tensor
    predictions: list[torch.Tensor]
    record: DenoiserRecord | None


@torch.no_grad()
def sample_loop(
    model: nn.Module,
    methods: Any = None,
    *,
    scheduler: str = "DDIM",
    steps: int = 12,
    batch: int = 1,
    guidance: bool = True,
    size: tuple[int, int] = (8, 8),
    seed: int = 0,
    conditioning: Callable[[Draw, int], dict[str, Any]] | None = None,
    before: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None,
    edit: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    apart: bool = False,
    guided_until: int | None = None,
) -> Sampled:
    """Samples latents.

    Args:
        model: the UNet.
        methods: how to accelerate it; None for the plain model.
        scheduler: name of the scheduler's class.
        steps: solver steps.
        batch: number of images.
        guidance: whether there are an unconditional and a conditional half.
        size: height and width of the latents.
        seed: of noise and prompts.
        conditioning: `(draw, rows)` to what the model is called with beside the sample and the timestep.
        before: `(evaluation, arguments)` to the arguments that the model is called with.
        edit: `(evaluation, latents)` to the latents that the next evaluation starts from.
        apart: whether the halves are calls of their own.
        guided_until: the evaluation from which on there is the conditional half alone.
    """
    draw, halves = Draw(seed), 1 + guidance
    channels = model.config.out_channels
    latents = draw(batch, channels, *size)
    given = (conditioning or text_of)(draw, halves * batch)
    solver = make_scheduler(scheduler)
    noise = torch.Generator().manual_seed(1)
    options = {"generator": noise} if "generator" in inspect.signature(type(solver).step).parameters else {}
    predictions = []
    run_of = nullcontext() if methods is None else sampling_run(model, methods, scheduler=solver)
    with run_of as run:
        solver.set_timesteps(steps)
        latents = latents * solver.init_noise_sigma
        for evaluation, timestep in enumerate(solver.timesteps):
            if evaluation == guided_until:
                halves, given = 1, _rows(given, batch, batch)
            doubled = solver.scale_model_input(torch.cat([latents] * halves), timestep)
            call = {"sample": doubled, "timestep": timestep, **given}
            call = before(evaluation, call) if before else call
            if apart:
                calls = [_rows(call, half * batch, batch) for half in range(halves)]
                prediction = torch.cat([model(**part, return_dict=False)[0] for part in calls])
            else:
                prediction = model(**call, return_dict=False)[0]
            predictions.append(prediction)
            guided = prediction
            if halves == 2:
                unguided, wanted = prediction.chunk(2)
                guided = unguided + SCALE * (wanted - unguided)
            latents = solver.step(guided, timestep, latents, **options).prev_sample
            latents = edit(evaluation, latents) if edit else latents
    return Sampled(latents, predictions, run.record.denoisers["denoiser"] if run else None)


def assert_same(one: Sampled, other: Sampled) -> None:
    """Refuses two calls that differ in a bit."""
    assert torch.equal(one.latents, other.latents)
    assert all(map(torch.equal, one.predictions, other.predictions))


def text_of(draw: Draw, rows: int) -> dict[str, Any]:
    """Returns random text states."""
    return {"encoder_hidden_states": draw(rows, TEXT_TOKENS, TEXT_DIM)}


def _rows(value: Any, first: int, number: int) -> Any:
    if isinstance(value, dict):
        return {key: _rows(item, first, number) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(item, first, number) for item in value)
    return value[first : first + number] if isinstance(value, torch.Tensor) and value.ndim else value


# -- reuse, written down a second time ---------------------------------------------------------------------------------


@contextmanager
def kept_between(model: nn.Module, modules: Sequence[nn.Module], keys: Sequence[int]) -> Iterator[None]:
    """Makes some modules run in the calls of these numbers only; in others they return what they returned last.

    It is copied as often as it is handed out, and the rest of the model runs as it always does.
    """
    kept: dict[int, Any] = {}
    calls = 0

    def note(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def module_forward(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if calls - 1 not in keys:
            return copy.deepcopy(kept[index])
        output = forward(*args, **kwargs)
        kept[index] = copy.deepcopy(output)  # one copy of what is in it twice
        return output

    handle = model.register_forward_pre_hook(note)
    for index, module in enumerate(modules):
        module.forward = functools.partial(module_forward, index, module.forward)
    try:
        yield
    finally:
        handle.remove()
        for module in modules:
            del vars(module)["forward"]


def encoder_of(model: UNet2DConditionModel) -> list[nn.Module]:
    """Returns the first convolution, the down stages and the bottleneck."""
    return [model.conv_in, *model.down_blocks, model.mid_block]


class RowCounter:
    """Calls and rows of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        module.register_forward_hook(lambda module, inputs, output: self.rows.append(len(inputs[0])))


def counters(model: UNet2DConditionModel) -> tuple[RowCounter, RowCounter]:
    """Counts the calls of a layer inside of the encoder's first column, and of one inside of the decoder's last."""
    return RowCounter(model.down_blocks[0].resnets[0].norm1), RowCounter(model.up_blocks[-1].resnets[-1].norm1)
