"""Feature inheritance: between key evaluations part of the denoiser inherits what the nearest earlier key computed.

A-SDM (arXiv 2406.00210, section 3, "tuning-free feature inheritance"); on UNets DeepCache (arXiv 2312.00858) is one of
its points. With ``order`` the inherited value is extrapolated by finite differences over the last keys, as TaylorSeer
does with a Taylor series (arXiv 2503.06923).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.errors import ConfigError
from fastdiff.methods.base import Method, PlanRequest, check_flag, check_number, check_tuple, inheriting
from fastdiff.plan import Action, ComputePlan

if TYPE_CHECKING:
    from fastdiff.backbones import Backbone

PATTERNS = ("uniform", "head_dense", "tail_dense", "list")
UNET_LEVELS = ("stage", "layer", "branch")


@dataclass(frozen=True)
class FeatureInheritance(Method):
    """Compute part of the denoiser only at key evaluations; in between reuse or forecast what it contributes.

    On transformers a span of blocks inherits its residual. On UNets the shallow end of the decoder is computed, with
    the part of the encoder that it reads, and inherits the deep features that enter it; everything else does not run.

    Args:
        interval: a key every ``interval`` evaluations, at least 1.
        pattern: ``"uniform"``; ``"head_dense"`` or ``"tail_dense"`` for keys only at the first or last ``dense`` share
            of the call; ``"list"`` for the evaluations in ``keys``.
        keys: with ``pattern="list"``, the key evaluations; the first evaluation is one anyway.
        dense: share of the evaluations in the dense part, in [0, 1].
        span: for transformers, the inherited units as ``(start, stop)`` of a slice; negative counts from the end. All
            by default: a longer span saves more and was no worse where it was measured.
        level: for UNets, what ``keep_up`` counts: ``"layer"`` (the default), a resnet with its attentions, or
            ``"stage"``. ``"branch"`` counts stages too, but in the rest of them only the residual branches inherit:
            convolutions, attentions and feed-forwards, each added to the fresh hidden state.
        keep_up: for UNets, how many of the shallowest up layers or stages are computed at every evaluation; by
            default one layer or two stages. One layer saves most and was no worse where it was measured.
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
    level: str | None = None
    keep_up: int | None = None
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
        if self.level not in (None, *UNET_LEVELS):
            raise ConfigError(f"FeatureInheritance.level is one of {', '.join(UNET_LEVELS)}; got {self.level!r}.")
        if self.keep_up is not None:
            check_number(self, "keep_up", 0, 1000, whole=True)
        if len(self.span) != 2 or not all(isinstance(end, (int, type(None))) for end in self.span):
            raise ConfigError(f"FeatureInheritance.span is (start, stop) in unit indices; got {self.span!r}.")

    @classmethod
    def deepcache(cls, interval: int = 5, branch: int = 0, **options: Any) -> FeatureInheritance:
        """DeepCache: between keys only the shallowest layers of a UNet run, around the deep features of the key.

        Args:
            interval: a key every ``interval`` evaluations.
            branch: the deepest skip connection that is still computed, 0 for the one from the first convolution.
            **options: other fields of `FeatureInheritance`.

        Raises:
            ConfigError: for a value out of range.
        """
        if not isinstance(branch, int) or isinstance(branch, bool) or branch < 0:
            raise ConfigError(f"DeepCache's branch is the number of a skip connection from 0; got {branch!r}.")
        given = {"last_key": False, **options}
        return cls(interval=interval, level="layer", keep_up=branch + 1, **given)

    @property
    def view_level(self) -> str:
        """How finely a denoiser must be seen for it."""
        return "branch" if self.level == "branch" else "layer"

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
        """Key evaluations are computed, in all others the chosen units inherit."""
        plan = request.full_plan(self)
        keys = self.key_evaluations(plan.evaluations)
        table = inheriting(plan, self._inheriting_units(request.backbone), keys, self.order)
        forecast = {"forecast_order": self.order} if self.order else {}
        return ComputePlan(table, plan.units, {**plan.meta, **forecast})

    def _inheriting_units(self, backbone: Backbone) -> np.ndarray:
        """The units that inherit between keys, a boolean array of shape ``(units,)``."""
        is_unet = any(unit.stage.startswith("up_blocks.") for unit in backbone.units)
        given: dict[str, Any] = {"level": self.level, "keep_up": self.keep_up}
        if is_unet:
            given = {"span": self.span if self.span != (0, None) else None}
        if misplaced := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"FeatureInheritance.{misplaced[0]} is for {'transformers' if is_unet else 'UNets'}, and this is a "
                f"{backbone.class_name}. Use {'keep_up' if is_unet else 'span'} to say what inherits."
            )
        return self._deep_units(backbone) if is_unet else self._span_units(backbone)

    def _span_units(self, backbone: Backbone) -> np.ndarray:
        span = np.zeros(len(backbone.units), dtype=bool)
        span[slice(*self.span)] = True
        if not span.any():
            raise ConfigError(f"FeatureInheritance.span {self.span} holds none of the model's {len(span)} units.")
        return span

    def _deep_units(self, backbone: Backbone) -> np.ndarray:
        """The unit whose output enters the layers that are kept, or the branches of all that is not kept."""
        by_layer = self.level in (None, "layer")
        groups = [unit.layer if by_layer else unit.stage for unit in backbone.units]
        ups = [group for group in dict.fromkeys(groups) if group.startswith("up_blocks.") and group[-1].isdigit()]
        keep = (1 if by_layer else 2) if self.keep_up is None else self.keep_up
        if keep >= len(ups):
            raise ConfigError(
                f"FeatureInheritance.keep_up={keep} leaves nothing to inherit: this {backbone.class_name} has "
                f"{len(ups)} up {'layers' if by_layer else 'stages'}. Keep fewer."
            )
        after = groups.index(ups[-keep]) if keep else groups.index(ups[-1]) + groups.count(ups[-1])
        units = np.arange(len(groups))
        if self.level != "branch":
            return units == after - 1
        boundary = np.zeros((2, len(groups)), dtype=np.int8)
        boundary[1, after - 1] = Action.REUSE
        deep = ComputePlan(boundary, backbone.names, {"replaced": list(backbone.names)}).prune(backbone.traits)
        is_branch = np.array([trait.reuse != "output" for trait in backbone.traits])
        return (deep.table[1] != Action.COMPUTE) & is_branch
