"""Every call says what it did, and a call in which an enabled method did nothing warns and says why."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from engine.cases import (
    EVERY_CASE,
    NEUTRAL,
    STEPS,
    accelerated,
    build,
    component_of,
    denoiser_calls,
    denoiser_of,
    record_of,
    sample,
)
from torch import nn

import fastdiff
from fastdiff import Action, ComputePlan, ExitSchedule, FastDiffNoEffectWarning, FeatureInheritance, LayerSkipping
from fastdiff.backbones import view
from fastdiff.engine import sampling_run
from tiny.models import TINY_MODELS


@pytest.mark.parametrize("name", ["DiTPipeline", "FluxPipeline"])
def test_too_few_steps_warn(name: str) -> None:
    pipe = build(name)
    fastdiff.enable(pipe, FeatureInheritance(interval=3))
    said = r"FeatureInheritance\(interval=3\).*nothing.*2 evaluations"
    with pytest.warns(FastDiffNoEffectWarning, match=said) as seen:
        sample(pipe, name, steps=2)
    named = [warning.filename for warning in seen if warning.category is FastDiffNoEffectWarning]
    assert named == [inspect.getfile(sample)]  # where the pipeline is called, not where fastdiff warns


@EVERY_CASE
def test_active_methods_do_not_warn_and_neutral_ones_need_not(name: str, method: str) -> None:
    pipe = accelerated(name, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastDiffNoEffectWarning)
        sample(pipe, name)
    assert (pipe.fastdiff.last_run.skipped == 0) == (method in NEUTRAL)


@pytest.mark.parametrize(
    "method",
    [FeatureInheritance(interval=1), LayerSkipping(speedup=1), ExitSchedule("full"), ExitSchedule.step(4, 500, 4)],
)
def test_settings_that_ask_for_nothing_do_not_warn(method: Any) -> None:
    pipe = build("DiTPipeline")
    fastdiff.enable(pipe, method)
    sample(pipe, "DiTPipeline", steps=2)
    assert pipe.fastdiff.last_run.skipped == 0


def test_method_that_never_acts_warns() -> None:
    """An exit schedule whose shallow bins no timestep falls into."""
    pipe = build("DiTPipeline")
    fastdiff.enable(pipe, ExitSchedule(bin_edges=(0, 998.5), depths=(4, 1)))
    with pytest.warns(FastDiffNoEffectWarning, match="the plan computes every unit in every evaluation"):
        sample(pipe, "DiTPipeline", steps=12)


def test_denoiser_that_is_never_called_warns() -> None:
    pipe = build("DiTPipeline")
    fastdiff.enable(pipe, FeatureInheritance())
    with pytest.warns(FastDiffNoEffectWarning, match="no accelerated denoiser was called"), pipe.fastdiff.sampling():
        pipe.scheduler.set_timesteps(STEPS)
    assert pipe.fastdiff.last_run.calls == 0
    assert "0 calls" in pipe.fastdiff.summary()


def test_loop_without_a_grid_computes_in_full_and_warns() -> None:
    pipe = build("DiTPipeline")
    inputs = denoiser_calls(pipe, "DiTPipeline")
    with torch.no_grad():
        plain = [pipe.transformer(**call, return_dict=False)[0] for call in inputs]
        accelerated_loop = sampling_run(pipe.transformer, FeatureInheritance(), scheduler=DDIMScheduler())
        with pytest.warns(FastDiffNoEffectWarning, match="timesteps were not set"), accelerated_loop as run:
            outputs = [pipe.transformer(**call, return_dict=False)[0] for call in inputs]
    assert all(map(torch.equal, outputs, plain))
    assert run.record.denoisers["denoiser"].fallbacks == {"the scheduler's timesteps were not set": STEPS}


def test_failed_call_does_not_warn_too() -> None:
    pipe = build("DiTPipeline")
    fastdiff.enable(pipe, FeatureInheritance())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastDiffNoEffectWarning)
        with pytest.raises(KeyboardInterrupt), pipe.fastdiff.sampling():
            raise KeyboardInterrupt
    assert not pipe.fastdiff.last_run.completed


def test_more_evaluations_than_the_grid_are_computed_and_told() -> None:
    pipe = build("DiTPipeline")
    inputs = denoiser_calls(pipe, "DiTPipeline")
    units = view(pipe.transformer).names
    plan = ComputePlan(np.array([[Action.COMPUTE] * 4, [Action.REUSE] * 4]), units)
    with torch.no_grad(), sampling_run(pipe.transformer, plan, timesteps=pipe.scheduler.timesteps[:2]) as run:
        for call in inputs[:4]:
            pipe.transformer(**call)
            run.tick()
    record = run.record.denoisers["denoiser"]
    assert [call.actions.count(Action.COMPUTE) for call in record.calls] == [4, 0, 4, 4]
    assert record.fallbacks == {"more evaluations than the scheduler's grid has": 2}


# -- the record --------------------------------------------------------------------------------------------------------


@EVERY_CASE
def test_record_says_what_happened(name: str, method: str) -> None:
    pipe = accelerated(name, method)
    sample(pipe, name)
    run, record = pipe.fastdiff.last_run, record_of(pipe)

    assert run.completed
    assert 0 < run.seconds < 600
    assert run.methods == tuple(str(method) for method in pipe.fastdiff.methods)
    assert list(run.denoisers) == [component_of(pipe)]
    assert record.class_name == type(denoiser_of(pipe)).__name__
    cells = record.cells()
    assert sum(cells.values()) == len(record.calls) * len(record.units)
    by_branch = [record.cells(branch) for branch in record.branches]
    assert cells == {action.name: sum(counts[action.name] for counts in by_branch) for action in Action}
    assert cells["COMPUTE"] / sum(cells.values()) == pytest.approx(record.computed_share)
    executed = record.plan
    assert np.array_equal(executed.table, record.plans[0].table)
    assert executed.units == record.units
    assert (record.peak_bytes > 0) == any(cells[action] for action in ("REUSE", "FORECAST"))
    text = pipe.fastdiff.summary()
    for word in (*run.methods, record.class_name, f"{len(record.calls)} calls", "MACs", f"{len(record.units)} units"):
        assert word in text


@pytest.mark.parametrize("name", ["DiTPipeline", "FluxPipeline"])
@pytest.mark.parametrize("span", [(1, -1), (0, None)])
def test_a_run_of_reused_blocks_keeps_one_residual(name: str, span: tuple[int, int | None]) -> None:
    """Of each stream, in each block list and branch; never one for each block."""
    pipe = build(name)
    inputs = denoiser_calls(pipe, name)
    sizes: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        streams = output if isinstance(output, tuple) else (output,)
        sizes.append(sum(stream.nbytes for stream in streams))

    handle = view(pipe.transformer).units[0].module.register_forward_hook(note)
    with torch.no_grad():
        pipe.transformer(**inputs[0])
    handle.remove()
    fastdiff.enable(pipe, FeatureInheritance(span=span))
    sample(pipe, name)
    record = record_of(pipe)
    block_lists = {unit.split(".")[0] for unit in record.units}
    assert record.peak_bytes == sizes[0] * len(block_lists) * len(record.branches)


def test_forecasts_keep_as_many_values_as_their_order_needs() -> None:
    pipe = build("DiTPipeline")
    peaks = []
    for order in (0, 1, 2):
        fastdiff.enable(pipe, FeatureInheritance(order=order, last_key=False))
        sample(pipe, "DiTPipeline", steps=12)
        peaks.append(record_of(pipe).peak_bytes)
    assert peaks[1] == 2 * peaks[0]
    assert peaks[2] == 3 * peaks[0]


def test_executed_plan_can_be_used_again() -> None:
    """What a run did, frozen into a plan, samples the same."""
    pipe = accelerated("FluxPipeline", "merged")
    sampled = sample(pipe, "FluxPipeline")
    fastdiff.enable(pipe, record_of(pipe).plan)
    assert torch.equal(sample(pipe, "FluxPipeline"), sampled)


# -- a run within which shapes or branches change ----------------------------------------------------------------------


@torch.no_grad()
def test_batch_that_grows_within_a_run_is_never_broadcast() -> None:
    """Batch 1, then 2, in one loop: residuals of one image must not be added to two."""
    tiny = TINY_MODELS["SD3Transformer2DModel"]
    model = tiny.build()
    scheduler = FlowMatchEulerDiscreteScheduler()
    with sampling_run(model, FeatureInheritance(interval=3, span=(1, -1), last_key=False), scheduler=scheduler) as run:
        scheduler.set_timesteps(6)
        for batch, timestep in zip((1, 1, 2, 2, 2, 2), scheduler.timesteps, strict=True):
            inputs = tiny.inputs(batch, 0)
            output = model(**inputs, return_dict=False)[0]
            scheduler.step(output, timestep, inputs["hidden_states"])
            if run.clock.evaluation == 3:
                after_the_change, given = output, inputs
    assert torch.equal(after_the_change, model(**given, return_dict=False)[0])
    record = run.record.denoisers["denoiser"]
    assert [call.actions.count(Action.COMPUTE) for call in record.calls] == [4, 2, 4, 4, 2, 2]
    assert record.fallbacks == {"nothing kept to reuse for this branch and shape": 1}


@torch.no_grad()
def test_size_that_changes_within_a_run_is_computed() -> None:
    """As in pipelines that raise the resolution half-way; the text is the same, so the branch is."""
    tiny = TINY_MODELS["SD3Transformer2DModel"]
    model = tiny.build()
    inputs = tiny.inputs(1, 0)
    wide = inputs | {"hidden_states": torch.cat([inputs["hidden_states"]] * 2, dim=-1)}
    with sampling_run(model, FeatureInheritance(interval=4, span=(1, -1)), timesteps=torch.linspace(1000, 1, 8)) as run:
        for call in [inputs] * 3 + [wide] * 4 + [inputs]:
            model(**call)
            run.tick()
    record = run.record.denoisers["denoiser"]
    assert [call.actions.count(Action.COMPUTE) for call in record.calls] == [4, 2, 2, 4, 4, 2, 2, 4]
    assert len(record.branches) == 1
