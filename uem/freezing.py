"""A dynamic rule turned into a static plan: each evaluation's mean depth, rounded so that the total cost stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdiff.methods import Method, SavedPlan
from fastdiff.methods.uncertainty_exit import UncertaintyExit
from fastdiff.plan import Action, ComputePlan


def freeze(
    depths: np.ndarray, price: np.ndarray, exits: Iterable[int], units: Sequence[str], meta: Mapping[str, Any]
) -> ComputePlan:
    """A static plan that costs what samples cost on average.

    Every evaluation gets the exit below its mean cost; those nearest to the exit above are then raised to it, until
    the total is within half a unit's cost of the samples' mean.

    Args:
        depths: units that samples ran, integers of shape ``(evaluations, samples)``.
        price: share of a full evaluation that each depth costs, ascending, shape ``(units + 1,)``.
        exits: depths, besides all units, at which the plan may stop.
        units: the units' names.
        meta: of the plan.

    Returns:
        The plan; its ``meta`` says what it is made of.
    """
    stops = np.array(sorted({*map(int, exits), len(units)}))
    prices = np.asarray(price)[stops]
    wanted = np.asarray(price)[depths].mean(1)
    places = np.clip(np.searchsorted(prices, wanted + 1e-12, side="right") - 1, 0, None)
    above = np.minimum(places + 1, len(stops) - 1)
    gains = prices[above] - prices[places]
    missing = wanted.sum() - prices[places].sum()
    part = np.divide(wanted - prices[places], gains, out=np.zeros_like(gains), where=gains > 0)
    for row in np.argsort(-part, kind="stable"):
        if gains[row] > 0 and missing >= gains[row] / 2:
            places[row] += 1
            missing -= gains[row]
    table = np.where(np.arange(len(units)) < stops[places][:, None], Action.COMPUTE, Action.EXIT)
    return ComputePlan(table, tuple(units), {**meta, "methods": ["UncertaintyExit, frozen"]})


def frozen_methods(plan: ComputePlan, method: UncertaintyExit) -> tuple[Method, ...]:
    """What to enable for a frozen plan: the plan, and the method that never stops but brings the exits' heads."""
    return SavedPlan(plan), method.changed(threshold=0, bin_edges=(), thresholds=())
