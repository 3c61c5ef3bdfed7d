"""Layer skipping: the even rule, the published one, rotation, and the solved speedup."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiff import Action, ComputePlan, ConfigError, LayerSkipping
from fastdiff.backbones import view
from fastdiff.cost import UnitCosts
from fastdiff.methods import PlanRequest
from tiny.base import build
from tiny.image import DIT
from tiny.models import TINY_MODELS
from tiny.plans import C, R, S, names, request_of
from tiny.sampling import accelerate, calls_at, counting, evaluate, without

SPEEDUPS = [Fraction(tenths, 10) for tenths in range(10, 101)]


def computed(method: LayerSkipping, units: int, evaluations: int = 2, **request: Any) -> np.ndarray:
    return method.plan(request_of(units, evaluations, **request)).table == C


def kept(method: LayerSkipping, units: int) -> list[int]:
    return np.flatnonzero(computed(method, units)[1]).tolist()


# -- which units -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", range(2, 65))
def test_even_rule_keeps_as_many_as_asked_and_spreads_them(units: int) -> None:
    for speedup in SPEEDUPS:
        layers = kept(LayerSkipping(speedup=float(speedup), rotate=False), units)
        number = max(2, math.floor(units / speedup))
        assert len(layers) == number
        assert {0, units - 1} <= set(layers)
        longest = max(np.diff(layers)) - 1
        assert longest == math.ceil(Fraction(units - number, number - 1))


@pytest.mark.parametrize(
    ("speedup", "expected"),
    [(5, {0, 6, 12, 18, 24, 29}), (3, {*range(0, 25, 3), 29}), (2, {*range(0, 27, 2), 29})],
)
def test_published_rule_keeps_the_published_layers(speedup: int, expected: set[int]) -> None:
    method = LayerSkipping(speedup=speedup, variant="paper", rotate=False)
    assert set(kept(method, 30)) == expected
    assert set(kept(LayerSkipping(speedup=speedup, rotate=False), 30)) != expected


def test_published_rule_leaves_out_one_block_below_a_speedup_of_two() -> None:
    for speedup, longest in ((1.25, 6), (1.5, 10), (2.5, 8)):
        runs = [len(list(run)) for value, run in groupby(computed(_paper(speedup), 28)[1]) if not value]
        assert max(runs) == longest


def test_published_rule_without_two_layers_is_refused() -> None:
    assert kept(_paper(14), 28) == [0, 27]
    with pytest.raises(ConfigError, match=r"at least 2 layers.*keep 1 of 28.*variant='even'"):
        _paper(15).plan(request_of(28, 2))
    assert len(kept(LayerSkipping(speedup=15, rotate=False), 28)) == 2


def _paper(speedup: float) -> LayerSkipping:
    return LayerSkipping(speedup=speedup, variant="paper", rotate=False)


def test_stacks_of_one_and_two_units_are_computed() -> None:
    for units in (1, 2):
        for variant in ("even", "paper"):
            if (units, variant) != (1, "paper"):
                assert computed(LayerSkipping(speedup=1, variant=variant), units, 5).all()
    assert computed(LayerSkipping(speedup=9), 2, 5).all()
    assert computed(LayerSkipping(speedup=9), 1, 5).all()


# -- which evaluations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0, 1, 2, 3, 7])
def test_keys_are_computed_in_full(interval: int) -> None:
    full = computed(LayerSkipping(speedup=3, interval=interval), 12, 10).all(axis=1)
    assert np.flatnonzero(full).tolist() == (list(range(0, 10, interval)) if interval else [0])


@pytest.mark.parametrize(("fill", "left_out"), [("reuse", R), ("skip", S)])
def test_units_left_out_do_what_fill_says(fill: str, left_out: Action) -> None:
    plan = LayerSkipping(speedup=2, fill=fill).plan(request_of(9, 4)).validate()
    assert set(plan.table.ravel().tolist()) == {C, left_out}


@pytest.mark.parametrize("variant", ["even", "paper"])
@pytest.mark.parametrize("units", range(3, 41))
def test_rotation_refreshes_every_unit_in_turn(units: int, variant: str) -> None:
    for speedup in (1, 1.3, 1.5, 2, 2.7, 3, 4, 6):
        if math.floor(units / speedup) < 3:
            continue
        ran = computed(LayerSkipping(speedup=speedup, interval=0, variant=variant), units, 2 * units)[1:]
        assert (ran.sum(axis=1) == math.floor(units / speedup)).all()
        assert ran[:, [0, -1]].all()
        period = next(shift for shift in range(1, units) if np.array_equal(ran[shift:], ran[:-shift]))
        assert ran[:period].any(axis=0).all(), "a unit is never refreshed"
        if variant == "even":  # few distinct rows, each of which a compiler turns into a graph
            assert period <= 2 * math.ceil((units - 1) / (math.floor(units / speedup) - 1))


def test_rotation_begins_anew_at_each_key() -> None:
    ran = computed(LayerSkipping(speedup=4, interval=4), 17, 20).reshape(5, 4, 17)
    assert (ran == ran[0]).all()
    assert len(np.unique(ran[0], axis=0)) == 4


def test_without_rotation_every_row_keeps_the_same_units() -> None:
    ran = computed(LayerSkipping(speedup=2, interval=0, rotate=False), 12, 8)[1:]
    assert (ran == ran[0]).all()
    assert not (computed(LayerSkipping(speedup=2, interval=0), 12, 8)[1:] == ran[0]).all()


# -- executed ----------------------------------------------------------------------------------------------------------


def test_blocks_run_as_planned_whatever_the_input() -> None:
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    model = build(DiTTransformer2DModel, DIT | {"num_layers": 12})
    units = view(model).names
    timesteps = (900, 700, 500, 300, 100)
    method = LayerSkipping(speedup=3, interval=4)
    executed = []
    for scale in (1.0, -7.0):
        calls = calls_at(tiny, timesteps)
        calls = [call | {"hidden_states": scale * call["hidden_states"]} for call in calls]
        with counting(model, units, calls[0]) as counted:
            _, record = accelerate(model, calls, method, timesteps)
        assert np.array_equal(counted.table(units), record.denoisers["denoiser"].plan.table == C)
        executed.append(counted.table(units))
    assert np.array_equal(*executed)
    assert executed[0].sum(axis=1).tolist() == [12, 4, 4, 4, 12]


# -- long skips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["reuse", "skip"])
def test_every_long_skip_is_merged_at_every_evaluation(fill: str) -> None:
    tiny = TINY_MODELS["UViT"]
    model = tiny.build()
    backbone = view(model)
    merges = np.array([unit.merges_skip for unit in backbone.units])
    timesteps = (900, 700, 500, 300, 100)
    calls = calls_at(tiny, timesteps)
    with counting(model, backbone.names, calls[0]) as counted:
        outputs, _ = accelerate(model, calls, LayerSkipping(speedup=2, interval=4, fill=fill), timesteps)
    ran = counted.table(backbone.names)
    assert ran[:, merges].all()
    assert ran[:, ~merges].sum(axis=1).tolist() == [7, 3, 3, 3, 7]
    if fill == "skip":  # each block that is left out passes on what it is given, and its long skip stays
        for row, output in enumerate(outputs):
            gone = [name for name, count in zip(backbone.names, ran[row], strict=True) if not count]
            assert torch.equal(output[0], evaluate(without(tiny.build(), gone), [calls[row]])[0][0])


@pytest.mark.parametrize("variant", ["even", "paper"])
def test_units_that_merge_long_skips_are_no_layers(variant: str) -> None:
    method = LayerSkipping(speedup=2, variant=variant)
    backbone = view(TINY_MODELS["UViT"].build())
    layers = [not unit.merges_skip for unit in backbone.units]
    request = request_of(sum(layers), 9)
    plan = method.plan(PlanRequest(backbone, request.grid, request.costs))
    assert np.array_equal(plan.table[:, layers], method.plan(request).table)


def test_target_is_solved_over_the_layers() -> None:
    backbone = view(TINY_MODELS["UViT"].build())
    units = len(backbone.names)
    latency = np.where([unit.merges_skip for unit in backbone.units], 5.0, 1.0)
    costs = UnitCosts(backbone.names, np.ones(units), 0.0, latency, 0.0)

    def plan_for(target: float) -> ComputePlan:
        method = LayerSkipping(target_speedup=target, interval=0)
        return method.plan(PlanRequest(backbone, request_of(1, 1001).grid, lambda: costs))

    assert plan_for(1.09).depths[1:].tolist() == [8] * 1000  # 22 s become 20 s: two of seven layers go
    with pytest.raises(ConfigError, match=r"at most 1\.29 is possible"):  # five layers of 22 s go at most
        plan_for(1.4)


# -- a speedup to reach ------------------------------------------------------------------------------------------------


@st.composite
def unit_costs(draw: st.DrawFn) -> UnitCosts:
    seconds = st.floats(0.1, 10)
    latency = np.array(draw(st.lists(seconds, min_size=1, max_size=20)))
    return UnitCosts(names(len(latency)), latency * 7, 1.0, latency, draw(st.floats(0, 20)))


def speedup_of_call(method: LayerSkipping, costs: UnitCosts, evaluations: int) -> float:
    """Of the whole call: denoiser by the plan's price, and the rest as long as its share of the plain call says."""
    plan = method.plan(request_of(len(costs.units), evaluations, costs=costs))
    denoiser = 1 / plan.cost(costs).speedup
    return 1 / (method.outside_share + (1 - method.outside_share) * denoiser)


@given(
    unit_costs(),
    st.integers(1, 30),
    st.integers(0, 6),
    st.floats(1, 6),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_target_is_reached_with_the_most_units(
    costs: UnitCosts, evaluations: int, interval: int, target: float, outside: float, rotate: bool
) -> None:
    units = len(costs.units)
    settings_ = {"interval": interval, "outside_share": outside, "rotate": rotate}
    method = LayerSkipping(target_speedup=target, **settings_)

    def with_kept(number: int) -> float:
        return speedup_of_call(LayerSkipping(speedup=units / number, **settings_), costs, evaluations)

    possible = {number: with_kept(number) for number in range(min(2, units), units + 1)}
    assume(all(abs(reached - target) > 1e-6 for reached in possible.values()))
    if max(possible.values()) < target:
        with pytest.raises(ConfigError, match="out of reach") as caught:
            method.plan(request_of(units, evaluations, costs=costs))
        figure = float(re.search(r"at most ([\d.]+)", str(caught.value)).group(1))  # type: ignore[union-attr]
        assert figure == pytest.approx(max(1, *possible.values()), abs=0.006)
        return
    plan = method.plan(request_of(units, evaluations, costs=costs))
    assert speedup_of_call(method, costs, evaluations) >= target - 1e-6
    most = max(number for number, reached in possible.items() if reached >= target)
    assert plan.share == LayerSkipping(speedup=units / most, **settings_).plan(request_of(units, evaluations)).share


def test_target_of_equal_units_follows_the_formula() -> None:
    # 20 units of 1 s and 4 s beside them; outside the denoiser a fifth of the call, that is 6 s for each evaluation.
    costs = UnitCosts(names(20), np.ones(20), 0.0, np.ones(20), 4.0)
    method = LayerSkipping(target_speedup=1.5, outside_share=0.2, interval=0)
    plan = method.plan(request_of(20, 1001, costs=costs))
    # 30 s become 20 s: 10 s for the units of each evaluation but the first.
    assert plan.depths[1:].tolist() == [9] * 1000


def test_target_of_one_computes_everything() -> None:
    costs = UnitCosts(names(7), np.ones(7), 0.0, np.full(7, 0.1), 0.3)
    assert LayerSkipping(target_speedup=1).plan(request_of(7, 9, costs=costs)).share == 1


def test_target_with_the_published_rule() -> None:
    costs = UnitCosts(names(28), np.ones(28), 0.0, np.ones(28), 0.0)
    plan = LayerSkipping(target_speedup=1.5, variant="paper", interval=2).plan(request_of(28, 10, costs=costs))
    assert plan.cost(costs).speedup >= 1.5
    with pytest.raises(ConfigError, match=r"target_speedup=1\.9 is out of reach.*every 2, at most 1\.87"):
        LayerSkipping(target_speedup=1.9, variant="paper", interval=2).plan(request_of(28, 10, costs=costs))


def test_target_in_a_run_is_solved_from_measured_latencies() -> None:
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    model = build(DiTTransformer2DModel, DIT | {"num_layers": 12})
    timesteps = tuple(np.linspace(999, 0, 12))
    calls = calls_at(tiny, timesteps)
    _, record = accelerate(model, calls, LayerSkipping(target_speedup=1.3, interval=0), timesteps)
    executed = record.denoisers["denoiser"]
    assert executed.measure is not None
    assert executed.plan.cost(executed.measure()).speedup >= 1.3 - 1e-9
    assert executed.skipped > 0
    with pytest.raises(ConfigError, match="out of reach"):
        accelerate(model, calls, LayerSkipping(target_speedup=50.0), timesteps)
    assert torch.equal(*(model(**calls[0]).sample for _ in range(2)))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"speedup": 0.9}, r"LayerSkipping\.speedup is a number from 1 to 1000; got 0\.9"),
        ({"speedup": math.nan}, "speedup.*nan"),
        ({"speedup": math.inf}, "speedup.*inf"),
        ({"speedup": "2"}, "speedup.*'2'"),
        ({"speedup": None}, "speedup.*None"),
        ({"speedup": True}, "speedup.*True"),
        ({"speedup": 10**400}, "speedup"),
        ({"target_speedup": 0.5}, "target_speedup"),
        ({"target_speedup": math.nan}, "target_speedup"),
        ({"outside_share": 1.0}, "outside_share"),
        ({"outside_share": -0.1}, "outside_share"),
        ({"interval": -1}, "interval"),
        ({"interval": 2.5}, "interval is a whole number"),
        ({"interval": math.nan}, "interval"),
        ({"variant": "odd"}, "'even' or 'paper'.*'odd'"),
        ({"fill": "zero"}, "'reuse' or 'skip'.*'zero'"),
        ({"rotate": "yes"}, "rotate is True or False.*'yes'"),
    ],
)
def test_setting_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerSkipping(**setting)


def test_neutral_settings_are_those_that_skip_nothing() -> None:
    for method, neutral in (
        (LayerSkipping(speedup=1), True),
        (LayerSkipping(interval=1), True),
        (LayerSkipping(), False),
        (LayerSkipping(speedup=1, target_speedup=2), False),
    ):
        assert method.is_neutral == neutral
        if neutral:
            assert computed(method, 12, 9).all()
