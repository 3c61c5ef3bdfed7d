"""Unified Layer Skipping: an evenly spaced set of layers runs, the same for every input.

Liu et al., "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy" (arXiv 2404.06954),
section 3. A diffusion sampler needs an output at every step and sees no prefix, so the rule acts between full key
evaluations and by default reuses the residuals of what it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastdiff.errors import ConfigError
from fastdiff.methods.base import Method, PlanRequest, check_flag, check_number
from fastdiff.plan import Action, ComputePlan

if TYPE_CHECKING:
    from fastdiff.cost import UnitCosts


def even_layers(layers: int, kept: int) -> tuple[int, ...]:
    """``kept`` (at least 2) of ``layers`` indices, both ends among them, the gaps as equal as whole numbers allow."""
    if kept >= layers:
        return tuple(range(layers))
    return tuple(math.floor(index * (layers - 1) / (kept - 1) + 0.5) for index in range(kept))


def paper_layers(layers: int, kept: int) -> tuple[int, ...]:
    """The published rule (equation 1 and its released form), which beyond half of the layers leaves out one block.

    Raises:
        ConfigError: if fewer than two layers would be kept.
    """
    if kept < 2:
        raise ConfigError(
            f"The paper's rule keeps at least 2 layers, here it would keep {kept} of {layers}. "
            "Ask for a smaller speedup, or use variant='even'."
        )
    interval = layers // (kept - 1)
    inner = [index for index in range(1, layers - 1) if index % interval == 0]
    return (0, *inner[: kept - 2], layers - 1)


@dataclass(frozen=True)
class LayerSkipping(Method):
    """Leave out evenly spaced units between key evaluations.

    Args:
        speedup: block-compute ratio of an evaluation that skips, at least 1: ``floor(units / speedup)`` units run.
        target_speedup: instead of ``speedup``, the ratio to reach over the whole call, key evaluations, embeddings and
            output layers counted; solved from latencies measured on this machine for the shapes of the call.
        outside_share: share of the plain call's time spent outside the denoiser (text encoder, decoder), for
            ``target_speedup``; in [0, 1).
        variant: ``"even"``, or ``"paper"`` for the published rule to the letter.
        fill: what the units left out do: ``"reuse"`` their last residual, or ``"skip"`` (pass through).
        interval: every ``interval``-th evaluation is computed in full, from the first on; 0 for the first only.
        rotate: shift the kept inner units by one at each evaluation after a key, over the widest gap between them and
            back, so that units are refreshed in turn.

    Raises:
        ConfigError: for a value out of range, or a target that cannot be reached (when the plan is made).
    """

    speedup: float = 2.0
    target_speedup: float | None = None
    outside_share: float = 0.0
    variant: str = "even"
    fill: str = "reuse"
    interval: int = 3
    rotate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "speedup", 1, 1000)
        check_number(self, "outside_share", 0, 0.999)
        check_number(self, "interval", 0, 10_000, whole=True)
        check_flag(self, "rotate")
        if self.target_speedup is not None:
            check_number(self, "target_speedup", 1, 1000)
        if self.variant not in ("even", "paper"):
            raise ConfigError(f"LayerSkipping.variant is 'even' or 'paper'; got {self.variant!r}.")
        if self.fill not in ("reuse", "skip"):
            raise ConfigError(f"LayerSkipping.fill is 'reuse' or 'skip'; got {self.fill!r}.")

    @property
    def is_neutral(self) -> bool:
        """Whether every unit is kept or every evaluation is a key."""
        return (self.target_speedup is None and self.speedup == 1) or self.interval == 1

    def plan(self, request: PlanRequest) -> ComputePlan:
        """Key evaluations are computed, in all others only the kept units."""
        plan = request.full_plan(self)
        if any(trait.reuse != "residual" for trait in request.backbone.traits):
            raise ConfigError(
                f"LayerSkipping leaves out blocks of a residual stack; a {request.backbone.class_name} changes shape "
                "on the way. Use FeatureInheritance or EncoderPropagation for it."
            )
        rows, units = plan.table.shape
        keys = np.arange(rows) % self.interval == 0 if self.interval else np.arange(rows) == 0
        if self.target_speedup is not None:
            return self._slowest_on_target(plan, keys, request.costs())
        kept = math.floor(units / self.speedup + 1e-9)  # 33 / 1.1 is 29.999999999999996
        return self._with_kept(plan, keys, kept)

    def _with_kept(self, plan: ComputePlan, keys: np.ndarray, kept: int) -> ComputePlan:
        """The full plan with only ``kept`` units left in the evaluations that are no keys."""
        units = len(plan.units)
        layers = paper_layers(units, kept) if self.variant == "paper" else even_layers(units, max(2, kept))
        left_out = Action.REUSE if self.fill == "reuse" else Action.SKIP
        table = plan.table.copy()
        period = _period(layers, units) if self.rotate else 1
        last_key = np.maximum.accumulate(np.where(keys, np.arange(len(keys)), 0))
        for row in np.flatnonzero(~keys):
            phase = (row - last_key[row] - 1) % period  # starts anew at each key, so that few different rows arise
            table[row] = left_out
            table[row, _rotated(layers, units, phase)] = Action.COMPUTE
        return ComputePlan(table, plan.units, plan.meta)

    def _slowest_on_target(self, plan: ComputePlan, keys: np.ndarray, costs: UnitCosts) -> ComputePlan:
        """Of the plans that make the whole call ``target_speedup`` times faster the one that keeps most units."""
        assert self.target_speedup is not None
        evaluation = costs.total_latency
        outside = evaluation * self.outside_share / (1 - self.outside_share)
        best = 1.0
        for kept in range(len(plan.units), min(len(plan.units), 2) - 1, -1):
            candidate = self._with_kept(plan, keys, kept)
            reached = (evaluation + outside) / (evaluation / candidate.cost(costs).speedup + outside)
            if reached >= self.target_speedup * (1 - 1e-9):
                return candidate
            best = max(best, reached)
        raise ConfigError(
            f"target_speedup={self.target_speedup:g} is out of reach: with a full evaluation every "
            f"{self.interval or len(keys)}, at most {best:.2f} is possible here. Ask for less, or raise interval."
        )


def _rotated(layers: Sequence[int], units: int, phase: int) -> list[int]:
    """Shift the inner layers cyclically; the ends stay."""
    return [layer if layer in (0, units - 1) else 1 + (layer - 1 + phase) % (units - 2) for layer in layers]


def _period(layers: Sequence[int], units: int) -> int:
    """After how many shifts every inner unit has been among the layers: their largest distance, counted around."""
    inner = [layer for layer in layers if 0 < layer < units - 1]
    return int(np.diff([*inner, inner[0] + units - 2]).max()) if inner else 1
