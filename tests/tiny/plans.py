"""Small compute plans and units to make them for, by hand and drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from torch import nn

from fastdiff import Action, ComputePlan
from fastdiff.backbones import Backbone, BlockIO, Unit
from fastdiff.cost import UnitCosts
from fastdiff.engine import Grid
from fastdiff.methods import PlanRequest
from fastdiff.plan import READS_CACHE, UnitTraits

C, F, R, S, D, E = Action.COMPUTE, Action.FORECAST, Action.REUSE, Action.SKIP, Action.DROP, Action.EXIT


def names(units: int) -> tuple[str, ...]:
    return tuple(f"blocks.{index}" for index in range(units))


def plan_of(*rows: list[Action], **meta: Any) -> ComputePlan:
    return ComputePlan(np.array(rows), names(len(rows[0])), meta)


@st.composite
def tables(draw: st.DrawFn, actions: tuple[Action, ...] = (C, F, R, S), exits: bool = True) -> np.ndarray:
    """Tables that hold the rules V1, V3 and V5."""
    rows, units = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    return draw(tables_of(rows, units, actions, exits))


@st.composite
def tables_of(draw: st.DrawFn, rows: int, units: int, actions: tuple[Action, ...], exits: bool = True) -> np.ndarray:
    table = np.zeros((rows, units), dtype=int)
    for row in range(rows):
        depth = draw(st.integers(1, units)) if exits and draw(st.booleans()) else units
        for unit in range(units):
            filled = (table[:row, unit] == C).any()
            allowed = [action for action in actions if filled or action not in READS_CACHE]
            table[row, unit] = draw(st.sampled_from(allowed)) if unit < depth else E
    return table


@st.composite
def networks(draw: st.DrawFn, units: int) -> list[UnitTraits]:
    """Traits with any kind of reuse and any long skips."""
    return [
        UnitTraits(
            name,
            reuse=draw(st.sampled_from(["residual", "output", "branch"])),
            reads=tuple(draw(st.sets(st.sampled_from(names(units)[: index - 1])))) if index > 1 else (),
            is_output=draw(st.sampled_from([False, False, True])),
        )
        for index, name in enumerate(names(units))
    ]


def backbone_of(segments: Sequence[int], traits: Sequence[UnitTraits] | None = None) -> Backbone:
    """A denoiser of as many identities, for plans that are not executed."""
    traits = traits or [UnitTraits(name) for name in names(len(segments))]
    units = (Unit(nn.Identity(), BlockIO(), trait, segment) for trait, segment in zip(traits, segments, strict=True))
    return Backbone(nn.Identity(), tuple(units))


def grid_of(timesteps: Sequence[float], log_snr: Sequence[float] | None = None) -> Grid:
    """Evaluations at these training timesteps, of unknown signal-to-noise ratio unless it is given."""
    unknown = np.full(len(timesteps), np.nan)
    return Grid(np.array(timesteps, dtype=float), unknown if log_snr is None else np.array(log_snr), 1000, True)


def request_of(units: int, evaluations: int | Grid, costs: UnitCosts | None = None) -> PlanRequest:
    """What a method is asked when a call begins, on a denoiser of equal units."""
    grid = grid_of(np.linspace(999, 0, evaluations)) if isinstance(evaluations, int) else evaluations

    def measured() -> UnitCosts:
        assert costs is not None, "the method asked for costs"
        return costs

    return PlanRequest(backbone_of([0] * units), grid, measured)
