"""Feature inheritance: between key evaluations a span of units inherits what the nearest earlier key computed.

A-SDM (arXiv 2406.00210, section 3, "tuning-free feature inheritance"); with ``order`` the inherited residual is
extrapolated by finite differences over the last keys, as TaylorSeer does with a Taylor series (arXiv 2503.06923).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdiff.errors import ConfigError
from fastdiff.methods.base import Method, PlanRequest, check_flag, check_number, check_tuple
from fastdiff.plan import Action, ComputePlan

PATTERNS = ("uniform", "head_dense", "tail_dense", "list")


@dataclass(frozen=True)
class FeatureInheritance(Method):
    """Compute a span of units only at key evaluations; in between reuse or forecast its residual.

    Args:
        interval: a key every ``interval`` evaluations, at least 1.
        pattern: ``"uniform"``; ``"head_dense"`` or ``"tail_dense"`` for keys only at the first or last ``dense`` share
            of the call; ``"list"`` for the evaluations in ``keys``.
        keys: with ``pattern="list"``, the key evaluations; the first evaluation is one anyway.
        dense: share of the evaluations in the dense part, in [0, 1].
        span: the inherited units, as ``(start, stop)`` of a slice; negative counts from the end. All by default: a
            longer span saves more and was no worse where it was measured.
        order: degree of the forecast, 0 (reuse) to 3.
        last_key: whether the last evaluation is a key.
        min_evaluations: calls with fewer evaluations, as few-step models make them, are computed in full.

    Raises:
        ConfigError: for a value out of range, or a span without units (when the plan is made).
    """

    interval: int = 2
    pattern: str = "uniform"
    keys: tuple[int, ...] = ()
    dense: float = 0.2
    span: tuple[int, int | None] = (0, None)
    order: int = 0
    last_key: bool = True
    min_evaluations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "interval", 1, 10_000, whole=True)
        check_number(self, "dense", 0, 1)
        check_number(self, "order", 0, 3, whole=True)
        check_number(self, "min_evaluations", 0, 10_000, whole=True)
        check_flag(self, "last_key")
        check_tuple(self, "keys", "evaluation indices")
        check_tuple(self, "span", "two unit indices")
        if self.pattern not in PATTERNS:
            raise ConfigError(f"FeatureInheritance.pattern is one of {', '.join(PATTERNS)}; got {self.pattern!r}.")
        if not all(isinstance(key, int) and key >= 0 for key in self.keys):
            raise ConfigError(f"FeatureInheritance.keys are evaluation indices from 0; got {self.keys}.")
        if bool(self.keys) != (self.pattern == "list"):
            raise ConfigError("FeatureInheritance.keys and pattern='list' go together.")
        if len(self.span) != 2 or not all(isinstance(end, (int, type(None))) for end in self.span):
            raise ConfigError(f"FeatureInheritance.span is (start, stop) in unit indices; got {self.span!r}.")

    @property
    def is_neutral(self) -> bool:
        """Whether every evaluation is a key."""
        return self.pattern != "list" and self.interval == 1

    def key_evaluations(self, evaluations: int) -> np.ndarray:
        """Which evaluations are keys, a boolean array of shape ``(evaluations,)``."""
        rows = np.arange(evaluations)
        keys = np.isin(rows, self.keys) if self.pattern == "list" else rows % self.interval == 0
        dense = round(self.dense * evaluations)
        if self.pattern == "head_dense":
            keys |= rows < dense
        if self.pattern == "tail_dense":
            keys |= rows >= evaluations - dense
        if evaluations < self.min_evaluations:
            keys[:] = True
        keys[0] = True
        keys[-1] |= self.last_key
        return keys

    def plan(self, request: PlanRequest) -> ComputePlan:
        """Key evaluations are computed, the span inherits in all others."""
        plan = request.full_plan(self)
        rows, units = plan.table.shape
        span = np.zeros(units, dtype=bool)
        span[slice(*self.span)] = True
        if not span.any():
            raise ConfigError(f"FeatureInheritance.span {self.span} holds none of the model's {units} units.")
        keys = self.key_evaluations(rows)
        inherited = span & ~keys[:, None]
        seen = np.cumsum(keys)[:, None]  # a forecast needs two keys before it
        is_forecast = inherited & (seen >= 2) & (self.order > 0)
        table = np.where(is_forecast, Action.FORECAST, np.where(inherited, Action.REUSE, Action.COMPUTE))
        forecast = {"forecast_order": self.order} if self.order else {}
        return ComputePlan(table, plan.units, {**plan.meta, **forecast})
