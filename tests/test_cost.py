"""The cost model: what it counts is what runs."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import ComputePlan, ExitSchedule, FeatureInheritance, LayerSkipping, ProfileMismatchError
from fastdiff.backbones import Backbone, view
from fastdiff.cost import UnitCosts, count_macs, flop_counter, measure, time_units
from fastdiff.methods import Method
from tiny.models import TINY_MODELS
from tiny.plans import C, D, E, F, R, S, names, plan_of, tables
from tiny.sampling import accelerate, calls_at, evaluate, without

MODELS = pytest.mark.parametrize(
    "name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel"]
)
TIMESTEPS = (950, 750, 500, 250, 50)


def counted_macs(model: nn.Module, calls: list[dict[str, Any]], methods: Any = None) -> float:
    """MACs by torch's own count, with attention taken apart into the products that torch has formulas for."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if methods is None:
            evaluate(model, calls)
        else:
            accelerate(model, calls, methods, TIMESTEPS[: len(calls)])
    return counter.get_total_flops() / 2


def costs_of(macs: list[float], fixed: float, latency: list[float] | None = None, rest: float = 0.0) -> UnitCosts:
    return UnitCosts(names(len(macs)), np.array(macs), fixed, np.array(latency or macs), rest)


# -- counting ----------------------------------------------------------------------------------------------------------


@MODELS
def test_units_and_the_rest_add_up_to_a_plain_forward(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    calls = calls_at(tiny, TIMESTEPS[:1])
    macs, fixed = count_macs(view(model), calls[0])
    whole = counted_macs(model, calls)

    assert macs.sum() + fixed == whole
    assert fixed > 0
    for index in range(len(macs) - 1):
        smaller = without(tiny.build(), [view(model).names[index]])
        if index > 0 or name != "DiTTransformer2DModel":  # whose first block holds the final layer's embedding
            assert macs[index] == whole - counted_macs(smaller, calls)


@MODELS
@pytest.mark.parametrize(
    "method",
    [
        ExitSchedule(bin_edges=(0, 300, 700), depths=(4, 3, 2), full=4),
        LayerSkipping(speedup=2, interval=3),
        LayerSkipping(speedup=2, interval=2, fill="skip", rotate=False),
        FeatureInheritance(interval=3),
        FeatureInheritance(interval=2, order=2, span=(0, None), last_key=False),
    ],
    ids=str,
)
def test_price_of_a_plan_is_what_its_execution_costs(name: str, method: Method) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    calls = calls_at(tiny, TIMESTEPS)
    costs = measure(view(model), calls[0], repeats=1)
    _, record = accelerate(model, calls, method, TIMESTEPS)
    executed = record.denoisers["denoiser"]
    price = executed.plans[0].cost(costs)

    assert price.macs == pytest.approx(counted_macs(model, calls, method), rel=1e-9)
    assert price.macs == executed.plan.cost(costs).macs
    assert price.macs_share == pytest.approx(price.macs / counted_macs(model, calls), rel=1e-9)
    assert price.macs_share < 0.95


def test_macs_grow_with_the_batch() -> None:
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    backbone = view(tiny.build())
    one = measure(backbone, tiny.inputs(1, 0), repeats=1)
    three = measure(backbone, tiny.inputs(3, 0), repeats=1)
    assert np.array_equal(3 * one.macs, three.macs)
    assert 3 * one.fixed_macs == three.fixed_macs


def test_measured_costs_are_remembered_for_a_shape_and_a_denoiser() -> None:
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    backbone = view(tiny.build())
    costs = measure(backbone, tiny.inputs(1, 0), repeats=1)
    assert measure(backbone, tiny.inputs(1, 1), repeats=1) is costs
    assert measure(view(backbone.denoiser), tiny.inputs(1, 0), repeats=1) is costs
    assert measure(backbone, tiny.inputs(2, 0), repeats=1) is not costs
    assert measure(view(tiny.build()), tiny.inputs(1, 0), repeats=1) is not costs


@MODELS
def test_latencies_are_times(name: str) -> None:
    tiny = TINY_MODELS[name]
    backbone = view(tiny.build())
    costs = measure(backbone, tiny.inputs(1, 0))
    assert costs.units == backbone.names
    assert costs.latency.shape == costs.macs.shape == (len(backbone.units),)
    assert (costs.latency > 0).all()
    assert np.isfinite(costs.latency).all()
    assert 0 <= costs.fixed_latency < math.inf


def test_a_slow_unit_is_the_one_that_takes_long() -> None:
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    model = tiny.build()
    model.transformer_blocks[2].norm3.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    latency, _ = time_units(view(model), tiny.inputs(1, 0), repeats=3)
    assert latency.argmax() == 2


def test_measuring_leaves_no_hook_even_when_the_denoiser_fails() -> None:
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    model = tiny.build()
    inputs = tiny.inputs(1, 0)
    measure(view(model), inputs, repeats=1)
    with pytest.raises(RuntimeError):
        measure(view(model), inputs | {"hidden_states": torch.zeros(1, 3, 8, 8)}, repeats=1)
    assert not any(unit.module._forward_hooks or unit.module._forward_pre_hooks for unit in view(model).units)


# -- pricing -----------------------------------------------------------------------------------------------------------


def test_price_without_measured_costs_takes_all_units_as_equal() -> None:
    price = plan_of([C, C, C, C], [C, R, S, F], [C, C, E, E], [C, D, R, C]).cost()
    assert price.macs is None
    assert price.macs_share == 9 / 16
    assert price.speedup == 16 / 9
    assert ComputePlan.full(3, names(2)).cost().speedup == 1


def test_price_with_measured_costs() -> None:
    costs = costs_of([4.0, 2.0, 1.0], 3.0, latency=[0.5, 0.25, 0.125], rest=0.125)
    price = plan_of([C, C, C], [C, R, S], [S, C, E]).cost(costs)
    assert price.macs == (10 + 7 + 5)
    assert price.macs_share == 22 / 30
    assert price.speedup == 3 / (1 + 0.625 + 0.375)


def test_plan_that_computes_nothing_is_infinitely_fast() -> None:
    plan = plan_of([S, S])
    assert plan.cost().macs_share == 0
    assert plan.cost().speedup == math.inf
    assert plan.cost(costs_of([1.0, 1.0], 0.0)).speedup == math.inf
    assert plan.cost(costs_of([1.0, 1.0], 2.0, rest=2.0)).speedup == 2


def test_costs_of_another_model_are_refused() -> None:
    with pytest.raises(ProfileMismatchError, match="3 units does not fit 2"):
        plan_of([C, C, C]).cost(costs_of([1.0, 1.0], 0.0))


@given(tables(), st.data())
@settings(deadline=None)
def test_rows_and_units_add_up(table: np.ndarray, data: st.DataObject) -> None:
    rows, units = table.shape
    numbers = st.integers(0, 1000)
    macs = data.draw(st.lists(numbers, min_size=units, max_size=units))
    costs = costs_of(macs, data.draw(st.integers(1, 1000)), latency=[m + 1 for m in macs], rest=1.0)
    plan = ComputePlan(table, names(units))
    price = plan.cost(costs)
    expected = sum(macs[unit] for row in table for unit in range(units) if row[unit] == C) + rows * costs.fixed_macs

    assert price.macs == expected
    assert price.macs == sum(ComputePlan(row[None], names(units)).cost(costs).macs for row in table)
    assert price.macs_share == pytest.approx(price.macs / (rows * costs.total_macs))
    assert 0 < price.macs_share <= 1 <= price.speedup
    assert ComputePlan.full(rows, names(units)).cost(costs).speedup == pytest.approx(1)


@MODELS
def test_a_deeper_exit_never_costs_less(name: str) -> None:
    tiny = TINY_MODELS[name]
    backbone: Backbone = view(tiny.build())
    costs = measure(backbone, tiny.inputs(1, 0), repeats=1)
    units = len(backbone.units)
    prices = [
        ComputePlan(np.where(np.arange(units) >= depth, E, C)[None], backbone.names).cost(costs)
        for depth in range(1, units + 1)
    ]
    macs = [price.macs for price in prices]
    assert macs == sorted(set(macs))
    assert macs[-1] == costs.total_macs
    assert prices[-1].speedup == pytest.approx(1)
    assert [price.speedup for price in prices] == sorted((price.speedup for price in prices), reverse=True)


def test_flops_of_modules_that_hold_each_other_are_counted() -> None:
    """As some packages leave a denoiser whose blocks hold it."""
    model = nn.Sequential(nn.Linear(4, 8))
    model[0].owner = model
    with flop_counter() as counter:
        model(torch.zeros(3, 4))
    assert counter.get_total_flops() == 2 * 3 * 4 * 8
