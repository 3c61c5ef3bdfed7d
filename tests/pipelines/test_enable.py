"""Enabling, disabling and what `pipe.fastdiff` says; nothing is ever half-enabled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from engine.cases import EVERY_PIPELINE, METHODS, STEPS, accelerated, build, methods_for, record_of, sample
from torch import nn

import fastdiff
from fastdiff import (
    ComputePlan,
    ConfigError,
    ExitSchedule,
    FastDiffNoEffectWarning,
    FastDiffPipeline,
    FeatureInheritance,
    LayerSkipping,
    ProfileMismatchError,
    StateError,
    UnsupportedBackboneError,
    UnsupportedPipelineError,
)
from fastdiff.backbones import view
from fastdiff.pipelines.acceleration import PRESETS

NAME = "DiTPipeline"


class Odd(DiffusionPipeline):
    """A pipeline whose denoiser has no blocks, or that has no denoiser at all."""

    def __init__(self, scheduler: Any, vae: Any = None, transformer: Any = None) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, vae=vae, transformer=transformer)

    def __call__(self, num_inference_steps: int = 4) -> int:
        self.scheduler.set_timesteps(num_inference_steps)
        return len(self.scheduler.timesteps)


def small_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)


ODD: dict[str, tuple[Callable[[], DiffusionPipeline], type[Exception], str]] = {
    "unsupported denoiser": (
        lambda: Odd(DDIMScheduler(), transformer=small_autoencoder()),
        UnsupportedBackboneError,
        "AutoencoderKL has no block list",
    ),
    "no denoiser": (
        lambda: Odd(DDIMScheduler(), vae=small_autoencoder()),
        UnsupportedPipelineError,
        "Odd needs a scheduler and a denoiser.*transformer.*components scheduler",
    ),
    "no scheduler": (
        lambda: Odd(None, transformer=build(NAME).transformer),
        UnsupportedPipelineError,
        "Odd needs a scheduler",
    ),
}
EVERY_ODD = pytest.mark.parametrize("kind", ODD)


def assert_plain(pipe: DiffusionPipeline) -> None:
    """Nothing of an acceleration is on the pipeline."""
    assert not fastdiff.is_enabled(pipe)
    assert not isinstance(pipe, FastDiffPipeline)
    assert "fastdiff" not in vars(pipe)
    for component in pipe.components.values():
        for module in component.modules() if isinstance(component, nn.Module) else ():
            assert not hasattr(module, "_diffusers_hook") or "fastdiff" not in module._diffusers_hook.hooks


# -- what is enabled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_presets(preset: str | None) -> None:
    pipe = build(NAME)
    plain = sample(pipe, NAME, steps=20)
    fastdiff.enable(pipe, preset=preset)
    assert pipe.fastdiff.methods == PRESETS[preset or "balanced"]
    assert torch.equal(sample(pipe, NAME, steps=20), plain) == (preset == "off")
    assert preset == "off" or 0.1 < pipe.fastdiff.last_run.denoisers["transformer"].computed_share < 0.6


def test_presets_leave_few_step_calls_alone_and_say_so() -> None:
    pipe = build(NAME)
    plain = sample(pipe, NAME, steps=4)
    fastdiff.enable(pipe)
    with pytest.warns(FastDiffNoEffectWarning, match="4 evaluations are too few"):
        assert torch.equal(sample(pipe, NAME, steps=4), plain)


def test_off_and_an_empty_list_accelerate_nothing() -> None:
    pipe = build(NAME)
    plain = sample(pipe, NAME)
    for arguments in ({"preset": "off"}, {"methods": []}):
        fastdiff.enable(pipe, **arguments)
        assert torch.equal(sample(pipe, NAME), plain)
        assert pipe.fastdiff.last_run is None
        with pytest.raises(StateError, match="Nothing is accelerated"):
            pipe.fastdiff.plan(10)


def test_one_method_or_several_or_a_plan() -> None:
    pipe = build(NAME)
    plan = ComputePlan.full(STEPS, view(pipe.transformer).names)
    for methods in (
        FeatureInheritance(),
        [FeatureInheritance()],
        (FeatureInheritance(), LayerSkipping()),
        plan,
        [plan],
    ):
        fastdiff.enable(pipe, methods)
        sample(pipe, NAME)
        assert len(pipe.fastdiff.methods) == (len(methods) if isinstance(methods, (list, tuple)) else 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"preset": "turbo"}, ConfigError, "no preset 'turbo'.*quality, balanced, fast"),
        ({"preset": 3}, ConfigError, "no preset 3"),
        ({"methods": [], "preset": "fast"}, ConfigError, "either methods or a preset"),
        ({"methods": "fast"}, ConfigError, "Expected methods.*'fast'"),
        ({"methods": [FeatureInheritance(), 3]}, ConfigError, "Expected methods.*3"),
        ({"methods": FeatureInheritance}, ConfigError, "Expected methods"),
        ({"methods": [], "on_unsupported": "ignore"}, ConfigError, "on_unsupported.*'ignore'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_and_change_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    pipe = build(NAME)
    with pytest.raises(error, match=message):
        fastdiff.enable(pipe, **arguments)
    assert_plain(pipe)

    fastdiff.enable(pipe, FeatureInheritance())
    expected, before = sample(pipe, NAME), pipe.fastdiff
    with pytest.raises(error, match=message):
        fastdiff.enable(pipe, **arguments)
    assert pipe.fastdiff is before
    assert torch.equal(sample(pipe, NAME), expected)
    assert record_of(pipe).skipped > 0


@pytest.mark.parametrize("thing", [None, 3, nn.Linear(2, 2), DDIMScheduler(), diffusers.DiTPipeline])
def test_only_pipelines_are_accelerated(thing: Any) -> None:
    with pytest.raises(UnsupportedPipelineError, match="takes a diffusers pipeline; got"):
        fastdiff.enable(thing)


# -- pipelines that cannot be accelerated ------------------------------------------------------------------------------


@EVERY_ODD
def test_unsupported_pipeline_raises(kind: str) -> None:
    make, error, message = ODD[kind]
    pipe = make()
    with pytest.raises(error, match=message):
        fastdiff.enable(pipe, FeatureInheritance())
    assert_plain(pipe)


@EVERY_ODD
@pytest.mark.parametrize("on_unsupported", ["warn", "off"])
def test_unsupported_pipeline_runs_unaccelerated(
    kind: str, on_unsupported: str, recwarn: pytest.WarningsRecorder
) -> None:
    make, _, message = ODD[kind]
    pipe = make()
    if on_unsupported == "warn":
        with pytest.warns(FastDiffNoEffectWarning, match=f"{message}.*runs unaccelerated"):
            fastdiff.enable(pipe, FeatureInheritance(), on_unsupported="warn")
    else:
        fastdiff.enable(pipe, FeatureInheritance(), on_unsupported="off")
    if pipe.scheduler is not None:
        assert pipe(num_inference_steps=5) == 5
    assert pipe.fastdiff.last_run is None
    assert not [warning for warning in recwarn if warning.category is FastDiffNoEffectWarning]
    with pytest.raises(StateError, match="Nothing is accelerated"):
        pipe.fastdiff.plan(10)
    assert "FeatureInheritance" in pipe.fastdiff.summary()
    fastdiff.disable(pipe)
    assert type(pipe) is Odd
    assert_plain(pipe)


def test_denoiser_that_became_unsupported_keeps_what_was_enabled() -> None:
    pipe = accelerated(NAME, "inherit-0")
    expected = sample(pipe, NAME)
    own, pipe.transformer = pipe.transformer, nn.Linear(2, 2)
    with pytest.raises(UnsupportedBackboneError):
        fastdiff.enable(pipe, LayerSkipping())
    pipe.transformer = own
    assert torch.equal(sample(pipe, NAME), expected)
    assert pipe.fastdiff.methods == (FeatureInheritance(),)


def test_second_denoiser_that_is_taken_leaves_the_first_untouched() -> None:
    """A pipeline's denoisers are accelerated all or not at all."""
    name = "WanPipeline (two experts)"
    first, second = build(name), build(name)
    second.transformer_2 = first.transformer_2
    fastdiff.enable(first, FeatureInheritance())
    expected = sample(first, name)
    with pytest.raises(StateError, match="WanTransformer3DModel is already accelerated"):
        fastdiff.enable(second, FeatureInheritance())
    assert not any(hasattr(unit.module, "_diffusers_hook") for unit in view(second.transformer).units)
    assert not isinstance(second, FastDiffPipeline)
    assert torch.equal(sample(first, name), expected)


# -- what an accelerated pipeline says ---------------------------------------------------------------------------------


@EVERY_PIPELINE
def test_plan_is_what_the_call_executes(name: str) -> None:
    """For methods that look at no timestep; those of some pipelines depend on the image size too."""
    pipe = build(name)
    fastdiff.enable(pipe, [FeatureInheritance(interval=3, order=1), LayerSkipping(fill="skip")])
    steps = 8
    planned = pipe.fastdiff.plan(steps)
    assert pipe.fastdiff.last_run is None
    sample(pipe, name, steps=steps)
    executed = record_of(pipe).plans[0]
    if "Img2Img" in name:
        assert (planned.evaluations, executed.evaluations) == (steps, steps // 2)
    else:
        assert np.array_equal(planned.table, executed.table)
    assert planned.units == executed.units


def test_plan_for_timesteps_is_what_the_call_executes() -> None:
    pipe = accelerated(NAME, "ase-demo")
    planned = pipe.fastdiff.plan(STEPS)
    sample(pipe, NAME)
    assert planned == record_of(pipe).plans[0]
    assert planned.meta["timesteps"] == pipe.scheduler.timesteps.tolist()


def test_plan_does_not_touch_the_scheduler() -> None:
    pipe = accelerated(NAME, "inherit-0")
    before = pipe.scheduler.timesteps.clone()
    pipe.fastdiff.plan(3)
    assert torch.equal(pipe.scheduler.timesteps, before)


def test_plan_of_the_second_denoiser() -> None:
    pipe = build("WanPipeline (two experts)")
    fastdiff.enable(pipe, FeatureInheritance())
    assert pipe.fastdiff.plan(9, denoiser="transformer_2").units == view(pipe.transformer_2).names


def test_plan_for_a_target_needs_a_call_first() -> None:
    pipe = build(NAME)
    fastdiff.enable(pipe, LayerSkipping(target_speedup=1.01, interval=0))
    with pytest.raises(StateError, match="call the pipeline once"):
        pipe.fastdiff.plan(STEPS)
    fastdiff.enable(pipe, ExitSchedule("full"))
    sample(pipe, NAME)
    assert pipe.fastdiff.plan(STEPS).share == 1


def test_summary() -> None:
    pipe = accelerated(NAME, "merged")
    text = pipe.fastdiff.summary()
    for word in (
        "ExitSchedule('ase-demo')",
        "FeatureInheritance(order=1)",
        "DiTTransformer2DModel",
        "4 units",
        "not called",
    ):
        assert word in text
    sample(pipe, NAME)
    assert "not called" not in pipe.fastdiff.summary()
    assert str(pipe.fastdiff.last_run) == pipe.fastdiff.last_run.summary()
    assert "tensor(" not in repr(pipe.fastdiff.last_run)
    with fastdiff.disabled(pipe):
        assert "disabled now" in pipe.fastdiff.summary()


@EVERY_PIPELINE
def test_call_keeps_its_signature_and_name(name: str) -> None:
    pipe = build(name)
    own = type(pipe)
    fastdiff.enable(pipe, FeatureInheritance())
    assert inspect.signature(pipe.__call__) == inspect.signature(own.__call__.__get__(pipe))
    assert type(pipe).__call__.__doc__ == own.__call__.__doc__
    assert type(pipe).__doc__ == own.__doc__
    assert type(pipe).__name__ == own.__name__
    assert isinstance(pipe, own)
    assert isinstance(pipe, FastDiffPipeline)
    assert pipe.components.keys() == build(name).components.keys()


# -- switching off for a while, and calls within calls -----------------------------------------------------------------


def test_disabled_samples_in_full_within_the_block() -> None:
    pipe = build(NAME)
    plain = sample(pipe, NAME)
    fastdiff.enable(pipe, FeatureInheritance())
    expected = sample(pipe, NAME)
    run = pipe.fastdiff.last_run
    with fastdiff.disabled(pipe) as same:
        assert same is pipe
        assert torch.equal(sample(pipe, NAME), plain)
        with fastdiff.disabled(pipe):
            assert torch.equal(sample(pipe, NAME), plain)
        assert torch.equal(sample(pipe, NAME), plain)
        assert pipe.fastdiff.last_run is run
    assert torch.equal(sample(pipe, NAME), expected)
    with pytest.raises(KeyError), fastdiff.disabled(pipe):
        raise KeyError
    assert torch.equal(sample(pipe, NAME), expected)


def test_disabled_needs_an_accelerated_pipeline() -> None:
    with pytest.raises(StateError, match="DiTPipeline is not accelerated"), fastdiff.disabled(build(NAME)):
        pass


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (lambda pipe: sample(pipe, "FluxPipeline"), "sampling already"),
        (lambda pipe: fastdiff.enable(pipe, LayerSkipping()), "is sampling"),
        (fastdiff.disable, "is sampling"),
    ],
    ids=["call", "enable", "disable"],
)
def test_pipeline_that_samples_is_not_disturbed(inside: Callable[[Any], Any], message: str) -> None:
    name = "FluxPipeline"
    pipe = accelerated(name, "inherit-1")
    expected = sample(pipe, name)
    refused: list[str] = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(StateError, match=message) as caught:
            inside(pipe)
        refused.append(str(caught.value))
        return kwargs

    assert torch.equal(sample(pipe, name, callback_on_step_end=callback), expected)
    assert len(refused) == STEPS
    assert torch.equal(sample(pipe, name), expected)
    with pytest.raises(StateError, match=message):
        sample(pipe, name, callback_on_step_end=lambda pipe, step, timestep, kwargs: inside(pipe))
    assert torch.equal(sample(pipe, name), expected)


def test_plan_of_another_step_count_is_refused_and_leaves_the_pipeline_clean() -> None:
    pipe = build(NAME)
    plan = METHODS["saved-plan"](view(pipe.transformer).names, STEPS)
    fastdiff.enable(pipe, plan)
    expected = sample(pipe, NAME)
    with pytest.raises(ProfileMismatchError, match=f"{STEPS} evaluations, this call makes 9"):
        sample(pipe, NAME, steps=9)
    with pytest.raises(ProfileMismatchError):
        pipe.fastdiff.plan(9)
    assert torch.equal(sample(pipe, NAME), expected)


def test_plan_of_another_model_is_refused_and_leaves_the_pipeline_clean() -> None:
    pipe = build(NAME)
    fastdiff.enable(pipe, ComputePlan.full(STEPS, ("blocks.0", "blocks.1")))
    with pytest.raises(ProfileMismatchError, match=r"2 units does not fit 4 units \('blocks.0'"):
        sample(pipe, NAME)
    fastdiff.enable(pipe, methods_for(pipe, "inherit-0"))
    assert torch.equal(sample(pipe, NAME), sample(accelerated(NAME, "inherit-0"), NAME))
