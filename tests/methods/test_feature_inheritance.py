"""Feature inheritance: which evaluations are keys, which units inherit, and what forecasts are exact on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdiff import Action, ConfigError, FastDiffNoEffectWarning, FeatureInheritance
from fastdiff.backbones import view
from tiny.models import TINY_MODELS
from tiny.plans import C, F, R, request_of
from tiny.sampling import accelerate, calls_at, counting, evaluate

EVALUATIONS = 12


def keys(evaluations: int = EVALUATIONS, **settings_: Any) -> list[int]:
    """Evaluations in which every unit is computed."""
    table = FeatureInheritance(**settings_).plan(request_of(4, evaluations)).table
    return np.flatnonzero((table == C).all(axis=1)).tolist()


# -- key evaluations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"interval": 1}, list(range(12))),
        ({"interval": 2}, [0, 2, 4, 6, 8, 10, 11]),
        ({"interval": 2, "last_key": False}, [0, 2, 4, 6, 8, 10]),
        ({"interval": 5}, [0, 5, 10, 11]),
        ({"interval": 100}, [0, 11]),
        ({"interval": 100, "last_key": False}, [0]),
        ({"interval": 4, "pattern": "head_dense", "dense": 0.25}, [0, 1, 2, 4, 8, 11]),
        ({"interval": 4, "pattern": "tail_dense", "dense": 0.25}, [0, 4, 8, 9, 10, 11]),
        ({"interval": 4, "pattern": "tail_dense", "dense": 0.25, "last_key": False}, [0, 4, 8, 9, 10, 11]),
        ({"interval": 4, "pattern": "head_dense", "dense": 0}, [0, 4, 8, 11]),
        ({"interval": 4, "pattern": "head_dense", "dense": 1}, list(range(12))),
        ({"pattern": "list", "keys": (3, 7), "last_key": False}, [0, 3, 7]),
        ({"pattern": "list", "keys": (7, 3, 99)}, [0, 3, 7, 11]),
        ({"interval": 3, "min_evaluations": 12}, [0, 3, 6, 9, 11]),
        ({"interval": 3, "min_evaluations": 13}, list(range(12))),
    ],
    ids=str,
)
def test_patterns(settings_: dict[str, Any], expected: list[int]) -> None:
    assert keys(**settings_) == expected


@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.sampled_from(["uniform", "head_dense", "tail_dense"]),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_any_pattern_can_be_executed(
    evaluations: int, interval: int, pattern: str, dense: float, last_key: bool, order: int
) -> None:
    method = FeatureInheritance(interval=interval, pattern=pattern, dense=dense, last_key=last_key, order=order)
    plan = method.plan(request_of(5, evaluations)).validate()
    is_key = method.key_evaluations(evaluations)
    assert is_key[0]
    assert is_key[-1] or not last_key
    assert np.array_equal((plan.table == C).all(axis=1), is_key)
    assert np.diff(np.flatnonzero(is_key), append=evaluations).max() <= interval


# -- inherited units ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((0, None), [0, 1, 2, 3, 4, 5]),
        ((1, -1), [1, 2, 3, 4]),
        ((2, 5), [2, 3, 4]),
        ((-2, None), [4, 5]),
        ((None, 2), [0, 1]),
        ([3, 99], [3, 4, 5]),
    ],
)
def test_span_is_a_slice_of_the_units(span: Any, expected: list[int]) -> None:
    table = FeatureInheritance(interval=2, span=span).plan(request_of(6, 4)).table
    assert np.flatnonzero(table[1] == R).tolist() == expected
    assert set(table[1]) <= {R, C}


@pytest.mark.parametrize("span", [(3, 3), (4, 2), (6, None), (0, -6), (1, -5)])
def test_span_without_units_is_refused(span: Any) -> None:
    with pytest.raises(ConfigError, match=r"span .* holds none of the model's 6 units"):
        FeatureInheritance(span=span).plan(request_of(6, 4))


class Stack(nn.Module):
    """Residual blocks, each of which adds to a sample a polynomial of the timestep."""

    def __init__(self, polynomials: list[list[float]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Polynomial(coefficients) for coefficients in polynomials)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> torch.Tensor:
        for block in self.blocks:
            sample = block(sample, timestep)
        return sample


class Polynomial(nn.Module):
    def __init__(self, coefficients: list[float]) -> None:
        super().__init__()
        self.coefficients = coefficients
        self.inside = nn.Identity()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        powers = enumerate(self.coefficients)
        return self.inside(sample + sum(value * (timestep / 100) ** power for power, value in powers))


def polynomial_calls(evaluations: int) -> tuple[list[dict[str, Any]], list[float]]:
    """Timesteps that fall evenly, so that a polynomial of them is one of the evaluation's index; other samples each."""
    timesteps = [100.0 * (evaluations - row) for row in range(evaluations)]
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(evaluations, 2, 3, dtype=torch.float64, generator=generator)
    return [
        {"sample": sample, "timestep": torch.tensor(timestep, dtype=torch.float64)}
        for sample, timestep in zip(samples, timesteps, strict=True)
    ], timesteps


def exact_rows(degree: int, order: int, interval: int, evaluations: int = 16, **settings_: Any) -> np.ndarray:
    coefficients = [[0.3, 0.7, -0.2, 0.05][: degree + 1], [1.1, -0.4, 0.3, -0.02][: degree + 1]]
    model = Stack(coefficients)
    calls, timesteps = polynomial_calls(evaluations)
    method = FeatureInheritance(interval=interval, order=order, last_key=False, **settings_)
    outputs, record = accelerate(model, calls, method, timesteps)
    assert record.skipped
    exact = evaluate(model, calls)
    return np.array([torch.allclose(a, b, rtol=0, atol=2e-3) for a, b in zip(outputs, exact, strict=True)])


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_forecast_is_exact_on_polynomials_up_to_its_order(degree: int, order: int, interval: int) -> None:
    rows = np.arange(16)
    computed_before = -(-rows // interval)  # keys before a row
    known = computed_before >= degree + 1
    expected = (rows % interval == 0) | (known & (order >= degree))
    assert np.array_equal(exact_rows(degree, order, interval), expected)


def test_forecast_over_uneven_keys_is_exact_too() -> None:
    keys_ = (0, 1, 4, 6, 11)
    expected = [row in keys_ or row > 4 for row in range(16)]  # three keys make a parabola
    assert exact_rows(2, 2, 2, pattern="list", keys=keys_).tolist() == expected
    assert exact_rows(2, 1, 2, pattern="list", keys=keys_).tolist() == [row in keys_ for row in range(16)]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_first_rows_are_reused_until_a_forecast_is_possible(order: int) -> None:
    plan = FeatureInheritance(interval=3, order=order, last_key=False).plan(request_of(3, 9))
    inherits = R if order == 0 else F
    assert plan.table[:, 1].tolist() == [C, R, R, C, inherits, inherits, C, inherits, inherits]
    assert {len(plan.sources(row, 1)) for row in (7, 8)} == {min(order + 1, 3)}


@pytest.mark.parametrize("units", [1, 2])
def test_stacks_of_one_and_two_blocks_inherit(units: int) -> None:
    model = Stack([[0.5, 1.0]] * units)
    calls, timesteps = polynomial_calls(6)
    names = view(model).names
    with counting(model, names, calls[0]) as counted:
        outputs, _ = accelerate(model, calls, FeatureInheritance(interval=2, last_key=False), timesteps)
    assert counted.table(names).tolist() == [[1] * units, [0] * units] * 3
    exact = evaluate(model, calls)
    for row in (1, 3, 5):  # each block's residual fell by one since its key
        assert torch.allclose(outputs[row], exact[row] + units)


# -- executed ----------------------------------------------------------------------------------------------------------


def test_interval_one_is_the_plain_model() -> None:
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    model = tiny.build()
    calls = calls_at(tiny, (900, 500, 100))
    outputs, record = accelerate(model, calls, FeatureInheritance(interval=1, order=2), (900, 500, 100))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(outputs, evaluate(model, calls), strict=True))
    assert record.skipped == 0
    assert FeatureInheritance(interval=1).is_neutral
    assert not FeatureInheritance(interval=2).is_neutral
    assert not FeatureInheritance(interval=1, pattern="list", keys=(0,)).is_neutral


def test_setting_that_leaves_nothing_to_inherit_warns() -> None:
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    timesteps = (900, 500, 100)
    with pytest.warns(FastDiffNoEffectWarning, match="3 evaluations are too few"):
        accelerate(tiny.build(), calls_at(tiny, timesteps), FeatureInheritance(min_evaluations=9), timesteps)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_only_the_span_inherits(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    names = view(model).names
    timesteps = (900, 700, 500, 300)
    calls = calls_at(tiny, timesteps)
    with counting(model, names, calls[0]) as counted:
        accelerate(model, calls, FeatureInheritance(interval=2, span=(1, 3)), timesteps)
    expected = [[1] * len(names), [int(unit not in (1, 2)) for unit in range(len(names))]]
    assert counted.table(names).tolist() == [*expected, expected[0], expected[0]]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"interval": 0}, r"FeatureInheritance\.interval is a whole number from 1"),
        ({"interval": 1.5}, "interval"),
        ({"interval": math.nan}, "interval.*nan"),
        ({"interval": "2"}, "interval.*'2'"),
        ({"order": 4}, "order is a whole number from 0 to 3; got 4"),
        ({"order": -1}, "order"),
        ({"dense": 1.1}, "dense"),
        ({"dense": math.nan}, "dense.*nan"),
        ({"min_evaluations": -1}, "min_evaluations"),
        ({"level": "block"}, "level is one of stage, layer, branch; got 'block'"),
        ({"keep_up": -1}, "keep_up is a whole number from 0"),
        ({"keep_up": 1.5}, "keep_up"),
        ({"keep_up": math.nan}, "keep_up.*nan"),
        ({"pattern": "middle_dense"}, "uniform, head_dense, tail_dense, list; got 'middle_dense'"),
        ({"pattern": "list"}, "go together"),
        ({"keys": (1, 2)}, "go together"),
        ({"pattern": "list", "keys": (1, -2)}, "evaluation indices from 0"),
        ({"pattern": "list", "keys": (1.5,)}, "evaluation indices from 0"),
        ({"pattern": "list", "keys": 3}, "keys is a list"),
        ({"span": (1,)}, r"\(start, stop\)"),
        ({"span": (1, 2, 3)}, r"\(start, stop\)"),
        ({"span": (0.5, 2)}, r"\(start, stop\)"),
        ({"span": 3}, "span is a list"),
        ({"last_key": "yes"}, "last_key is True or False.*'yes'"),
        ({"last_key": None}, "last_key is True or False"),
    ],
)
def test_setting_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureInheritance(**setting)


def test_plan_says_the_order_of_its_forecasts() -> None:
    for order in (1, 2, 3):
        assert FeatureInheritance(order=order).plan(request_of(3, 9)).forecast_order == order
    plain = FeatureInheritance(order=0).plan(request_of(3, 9))
    assert not (plain.table == Action.FORECAST).any()
    cubic = FeatureInheritance(order=3, interval=4).plan(request_of(3, 9))
    assert cubic.merge(plain).forecast_order == plain.merge(cubic).forecast_order == 3
