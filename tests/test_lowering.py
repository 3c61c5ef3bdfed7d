"""Lowering a plan: which residuals are kept, by whom they are read, when they go, and what forecasts weigh."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import Action, ComputePlan, PlanError, ProfileMismatchError
from fastdiff.engine.program import extrapolation_weights, lower
from fastdiff.plan import READS_CACHE
from tiny.plans import C, F, R, S, backbone_of, names, networks, plan_of, tables


def runs(plan: ComputePlan, segments: list[int], row: int) -> list[tuple[int, int, tuple[int, ...]]]:
    readings = lower(plan, backbone_of(segments)).readings[row]
    return [(*reading.run, tuple(key.row for key in reading.sources)) for reading in readings]


def test_one_residual_stands_for_a_run_of_reused_units() -> None:
    plan = plan_of([C] * 6, [C, R, R, R, C, R])
    program = lower(plan, backbone_of([0] * 6))
    assert runs(plan, [0] * 6, 1) == [(1, 3, (0,)), (5, 5, (0,))]
    assert program.captures == (tuple(key for reading in program.readings[1] for key in reading.sources), ())


def test_runs_end_at_segments_other_sources_and_other_actions() -> None:
    assert runs(plan_of([C] * 4, [R] * 4), [0, 0, 1, 1], 1) == [(0, 1, (0,)), (2, 3, (0,))]
    other_sources = plan_of([C] * 4, [C, C, R, R], [R] * 4)
    assert runs(other_sources, [0] * 4, 2) == [(0, 1, (1,)), (2, 3, (0,))]
    other_action = plan_of([C] * 4, [C] * 4, [R, F, F, R])
    assert runs(other_action, [0] * 4, 2) == [(0, 0, (1,)), (1, 2, (1, 0)), (3, 3, (1,))]


def test_lowering_refuses_what_validation_refuses() -> None:
    with pytest.raises(PlanError, match="V5"):
        lower(plan_of([R]), backbone_of([0]))
    with pytest.raises(ProfileMismatchError):
        lower(plan_of([C]), backbone_of([0, 0]))


@given(st.data())
@settings(deadline=None)
def test_exactly_what_a_later_row_reads_is_kept_until_its_last_reader(data: st.DataObject) -> None:
    table = data.draw(tables(actions=(C, C, F, R, S)))
    rows, units = table.shape
    segments = np.cumsum(data.draw(st.lists(st.integers(0, 1), min_size=units, max_size=units))).tolist()
    traits = data.draw(networks(units))
    plan = ComputePlan(table, names(units), {"forecast_order": data.draw(st.integers(1, 3))})
    program = lower(plan, backbone_of(segments, traits))
    plan = program.plan
    assert plan == ComputePlan(table, names(units), plan.meta).prune(traits)

    last_reader: dict[Any, int] = {}
    alone = [None if kind == "residual" else unit for unit, kind in enumerate(plan.reuse_kinds(traits))]
    assert program.residual == tuple(unit is None for unit in alone)
    for row in range(rows):
        kinds = [
            (Action(cell), segments[unit], plan.sources(row, unit), alone[unit]) if cell in READS_CACHE else None
            for unit, cell in enumerate(plan.table[row])
        ]
        covered = [unit for reading in program.readings[row] for unit in range(reading.run.first, reading.run.last + 1)]
        assert covered == [unit for unit, kind in enumerate(kinds) if kind]
        for reading in program.readings[row]:
            first, last = reading.run
            sources = tuple(key.row for key in reading.sources)
            assert {kinds[unit] for unit in range(first, last + 1)} == {kinds[first]}
            assert sources == kinds[first][2]  # type: ignore[index]
            assert all(key.run == reading.run for key in reading.sources)
            assert reading.weights == extrapolation_weights(sources, row)
            assert (plan.table[list(sources), first : last + 1] == C).all()
            last_reader.update(dict.fromkeys(reading.sources, row))
        for left, right in pairwise(program.readings[row]):
            assert right.run.first > left.run.last + 1 or kinds[left.run.last] != kinds[right.run.first]

    assert program.last_reader == last_reader
    kept = defaultdict(set)
    for key in last_reader:
        kept[key.row].add(key)
    assert [sorted(captured) for captured in program.captures] == [sorted(kept[row]) for row in range(rows)]


@given(st.data(), st.integers(0, 4))
@settings(deadline=None)
def test_extrapolation_is_exact_on_polynomials_of_its_degree(data: st.DataObject, degree: int) -> None:
    points = data.draw(st.lists(st.integers(0, 40), min_size=degree + 1, max_size=degree + 1, unique=True))
    row = max(points) + data.draw(st.integers(1, 5))
    coefficients = data.draw(st.lists(st.integers(-5, 5), min_size=degree + 1, max_size=degree + 1))
    weights = extrapolation_weights(points, row)
    values = [np.polyval(coefficients, point) for point in points]
    expected = np.polyval(coefficients, row)
    scale = sum(abs(weight * value) for weight, value in zip(weights, values, strict=True)) + 1
    assert abs(np.dot(weights, values) - expected) < 1e-9 * scale
    assert abs(sum(weights) - 1) < 1e-9 * sum(map(abs, weights))


def test_one_degree_less_is_not_exact() -> None:
    for degree in (1, 2, 3):
        points = range(degree)  # one point too few
        weights = extrapolation_weights(points, degree + 1)
        assert abs(np.dot(weights, [point**degree for point in points]) - (degree + 1) ** degree) > 0.5
