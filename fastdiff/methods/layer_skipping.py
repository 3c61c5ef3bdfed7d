"""Unified Layer Skipping: an evenly spaced set of layers runs, the same for every input.

Liu et al., "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy" (arXiv 2404.06954),
section 3. A diffusion sampler needs an output at every step and sees no prefix, so the rule acts between full key
evaluations and by default reuses the residuals of what it leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastdiff.errors import ConfigError
from fastdiff.methods.base import Method, PlanRequest, check_flag, check_number
from fastdiff.plan import Action, ComputePlan


def even_layers(layers: int, kept: int) -> tuple[int, ...]:
    """``kept`` of ``layers`` indices, both ends among them, with gaps as equal as whole numbers allow."""
    if kept >= layers:
        return tuple(range(layers))
    if kept < 2:
        return (0,)
    return tuple(math.floor(index * (layers - 1) / (kept - 1) + 0.5) for index in range(kept))


def paper_layers(layers: int, speedup: float) -> tuple[int, ...]:
    """The published rule (equation 1 and its released form), which for speedups below 2 keeps one block at the bottom.

    Raises:
        ConfigError: if fewer than two layers would be kept.
    """
    kept = math.floor(layers / speedup)
    if kept < 2:
        raise ConfigError(
            f"The paper's rule keeps at least 2 layers; {layers} layers at speedup {speedup:g} keep {kept}."
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
        rotate: shift the kept inner units by one at each evaluation that skips, over one gap between them and back, so
            that all are refreshed in turn and few different rows arise.

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
        rows, units = plan.table.shape
        keys = np.arange(rows) % self.interval == 0 if self.interval else np.arange(rows) == 0
        speedup = self.speedup if self.target_speedup is None else self._solve(request, keys)
        kept = set(even_layers(units, max(2, math.floor(units / speedup))))
        if self.variant == "paper":
            kept = set(paper_layers(units, speedup))
        left_out = Action.REUSE if self.fill == "reuse" else Action.SKIP
        table = plan.table.copy()
        period = max(1, round((units - 1) / max(len(kept) - 1, 1)))  # by then the kept set is back where it was
        for phase, row in enumerate(np.flatnonzero(~keys)):
            runs = self._rotated(kept, units, phase % period) if self.rotate else kept
            table[row] = [Action.COMPUTE if unit in runs else left_out for unit in range(units)]
        return ComputePlan(table, plan.units, plan.meta)

    @staticmethod
    def _rotated(kept: set[int], units: int, phase: int) -> set[int]:
        """Shift the inner kept units cyclically; the ends always run."""
        inner = units - 2
        return {unit if unit in (0, units - 1) else 1 + (unit - 1 + phase) % inner for unit in kept}

    def _solve(self, request: PlanRequest, keys: np.ndarray) -> float:
        """The block-compute ratio between keys that makes the whole call ``target_speedup`` times faster."""
        assert self.target_speedup is not None
        costs = request.costs()
        blocks, rest = float(costs.latency.sum()), float(costs.fixed_latency)
        evaluation = blocks + rest
        outside = evaluation * self.outside_share / (1 - self.outside_share)
        budget = (evaluation + outside) / self.target_speedup - outside - rest  # for the blocks, per evaluation
        between = (budget * len(keys) - blocks * keys.sum()) / max((~keys).sum(), 1)
        fastest = 2 / len(costs.latency)  # the even rule keeps both ends
        if between < blocks * fastest:
            best = (evaluation + outside) / (outside + rest + blocks * (keys.mean() + (~keys).mean() * fastest))
            raise ConfigError(
                f"target_speedup={self.target_speedup:g} is out of reach: with a full evaluation every "
                f"{self.interval or len(keys)}, at most {best:.2f} is possible here. Ask for less, or raise interval."
            )
        return max(1.0, blocks / between)
