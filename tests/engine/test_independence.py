"""A call depends on its arguments alone: not on the call before, however that one ended."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from engine.cases import (
    ANY_STEPS,
    EVERY_CASE,
    METHODS,
    SOME_PIPELINES,
    STEPS,
    UNET_CASES,
    UNET_METHODS,
    accelerated,
    build,
    denoiser_calls,
    denoiser_of,
    methods_for,
    record_of,
    sample,
)

import fastdiff
from fastdiff import ExitSchedule, FeatureInheritance, ProfileMismatchError
from fastdiff.backbones import view

WIDE = {"height": 32, "width": 64}
OF_ONE_SIZE = ("DiTPipeline", "DDIMPipeline")
CHANGES: dict[str, dict[str, Any]] = {
    "batch": {"batch": 2},
    "steps": {"steps": STEPS + 2},
    "guidance": {"guidance": False},
    "prompt": {"seed": 3},
    "size": WIDE,
}
DENOISING = ("DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")
DENOISING = (*DENOISING, "UniPCMultistep", "PNDM", "KDPM2Discrete")
EVALUATIONS = {"HeunDiscrete": 2 * STEPS - 1, "PNDM": STEPS + 9, "KDPM2Discrete": 2 * STEPS - 1}
"""Denoiser evaluations of the solvers that make more than one for each step; PNDM warms up with Runge-Kutta steps."""
FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "DPMSolverMultistep")
SOLVERS = [("DiTPipeline", name) for name in DENOISING] + [("StableDiffusion3Pipeline", name) for name in FLOW]
EVERY_SOLVER = pytest.mark.parametrize(("name", "solver"), SOLVERS)


def with_solver(pipe: DiffusionPipeline, solver: str) -> DiffusionPipeline:
    """Puts a new scheduler into the pipeline, as users do."""
    cls = getattr(diffusers, f"{solver}Scheduler")
    own = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if "shift" in pipe.scheduler.config else {}
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **own)
    return pipe


# -- one call after another --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [("DiTPipeline", method) for method in ANY_STEPS]
    + [(name, method) for name in ("PixArtAlphaPipeline", "FluxPipeline") for method in ("layers-reuse", "inherit-1")]
    + [("StableDiffusion3Pipeline", method) for method in ("inherit-2", "merged")]
    + UNET_CASES,
)
def test_call_after_another_is_a_fresh_one(name: str, method: str) -> None:
    pipe = accelerated(name, method)
    first = sample(pipe, name)
    changes = [change for change in CHANGES.values() if name not in OF_ONE_SIZE or change is not WIDE]
    for change in changes:
        assert torch.equal(sample(pipe, name, **change), sample(accelerated(name, method), name, **change)), change
        assert not record_of(pipe).fallbacks
    assert torch.equal(sample(pipe, name), first)


@EVERY_CASE
def test_two_calls_with_one_seed_agree(name: str, method: str) -> None:
    pipe = accelerated(name, method)
    first = sample(pipe, name)
    actions = [call.actions for call in record_of(pipe).calls]
    torch.rand(1)
    assert torch.equal(first, sample(pipe, name))
    assert actions == [call.actions for call in record_of(pipe).calls]
    assert not torch.equal(first, sample(pipe, name, seed=1))


@SOME_PIPELINES
def test_saved_plan_refuses_another_number_of_steps_and_stays_usable(name: str) -> None:
    pipe = accelerated(name, "saved-plan")
    first = sample(pipe, name)
    with pytest.raises(ProfileMismatchError, match=rf"{STEPS} evaluations.*{STEPS + 1}"):
        sample(pipe, name, steps=STEPS + 1)
    assert_at_rest(pipe)
    assert torch.equal(sample(pipe, name), first)


# -- solvers -----------------------------------------------------------------------------------------------------------


@EVERY_SOLVER
def test_full_plan_follows_every_solver(name: str, solver: str) -> None:
    pipe = with_solver(build(name), solver)
    plain = sample(pipe, name)
    fastdiff.enable(pipe, ExitSchedule("full"))

    assert torch.equal(sample(pipe, name), plain)
    record = record_of(pipe)
    evaluations = EVALUATIONS.get(solver.removeprefix("FlowMatch"), STEPS)
    assert [call.evaluation for call in record.calls] == list(range(evaluations))
    assert record.plans[0].evaluations == evaluations
    assert not record.fallbacks


@pytest.mark.parametrize("method", ["inherit-1", "exit-step"])
@pytest.mark.parametrize(("name", "solvers"), [("DiTPipeline", DENOISING), ("StableDiffusion3Pipeline", FLOW)])
def test_changing_the_solver_is_a_fresh_pipeline(name: str, solvers: tuple[str, ...], method: str) -> None:
    pipe = accelerated(name, method)
    seen = [sample(pipe, name)]
    for solver in (*solvers, solvers[0]):
        fresh = with_solver(build(name), solver)
        fastdiff.enable(fresh, methods_for(fresh, method))
        seen.append(sample(with_solver(pipe, solver), name))
        assert torch.equal(seen[-1], sample(fresh, name)), solver
        assert record_of(pipe).skipped > 0
        assert not record_of(pipe).fallbacks
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen[1:]))


def test_exits_follow_duplicate_timesteps() -> None:
    """Heun visits every timestep but the last twice: both visits have the depth of that timestep."""
    pipe = with_solver(build("DiTPipeline"), "HeunDiscrete")
    fastdiff.enable(pipe, ExitSchedule.step(full=4, t_switch=500, d_low=1))
    sample(pipe, "DiTPipeline")
    timesteps = pipe.scheduler.timesteps
    assert len(timesteps.unique()) == STEPS
    expected = [1 if timestep >= 500 else 4 for timestep in timesteps.tolist()]
    assert record_of(pipe).plans[0].depths.tolist() == expected
    assert [call.actions.count(0) for call in record_of(pipe).calls] == expected


# -- image to image ----------------------------------------------------------------------------------------------------

IMG2IMG = pytest.mark.parametrize("name", ["StableDiffusion3Img2ImgPipeline", "FluxImg2ImgPipeline"])


@IMG2IMG
def test_image_to_image_starts_inside_the_grid(name: str) -> None:
    pipe = build(name)
    fastdiff.enable(pipe, FeatureInheritance())
    for strength, evaluations in ((0.5, 4), (1.0, 8), (0.25, 2), (0.75, 6)):
        with fastdiff.disabled(pipe):
            plain = sample(pipe, name, steps=8, strength=strength)
        arguments = {"steps": 8, "strength": strength}
        if evaluations == 2:
            with pytest.warns(fastdiff.FastDiffNoEffectWarning):
                assert torch.equal(sample(pipe, name, **arguments), plain)
        else:
            assert not torch.equal(sample(pipe, name, **arguments), plain)
        record = record_of(pipe)
        assert record.plans[-1].evaluations == evaluations
        assert sorted({call.evaluation for call in record.calls}) == list(range(8 - evaluations, 8))
        assert not record.fallbacks


@IMG2IMG
@pytest.mark.parametrize("method", ["ase-demo", "inherit-1", "layers-reuse"])
def test_start_index_is_not_left_to_the_next_call(name: str, method: str) -> None:
    pipe = accelerated(name, method)
    for strength in (0.5, 1.0, 0.75):
        arguments = {"steps": 8, "strength": strength}
        assert torch.equal(sample(pipe, name, **arguments), sample(accelerated(name, method), name, **arguments))


def test_start_index_is_not_left_to_another_pipeline() -> None:
    """Image to image and text to image often share a scheduler and a denoiser."""
    image_to_image = accelerated("FluxImg2ImgPipeline", "inherit-1")
    sample(image_to_image, "FluxImg2ImgPipeline", steps=8)
    fastdiff.disable(image_to_image)
    pipe = diffusers.FluxPipeline(
        **{key: image_to_image.components.get(key) for key in build("FluxPipeline").components}
    )
    pipe.set_progress_bar_config(disable=True)
    fastdiff.enable(pipe, METHODS["inherit-1"]((), STEPS))
    assert torch.equal(sample(pipe, "FluxPipeline"), sample(accelerated("FluxPipeline", "inherit-1"), "FluxPipeline"))
    assert record_of(pipe).plans[0].evaluations == STEPS


# -- calls that end early ----------------------------------------------------------------------------------------------


class Broken(Exception):
    """Raised inside a sampling call."""


def assert_at_rest(pipe: Any) -> None:
    """Nothing of a call is left on an accelerated pipeline: no watching, nothing kept, every unit computes."""
    denoiser = denoiser_of(pipe)
    assert not denoiser._forward_pre_hooks
    assert "cache_context" not in vars(denoiser)
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))
    for hooks in pipe.fastdiff._hooks.values():
        assert all(hook.cell.plain and not hook.cell.keeps for hook in hooks.hooks)
    assert pipe.fastdiff._run is None


def in_callback(error: type[BaseException]) -> Callable[[DiffusionPipeline, pytest.MonkeyPatch], dict[str, Any]]:
    def arrange(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if step == 3:
                raise error
            return kwargs

        return {"callback_on_step_end": callback}

    return arrange


def in_method(name: str, error: type[BaseException]) -> Callable[..., dict[str, Any]]:
    """Makes the fourth call of the scheduler's or of the first block's method fail."""

    def arrange(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        owner = type(pipe.scheduler if name == "step" else view(denoiser_of(pipe)).units[0].module)
        method, calls = getattr(owner, name), []

        @functools.wraps(method)
        def broken(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise error
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)
        return {}

    return arrange


FAILING_TRANSFORMERS = [
    *itertools.product(["DiTPipeline"], ["step", "forward"], ["inherit-1", "layers-reuse", "exit-step"]),
    *itertools.product(["FluxPipeline"], ["callback", "forward"], ["inherit-1", "layers-reuse", "exit-step"]),
]
FAILING_UNETS = [
    *itertools.product(["StableDiffusionPipeline"], ["callback", "step"], ["propagate", "deepcache"]),
    ("DDIMPipeline", "step", "propagate"),
]


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize(("name", "where", "method"), FAILING_TRANSFORMERS + FAILING_UNETS)
def test_interrupted_call_leaves_nothing(
    name: str, where: str, error: type[BaseException], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build(name)
    units = view(denoiser_of(pipe)).names
    inputs = denoiser_calls(pipe, name, seed=9)[-1]
    with torch.no_grad():
        plain = denoiser_of(pipe)(**inputs, return_dict=False)[0]
    expected = sample(accelerated(name, method), name)

    arrange = in_callback(error) if where == "callback" else in_method(where, error)
    with monkeypatch.context() as patch:
        arguments = arrange(pipe, patch)
        fastdiff.enable(pipe, (METHODS | UNET_METHODS)[method](units, STEPS))
        with pytest.raises(error):
            sample(pipe, name, seed=2, **arguments)
    assert not pipe.fastdiff.last_run.completed
    assert len(record_of(pipe).calls) > 0
    assert_at_rest(pipe)
    with torch.no_grad():
        assert torch.equal(denoiser_of(pipe)(**inputs, return_dict=False)[0], plain)
    assert torch.equal(sample(pipe, name), expected)
    assert pipe.fastdiff.last_run.completed
