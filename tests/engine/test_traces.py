"""`disable` leaves no trace, a call leaves none but its record, and instances do not know of each other."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from engine.cases import (
    EVERY_CASE,
    SOME_PIPELINES,
    STEPS,
    accelerated,
    build,
    counting_blocks,
    methods_for,
    planned_runs,
    record_of,
    sample,
)
from torch import nn

import fastdiff
from fastdiff import ExitSchedule, FastDiffPipeline, FeatureInheritance, LayerSkipping
from fastdiff.engine import sampling_run


def state(pipe: Any) -> dict[str, Any]:
    """Returns everything about a pipeline that acceleration could change: types, attributes, hooks, weights."""
    found: dict[str, Any] = {"class": type(pipe), "attributes": set(vars(pipe)), "components": dict(pipe.components)}
    found["scheduler"] = (type(pipe.scheduler), set(vars(pipe.scheduler)), dict(pipe.scheduler.config))
    for name, component in pipe.components.items():
        for path, module in component.named_modules() if isinstance(component, nn.Module) else ():
            hooks = (dict(module._forward_hooks), dict(module._forward_pre_hooks))
            found[f"{name}.{path}"] = (type(module), set(vars(module)), module.forward, hooks)
        if isinstance(component, nn.Module):
            found[f"{name} weights"] = {key: value._version for key, value in component.state_dict().items()}
    found["graphs"] = torch._dynamo.config.recompile_limit
    return found


@EVERY_CASE
def test_disable_leaves_no_trace(name: str, method: str) -> None:
    pipe = build(name)
    plain = sample(pipe, name)
    before = state(pipe)

    assert fastdiff.enable(pipe, methods_for(pipe, method)) is pipe
    sample(pipe, name)
    assert fastdiff.disable(pipe) is pipe
    assert state(pipe) == before
    assert not isinstance(pipe, FastDiffPipeline)
    assert not hasattr(pipe, "fastdiff")
    assert torch.equal(sample(pipe, name), plain)


@SOME_PIPELINES
def test_call_leaves_nothing_but_its_record(name: str) -> None:
    pipe = accelerated(name, "inherit-1")
    with fastdiff.disabled(pipe):
        sample(pipe, name)  # diffusers itself leaves something behind in its first call
    before = state(pipe)
    sample(pipe, name)
    assert state(pipe) == before


def test_disable_of_a_plain_pipeline_does_nothing() -> None:
    pipe = build("DiTPipeline")
    before = state(pipe)
    assert fastdiff.disable(pipe) is pipe
    assert state(pipe) == before


@SOME_PIPELINES
def test_two_instances_of_one_class_are_independent(name: str) -> None:
    plain, skipping, exiting = build(name), build(name), build(name)
    expected = sample(plain, name)
    fastdiff.enable(skipping, LayerSkipping())
    fastdiff.enable(exiting, ExitSchedule.step(full=4, t_switch=500, d_low=2))
    first = {id(pipe): sample(pipe, name) for pipe in (skipping, exiting)}

    assert torch.equal(sample(plain, name), expected)
    for pipe in (exiting, skipping):
        assert torch.equal(sample(pipe, name), first[id(pipe)])
    assert not torch.equal(first[id(skipping)], first[id(exiting)])
    fastdiff.disable(skipping)
    assert torch.equal(sample(exiting, name), first[id(exiting)])
    assert torch.equal(sample(skipping, name), expected)


def test_two_pipelines_may_sample_in_turns() -> None:
    """A call inside another pipeline's call neither sees nor disturbs it."""
    outer, inner = accelerated("FluxPipeline", "inherit-1"), accelerated("FluxPipeline", "layers-reuse")
    expected = [sample(pipe, "FluxPipeline") for pipe in (outer, inner)]
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            seen.append(sample(inner, "FluxPipeline"))
        return kwargs

    assert torch.equal(sample(outer, "FluxPipeline", callback_on_step_end=callback), expected[0])
    assert torch.equal(seen[0], expected[1])


@SOME_PIPELINES
def test_enabling_again_replaces_the_methods(name: str) -> None:
    pipe = build(name)
    own = type(pipe)
    with counting_blocks(pipe, name) as counted:
        for method in ("layers-reuse", "inherit-0", "exit-step"):
            fastdiff.enable(pipe, methods_for(pipe, method))
            counted.rows.clear()
            sampled = sample(pipe, name)
            assert (counted.table(record_of(pipe).units) == planned_runs(record_of(pipe))).all()
    assert type(pipe).__bases__ == (FastDiffPipeline, own)
    assert torch.equal(sampled, sample(accelerated(name, "exit-step"), name))
    fastdiff.disable(pipe)
    assert type(pipe) is own


def test_own_step_of_a_scheduler_survives_a_call() -> None:
    """Users log or alter steps by putting a function of their own on the scheduler."""
    pipe = build("DiTPipeline")
    step, steps = pipe.scheduler.step, []

    def logged(*args: Any, **kwargs: Any) -> Any:
        steps.append(args[1])
        return step(*args, **kwargs)

    pipe.scheduler.step = logged
    fastdiff.enable(pipe, FeatureInheritance())
    for calls in (1, 2):
        sample(pipe, "DiTPipeline")
        assert pipe.scheduler.step is logged
        assert len(steps) == calls * STEPS
        assert {call.evaluation for call in record_of(pipe).calls} == set(range(STEPS))


def test_pipeline_and_what_it_kept_can_be_freed() -> None:
    pipe = accelerated("DiTPipeline", "inherit-1")
    sample(pipe, "DiTPipeline")
    denoiser = weakref.ref(pipe.transformer)
    fastdiff.disable(pipe)
    del pipe
    gc.collect()
    assert denoiser() is None


def test_run_of_ones_own_loop_leaves_no_trace() -> None:
    pipe = build("DiTPipeline")
    before = state(pipe)
    with sampling_run(pipe.transformer, ExitSchedule("full"), scheduler=pipe.scheduler) as run:
        pipe.scheduler.set_timesteps(STEPS)
        assert run.clock.grid is not None
        assert len(run.clock.grid) == STEPS
        assert state(pipe) != before
    assert state(pipe) == before


@pytest.mark.parametrize("given", [{}, {"scheduler": DDIMScheduler(), "timesteps": torch.arange(3)}])
def test_run_of_ones_own_loop_needs_one_clock(given: dict[str, Any]) -> None:
    pipe = build("DiTPipeline")
    before = state(pipe)
    with (
        pytest.raises(ValueError, match="either the scheduler"),
        sampling_run(pipe.transformer, FeatureInheritance(), **given),
    ):
        pass
    assert state(pipe) == before
