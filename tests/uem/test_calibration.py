"""Thresholds that meet a budget, and the static plans made of them."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from engine.cases import build
from torch import nn

import fastdiff
from fastdiff import FeatureInheritance, UncertaintyExit
from fastdiff.errors import ConfigError, ProfileMismatchError
from fastdiff.eval.tasks import Task, make_task
from fastdiff.methods import SavedPlan
from fastdiff.plan import Action
from fastdiff.uem import BudgetError, Calibration, UncertaintyModules, calibrate
from fastdiff.uem.calibration import RULES, bins_of
from fastdiff.uem.freezing import freeze
from tiny.uncertainty import random_modules

TOLERANCE = 0.02
STEPS, SAMPLES, BATCH = 12, 8, 3
SETTINGS: dict[str, Any] = {
    "num_samples": SAMPLES,
    "batch_size": BATCH,
    "num_inference_steps": STEPS,
    "bins": 4,
    "tolerance": TOLERANCE,
    "progress": False,
}


def task_of(pipe: Any) -> Task:
    return make_task(pipe, class_labels=[0, 1, 2, 3], guidance_scale=2.0)


def calibrated(budget: float, **settings: Any) -> Calibration:
    pipe = build("DiTPipeline")
    method = UncertaintyExit.of(random_modules(pipe.transformer))
    return calibrate(pipe, method, budget, task=task_of(pipe), **{**SETTINGS, **settings})


@cache
def at(budget: float) -> Calibration:
    return calibrated(budget, frozen=True)


def shares_of(pipe: Any) -> float:
    (record,) = pipe.fastdiff.last_run.denoisers.values()
    return float(record.macs_share)


# -- the budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", [0.5, 0.8])
def test_calibration_samples_cost_what_was_asked(budget: float, rule: str) -> None:
    found = calibrated(budget, rule=rule)
    assert found.share == pytest.approx(budget, abs=TOLERANCE)
    # The record of a call of one's own agrees: it counts by itself, batch by batch.
    pipe = fastdiff.enable(build("DiTPipeline"), found.method)
    shares = []
    for indices in (range(3), range(3, 6), range(6, 8)):
        pipe(**task_of(pipe).arguments(indices), num_inference_steps=STEPS, output_type="np")
        shares += [shares_of(pipe)] * len(indices)
    assert np.mean(shares) == pytest.approx(found.share, abs=1e-6)


def test_a_larger_budget_means_lower_thresholds() -> None:
    found = [at(budget) for budget in (0.5, 0.7, 0.8)]
    assert sorted(one.share for one in found) == [one.share for one in found]
    tables = [np.array(one.method.thresholds) for one in found]
    assert (tables[0] >= tables[1]).all()
    assert (tables[1] >= tables[2]).all()
    assert (tables[0] > tables[2]).any()


def test_the_whole_budget_means_no_exit_at_all() -> None:
    found = at(1.0)
    assert found.method.is_neutral
    assert found.share == 1
    assert (found.held_out["dynamic"].depths == len(found.watched.units)).all()
    assert np.array_equal(found.held_out["dynamic"].images, found.held_out["full"].images)
    assert found.held_out["dynamic"].psnr(found.held_out["full"]).value is None


def test_held_out_samples_are_others() -> None:
    found = at(0.7)
    assert found.held_out["full"].images.shape == found.watched.run.images.shape
    together = np.concatenate([found.watched.run.images, found.held_out["full"].images])
    assert len({image.tobytes() for image in together}) == 2 * SAMPLES
    pipe = build("DiTPipeline")
    expected = pipe(
        **task_of(pipe).arguments(range(SAMPLES, SAMPLES + BATCH)), num_inference_steps=STEPS, output_type="np"
    ).images
    assert np.abs(found.held_out["full"].images[:BATCH] - expected).max() < 1e-5


@pytest.mark.parametrize("settings", [{"patience": 2}, {"scope": "batch_mean"}, {"lookahead": 1}])
def test_other_decisions_meet_the_budget_too(settings: dict[str, Any]) -> None:
    pipe = build("DiTPipeline")
    method = UncertaintyExit.of(random_modules(pipe.transformer), **settings)
    found = calibrate(pipe, method, 0.8, task=task_of(pipe), **{**SETTINGS, "tolerance": 0.03})
    assert found.share == pytest.approx(0.8, abs=0.03)
    assert {name: getattr(found.method, name) for name in settings} == settings


def test_only_the_methods_own_exits_get_thresholds() -> None:
    pipe = build("DiTPipeline")
    method = UncertaintyExit.of(random_modules(pipe.transformer), exits=("transformer_blocks.2",))
    found = calibrate(pipe, method, 0.7, task=task_of(pipe), **SETTINGS)
    assert found.share == pytest.approx(0.7, abs=TOLERANCE)
    assert set(np.unique(found.dynamic.depths)) == {2, 4}
    table = np.reshape(found.method.thresholds, (SETTINGS["bins"], 3))
    assert (table[:, [0, 2]] == 0).all()
    assert (table[:, 1] > 0).any()


def test_the_smallest_budget_is_the_first_exit() -> None:
    least = at(0.7).reachable[0]
    found = calibrated(least)
    assert found.share == pytest.approx(least)
    assert set(np.unique(found.dynamic.depths)) == {1}


# -- budgets that cannot be met ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.2, float("nan")])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        calibrated(budget)


def test_a_budget_below_the_first_exit_says_what_can_be_reached() -> None:
    with pytest.raises(BudgetError, match=r"0.1 is below .* it can be from 0\.\d+ to 1") as caught:
        calibrated(0.1)
    least, most = caught.value.reachable
    assert 0.2 < least < 0.35  # one of four blocks, and what is outside the blocks
    assert most == 1


def test_exits_that_cannot_tell_samples_apart_say_what_is_next_to_the_budget() -> None:
    pipe = build("DiTPipeline")
    modules = random_modules(pipe.transformer)
    for module in modules.uncertainty:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)  # one half for everything
    with pytest.raises(BudgetError, match=r"jumps from 1.000 to 0\.") as caught:
        calibrate(pipe, UncertaintyExit.of(modules), 0.6, task=task_of(pipe), **SETTINGS)
    below, above = caught.value.reachable
    assert below < 0.6 < above


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rule": "best"}, "rule is one of"),
        ({"bins": 0}, "bins is a whole number"),
        ({"num_samples": 1}, "num_samples is a whole number from 2"),
        ({"tolerance": 0.0}, "tolerance is a share"),
    ],
)
def test_arguments_that_are_not_allowed(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        calibrated(0.8, **settings)


def test_methods_without_thresholds_are_refused() -> None:
    pipe = build("DiTPipeline")
    with pytest.raises(ConfigError, match="calibrated for UncertaintyExit"):
        calibrate(pipe, FeatureInheritance(), 0.8, task=task_of(pipe), **SETTINGS)  # type: ignore[arg-type]
    other = UncertaintyModules("DiTTransformer2DModel", 28, ["transformer_blocks.1"], 32, 16)
    with pytest.raises(ProfileMismatchError):
        calibrate(pipe, UncertaintyExit.of(other), 0.8, task=task_of(pipe), **SETTINGS)


# -- the pipeline afterwards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.8, 0.1])
def test_the_pipeline_is_left_as_it_was(budget: float) -> None:
    pipe = build("DiTPipeline")
    method = UncertaintyExit.of(random_modules(pipe.transformer))
    before = [FeatureInheritance(interval=2)]
    fastdiff.enable(pipe, before)
    try:
        calibrate(pipe, method, budget, task=task_of(pipe), **SETTINGS)
    except BudgetError:
        assert budget == 0.1
    assert list(pipe.fastdiff.methods) == before
    fastdiff.disable(pipe)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipe.transformer.modules())


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_uncertainties_and_errors_are_those_of_the_calls() -> None:
    from fastdiff.uem import ExitReadout

    pipe = build("DiTPipeline")
    modules = random_modules(pipe.transformer, heads="per_exit")
    settings = {**SETTINGS, "num_samples": 3, "batch_size": 2, "num_inference_steps": 3}
    watched = calibrate(pipe, UncertaintyExit.of(modules), 1.0, task=task_of(pipe), **settings).watched
    assert watched.uncertainties.shape == watched.errors.shape == (3, 3, 3)
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({"hidden_states": args[0], **kwargs}), with_kwargs=True
    )
    pipe(**task_of(pipe).arguments(range(2)), num_inference_steps=3, output_type="np")
    handle.remove()
    with torch.no_grad(), ExitReadout(pipe.transformer, modules) as readout:
        for row, call in enumerate(calls):
            found = readout(**{name: value for name, value in call.items() if name != "return_dict"})
            for exit, state in enumerate(found.hidden):
                score = modules.score(exit, state, found.timesteps)
                error = (found.predictions[exit] - found.full).abs().flatten(1).mean(1)
                for sample in range(2):
                    pair = [sample, sample + 2]  # with the class, and without
                    assert watched.uncertainties[row, exit, sample] == pytest.approx(float(score[pair].max()), abs=1e-5)
                    assert watched.errors[row, exit, sample] == pytest.approx(float(error[pair].max()), abs=1e-5)


@pytest.mark.parametrize("bins", [1, 3, 50])
def test_every_bin_has_evaluations(bins: int) -> None:
    timesteps = np.array([999.0, 800, 800, 600, 400, 200, 1])
    edges, members = bins_of(timesteps, bins)
    assert len(edges) == min(bins, 6)
    assert list(edges) == sorted(set(edges))
    assert sorted(set(members)) == [*range(len(edges))]
    assert (np.diff(members) <= 0).all()


# -- frozen ------------------------------------------------------------------------------------------------------------


def test_a_frozen_plan_costs_what_the_samples_cost() -> None:
    found = at(0.7)
    plan = found.frozen_plan
    assert plan is not None
    evaluations, unit = len(plan.table), np.diff(found.dynamic.price).max()
    frozen = found.held_out["frozen"]
    assert frozen.share == pytest.approx(found.dynamic.share, abs=unit / evaluations)
    assert (frozen.depths == plan.depths[:, None]).all()
    assert {Action(action) for action in np.unique(plan.table)} == {Action.COMPUTE, Action.EXIT}


def test_frozen_depths_follow_the_mean_depths() -> None:
    depths = np.array([[4, 4, 4, 4], [1, 1, 1, 1], [1, 2, 4, 4], [1, 1, 1, 2]])
    price = np.linspace(0, 1, 5)
    plan = freeze(depths, price, [1, 2, 3], ["a", "b", "c", "d"], {"timesteps": [3, 2, 1, 0]})
    assert plan.depths.tolist() == [4, 1, 3, 1]  # 4 + 1 + 2.75 + 1.25
    assert plan.meta["timesteps"] == [3, 2, 1, 0]
    # Where there is no exit after the third unit, the total stays as near as the exits allow.
    coarse = freeze(depths, price, [1], ["a", "b", "c", "d"], {})
    assert set(coarse.depths.tolist()) <= {1, 4}
    assert abs(coarse.depths.sum() - depths.mean(1).sum()) <= 1.5


def test_a_frozen_plan_runs_with_the_exits_heads() -> None:
    pipe = build("DiTPipeline")
    modules = random_modules(pipe.transformer, heads="per_exit")
    found = calibrate(pipe, UncertaintyExit.of(modules), 0.6, task=task_of(pipe), **SETTINGS, frozen=True)
    assert found.frozen_plan is not None
    arguments = {
        **task_of(pipe).arguments(range(SAMPLES, SAMPLES + BATCH)),
        "num_inference_steps": STEPS,
        "output_type": "np",
    }

    def images(*methods: Any) -> np.ndarray:
        again = task_of(pipe).arguments(range(SAMPLES, SAMPLES + BATCH))["generator"]
        return np.asarray(fastdiff.enable(pipe, list(methods))(**{**arguments, "generator": again}).images)

    plan = SavedPlan(type(found.frozen_plan).from_dict(found.frozen_plan.to_dict()))
    assert np.array_equal(
        images(plan, UncertaintyExit.of(modules, threshold=0)), found.held_out["frozen"].images[:BATCH]
    )
    assert not np.array_equal(images(plan), found.held_out["frozen"].images[:BATCH])


def test_settings_of_the_result_make_the_same_method() -> None:
    method = at(0.7).method
    data = method.to_dict()
    assert fastdiff.methods.Method.from_dict(data) == method
    assert dataclasses.replace(method, thresholds=method.thresholds) == method
