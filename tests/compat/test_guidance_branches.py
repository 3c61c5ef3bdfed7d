"""Guidance branches evaluated one after the other are told apart by what they are conditioned on, never by order."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from engine.cases import STEPS, build, denoiser_calls, record_of, sample
from torch import nn

import fastdiff
from fastdiff import Action, FeatureInheritance
from fastdiff.engine import DenoiserRecord, sampling_run
from tiny.models import TINY_MODELS

METHOD = FeatureInheritance(interval=3, order=1, last_key=False)
WITHOUT_CONTEXT = pytest.mark.parametrize("name", ["FluxControlNetPipeline", "Lumina2Pipeline", "ChromaPipeline"])
Call = dict[str, Any]


def run(
    model: nn.Module, evaluations: Sequence[Sequence[Call]], contexts: Sequence[str | None] = (None, None)
) -> tuple[list[list[torch.Tensor]], DenoiserRecord]:
    """Evaluates a denoiser in a loop of its own; returns predictions by evaluation and call."""
    timesteps = torch.linspace(1000, 1, len(evaluations))
    with torch.no_grad(), sampling_run(model, METHOD, timesteps=timesteps) as sampling:
        predictions = []
        for calls in evaluations:
            predictions.append([])
            for name, call in zip(contexts, calls, strict=False):
                with model.cache_context(name) if name else nullcontext():
                    predictions[-1].append(model(**call, return_dict=False)[0])
            sampling.tick()
    return predictions, sampling.record.denoisers["denoiser"]


def evaluations_of(name: str) -> tuple[nn.Module, list[list[Call]]]:
    """Returns a pipeline's denoiser and the calls of two branches for each evaluation."""
    pipe = build(name)
    calls = denoiser_calls(pipe, name)
    if len(calls) == STEPS:
        pytest.skip("this diffusers does not evaluate a negative prompt here")
    assert len(calls) == 2 * STEPS
    return pipe.transformer, [calls[start : start + 2] for start in range(0, len(calls), 2)]


@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline", "QwenImagePipeline", "CogView4Pipeline"])
def test_branches_without_a_context_are_those_with_one(name: str) -> None:
    model, evaluations = evaluations_of(name)
    named, with_names = run(model, evaluations, ("cond", "uncond"))
    unnamed, without = run(model, evaluations)
    assert {branch.context for branch in with_names.branches} == {"cond", "uncond"}
    assert [(branch.context, branch.conditioning) for branch in without.branches] == [(None, 0), (None, 1)]
    assert not with_names.fallbacks
    assert not without.fallbacks
    assert all(torch.equal(x, y) for a, b in zip(named, unnamed, strict=True) for x, y in zip(a, b, strict=True))


def test_pipelines_that_open_a_context_name_their_branches() -> None:
    pipe = build("WanPipeline")
    opened: list[str] = []
    own = pipe.transformer.cache_context

    def cache_context(name: str, *args: Any, **kwargs: Any) -> Any:
        opened.append(name)
        return own(name, *args, **kwargs)

    pipe.transformer.cache_context = cache_context
    fastdiff.enable(pipe, METHOD)
    sample(pipe, "WanPipeline")
    assert opened == ["cond", "uncond"] * STEPS
    assert {branch.context for branch in record_of(pipe).branches} == {"cond", "uncond"}
    assert vars(pipe.transformer)["cache_context"] is cache_context  # the user's own is put back


@WITHOUT_CONTEXT
def test_each_branch_is_what_it_is_alone(name: str) -> None:
    model, evaluations = evaluations_of(name)
    both, record = run(model, evaluations)
    assert len(record.branches) == 2
    for branch in (0, 1):
        alone, _ = run(model, [[calls[branch]] for calls in evaluations])
        assert all(torch.equal(pair[branch], one[0]) for pair, one in zip(both, alone, strict=True))
    assert not torch.equal(both[0][0], both[0][1])


@WITHOUT_CONTEXT
def test_order_of_the_branches_may_change_midway(name: str) -> None:
    model, evaluations = evaluations_of(name)
    expected, _ = run(model, evaluations)
    swapped, record = run(model, [calls[::-1] if row % 2 else calls for row, calls in enumerate(evaluations)])
    assert len(record.branches) == 2
    for row, (a, b) in enumerate(zip(expected, swapped, strict=True)):
        assert all(map(torch.equal, a, b[::-1] if row % 2 else b))


def fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


@WITHOUT_CONTEXT
def test_conditioning_made_anew_in_each_step_is_recognised(name: str) -> None:
    model, evaluations = evaluations_of(name)
    expected, _ = run(model, evaluations)
    anew, record = run(
        model, [[{key: fresh(value) for key, value in call.items()} for call in calls] for calls in evaluations]
    )
    assert len(record.branches) == 2
    assert not record.fallbacks
    assert all(torch.equal(x, y) for a, b in zip(expected, anew, strict=True) for x, y in zip(a, b, strict=True))


@WITHOUT_CONTEXT
def test_prompt_that_changes_midway_is_another_branch(name: str) -> None:
    """Nothing kept for one prompt may be added to another; written into the same memory, it still is another."""
    model, evaluations = evaluations_of(name)
    changed = {key: fresh(value) for key, value in evaluations[0][0].items()}
    text = changed["encoder_hidden_states"]
    rows = [[{**calls[0], "encoder_hidden_states": text}] for calls in evaluations]
    timesteps = torch.linspace(1000, 1, len(rows))
    with torch.no_grad(), sampling_run(model, METHOD, timesteps=timesteps) as sampling:
        for row, calls in enumerate(rows):
            if row == 4:
                text.mul_(-1)
            prediction = model(**calls[0], return_dict=False)[0]
            sampling.tick()
            if row == 4:
                after_the_change = prediction
    record = sampling.record.denoisers["denoiser"]
    assert len(record.branches) == 2
    assert record.fallbacks == {"nothing kept to reuse for this branch and shape": 2}  # until the next key
    with torch.no_grad():
        assert torch.equal(after_the_change, model(**rows[4][0], return_dict=False)[0])


def test_equal_prompts_are_branches_by_their_order() -> None:
    """With an empty prompt on both sides nothing but the order tells the calls of an evaluation apart."""
    model, evaluations = evaluations_of("ChromaPipeline")
    both, record = run(model, [[calls[0], dict(calls[0])] for calls in evaluations])
    assert [(branch.conditioning, branch.occurrence) for branch in record.branches] == [(0, 0), (0, 1)]
    alone, _ = run(model, [[calls[0]] for calls in evaluations])
    assert all(torch.equal(pair[0], one[0]) and torch.equal(*pair) for pair, one in zip(both, alone, strict=True))


@torch.no_grad()
def test_guidance_that_starts_late_computes_before_it_reuses() -> None:
    """As with guidance only in an interval: a branch first seen between keys has nothing to reuse."""
    model, evaluations = evaluations_of("ChromaPipeline")
    rows = [calls[:1] if row < 4 else calls for row, calls in enumerate(evaluations)]
    predictions, record = run(model, rows)
    late = [call for call in record.calls if call.branch == record.branches[1]]
    assert [call.actions.count(Action.COMPUTE) for call in late] == [6, 6, 6]
    assert torch.equal(predictions[4][1], model(**rows[4][1], return_dict=False)[0])
    assert record.fallbacks == {"nothing kept to reuse for this branch and shape": 2}


# -- how the timestep arrives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HunyuanDiT2DModel", "ZImageTransformer2DModel", "SD3Transformer2DModel"])
@pytest.mark.parametrize("positional", [True, False])
@torch.no_grad()
def test_timestep_may_be_passed_by_position_or_by_keyword(name: str, positional: bool) -> None:
    """Denoisers order their arguments differently, and a loop may start inside the grid."""
    tiny = TINY_MODELS[name]
    model = tiny.build()
    inputs = tiny.inputs(1, 0)
    order = [key for key in inspect.signature(model.forward).parameters if key in inputs]
    scheduler = FlowMatchEulerDiscreteScheduler()
    method = FeatureInheritance(interval=2, last_key=False)
    with sampling_run(model, method, scheduler=scheduler) as sampling:
        scheduler.set_timesteps(8)
        for timestep in scheduler.timesteps[4:]:
            given = inputs[tiny.timestep]
            timed = inputs | {tiny.timestep: timestep.expand(given.shape).to(given.dtype)}
            leading = order[: order.index(tiny.timestep) + 1] if positional else []
            prediction = model(*[timed.pop(key) for key in leading], **timed, return_dict=False)[0]
            sampled = torch.stack(prediction) if isinstance(prediction, list) else prediction
            scheduler._step_index = None
            scheduler.step(sampled, timestep, torch.zeros_like(sampled))
    record = sampling.record.denoisers["denoiser"]
    assert [call.evaluation for call in record.calls] == [4, 5, 6, 7]
    assert [call.actions.count(Action.COMPUTE) for call in record.calls] == [len(record.units), 0, len(record.units), 0]
