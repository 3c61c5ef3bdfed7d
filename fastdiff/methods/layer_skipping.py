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
    """Leave out evenly spaced layers between key evaluations.

    The layers are the denoiser's blocks. The units of a U-ViT that only merge a long skip into the stream are none, and
    run at every evaluation.

    Args:
        speedup: block-compute ratio of an evaluation that skips, at least 1: ``floor(layers / speedup)`` layers run.
        target_speedup: instead of ``speedup``, the ratio to reach over the whole call, key evaluations, embeddings and
            output layers counted; solved from latencies measured on this machine for the shapes of the call.
        outside_share: share of the plain call's time spent outside the denoiser (text encoder, decoder), for
            ``target_speedup``; in [0, 1).
        variant: ``"even"``, or ``"paper"`` for the published rule to the letter.
        fill: what the layers left out do: ``"reuse"`` their last residual, or ``"skip"`` (pass through).
        interval: every ``interval``-th evaluation is computed in full, from the first on; 0 for the first only.
        rotate: shift the kept inner layers by one at each evaluation after a key, over the widest gap between them and
            back, so that layers are refreshed in turn.

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
        """Whether every layer is kept or every evaluation is a key."""
        return (self.target_speedup is None and self.speedup == 1) or self.interval == 1

    def plan(self, request: PlanRequest) -> ComputePlan:
        """Key evaluations are computed, in all others only the kept layers and what merges long skips."""
        plan = request.full_plan(self)
        if any(trait.reuse != "residual" for trait in request.backbone.traits):
            raise ConfigError(
                f"LayerSkipping leaves out blocks of a residual stack; a {request.backbone.class_name} changes shape "
                "on the way. Use FeatureInheritance or EncoderPropagation for it."
            )
        rows = plan.evaluations
        keys = np.arange(rows) % self.interval == 0 if self.interval else np.arange(rows) == 0
        layers = np.flatnonzero([not unit.merges_skip for unit in request.backbone.units])
        if self.target_speedup is not None:
            return self._slowest_on_target(plan, layers, keys, request.costs())
        kept = math.floor(len(layers) / self.speedup + 1e-9)  # 33 / 1.1 is 29.999999999999996
        return self._with_kept(plan, layers, keys, kept)

    def _with_kept(self, plan: ComputePlan, layers: np.ndarray, keys: np.ndarray, number: int) -> ComputePlan:
        """The full plan with only ``number`` layers left in the evaluations that are no keys.

        Args:
            plan: the full plan.
            layers: columns of the layers, ascending.
            keys: which evaluations are keys, shape ``(evaluations,)``.
            number: layers to keep.
        """
        total = len(layers)
        kept = paper_layers(total, number) if self.variant == "paper" else even_layers(total, max(2, number))
        left_out = Action.REUSE if self.fill == "reuse" else Action.SKIP
        table = plan.table.copy()
        period = _period(kept, total) if self.rotate else 1
        last_key = np.maximum.accumulate(np.where(keys, np.arange(len(keys)), 0))
        for row in np.flatnonzero(~keys):
            phase = (row - last_key[row] - 1) % period  # starts anew at each key, so that few different rows arise
            table[row, layers] = left_out
            table[row, layers[_rotated(kept, total, phase)]] = Action.COMPUTE
        return ComputePlan(table, plan.units, plan.meta)

    def _slowest_on_target(
        self, plan: ComputePlan, layers: np.ndarray, keys: np.ndarray, costs: UnitCosts
    ) -> ComputePlan:
        """Of the plans that make the whole call ``target_speedup`` times faster the one that keeps most layers."""
        assert self.target_speedup is not None
        evaluation = costs.total_latency
        outside = evaluation * self.outside_share / (1 - self.outside_share)
        best = 1.0
        for number in range(len(layers), min(len(layers), 2) - 1, -1):
            candidate = self._with_kept(plan, layers, keys, number)
            reached = (evaluation + outside) / (evaluation / candidate.cost(costs).speedup + outside)
            if reached >= self.target_speedup * (1 - 1e-9):
                return candidate
            best = max(best, reached)
        raise ConfigError(
            f"target_speedup={self.target_speedup:g} is out of reach: with a full evaluation every "
            f"{self.interval or len(keys)}, at most {best:.2f} is possible here. Ask for less, or raise interval."
        )


def _rotated(kept: Sequence[int], layers: int, phase: int) -> list[int]:
    """Shift the kept inner layers cyclically; the ends stay."""
    return [layer if layer in (0, layers - 1) else 1 + (layer - 1 + phase) % (layers - 2) for layer in kept]


def _period(kept: Sequence[int], layers: int) -> int:
    """After how many shifts every inner layer has been kept once: their largest distance, counted around."""
    inner = [layer for layer in kept if 0 < layer < layers - 1]
    return int(np.diff([*inner, inner[0] + layers - 2]).max()) if inner else 1
