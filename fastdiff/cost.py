"""What a plan costs: multiply-accumulates counted by torch, and latency measured on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from fastdiff.plan import READS_CACHE, Action, check_same_units

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    from fastdiff.backbones import Backbone, Unit
    from fastdiff.plan import ComputePlan


@dataclass(frozen=True, eq=False)
class UnitCosts:
    """What one evaluation of a denoiser costs, for one shape of its inputs.

    Args:
        units: the units' names.
        macs: multiply-accumulates of each unit, shape ``(units,)``; of the whole batch.
        fixed_macs: those outside the units (embeddings, output layers), which every evaluation pays.
        latency: seconds of each unit, shape ``(units,)``.
        fixed_latency: seconds outside the units.
        shortcut_macs: multiply-accumulates of what carries each unit's input past its residual, shape ``(units,)``:
            paid once more where that residual is kept, and paid still where it is reused. None for nothing.
    """

    units: tuple[str, ...]
    macs: np.ndarray
    fixed_macs: float
    latency: np.ndarray
    fixed_latency: float
    shortcut_macs: np.ndarray | None = None

    @property
    def total_macs(self) -> float:
        """MACs of one full evaluation."""
        return float(self.macs.sum() + self.fixed_macs)

    @property
    def total_latency(self) -> float:
        """Seconds of one full evaluation."""
        return float(self.latency.sum() + self.fixed_latency)


@dataclass(frozen=True)
class PlanCost:
    """A plan's price.

    Args:
        macs: multiply-accumulates of the whole sampling call, one guidance branch; None where only shares are known.
        macs_share: as a share of computing everything, in [0, 1].
        speedup: full latency over the plan's, of the denoiser alone; what reuse itself costs is not counted. Infinite
            for a plan that computes nothing at all.
    """

    macs: float | None
    macs_share: float
    speedup: float


def price(plan: ComputePlan, costs: UnitCosts | None = None) -> PlanCost:
    """Price a plan; without measured costs all units are taken as equal and everything else as free.

    Raises:
        ProfileMismatchError: if the costs are of other units.
    """
    computed = plan.table == Action.COMPUTE
    if costs is None:
        return PlanCost(None, plan.share, 1 / plan.share if plan.share else math.inf)
    check_same_units(plan.units, costs.units)
    macs = float((computed * costs.macs).sum() + plan.evaluations * costs.fixed_macs)
    if costs.shortcut_macs is not None:
        macs += float((_uses_shortcut(plan, costs.shortcut_macs > 0) * costs.shortcut_macs).sum())
    seconds = float((computed * costs.latency).sum() + plan.evaluations * costs.fixed_latency)
    share = macs / (plan.evaluations * costs.total_macs)
    return PlanCost(macs, share, plan.evaluations * costs.total_latency / seconds if seconds else math.inf)


def _uses_shortcut(plan: ComputePlan, has_shortcut: np.ndarray) -> np.ndarray:
    """Where a unit's shortcut runs besides the unit: its residual is reused there, or kept for a later row."""
    replaced = np.isin(plan.units, plan.meta.get("replaced", ()))
    uses = np.isin(plan.table, READS_CACHE) & has_shortcut & ~replaced
    for row, column in np.argwhere(uses):
        uses[list(plan.sources(row, column)), column] = True
    return uses


_measured: WeakKeyDictionary[nn.Module, dict[Any, UnitCosts]] = WeakKeyDictionary()


def measure(backbone: Backbone, arguments: Mapping[str, Any], repeats: int = 5) -> UnitCosts:
    """Count MACs and time every unit of a denoiser; remembered for each denoiser and shape of its inputs.

    The units' hooks must be at rest, so that everything is computed.

    Args:
        backbone: the denoiser's units.
        arguments: a call's arguments by name, on the denoiser's device.
        repeats: timed evaluations, after one to warm up; the median is taken.
    """
    known = _measured.setdefault(backbone.denoiser, {})
    layout = backbone.level, _layout(arguments)
    if layout not in known:
        macs, fixed_macs = count_macs(backbone, arguments)
        latency, fixed_latency = time_units(backbone, arguments, repeats)
        shortcut_macs = count_shortcut_macs(backbone, arguments)
        known[layout] = UnitCosts(backbone.names, macs, fixed_macs, latency, fixed_latency, shortcut_macs)
    return known[layout]


def count_macs(backbone: Backbone, arguments: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """MACs of each unit and of the rest in one evaluation, half of what torch's ``FlopCounterMode`` counts."""
    from fastdiff.kernels.dispatch import without_kernels

    with without_kernels(), flop_counter() as counter:
        flops, total = _per_unit(backbone, arguments, counter.get_total_flops)
    return flops / 2, (total - flops.sum()) / 2


def count_shortcut_macs(backbone: Backbone, arguments: Mapping[str, Any]) -> np.ndarray | None:
    """MACs of each unit's shortcut, see `UnitCosts`; None if no unit has one."""
    import torch

    macs = np.zeros(len(backbone.units))

    def count(index: int, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert unit.io is not None
        assert unit.shortcut is not None
        with flop_counter() as counter:
            unit.shortcut(unit.io.read(args, kwargs)[0])
        macs[index] = counter.get_total_flops() / 2

    with ExitStack() as hooks, torch.no_grad():
        for index, unit in enumerate(backbone.units):
            if unit.shortcut is not None:
                handle = unit.module.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index, unit=unit: count(index, unit, args, kwargs), with_kwargs=True
                )
                hooks.callback(handle.remove)
        if any(unit.shortcut is not None for unit in backbone.units):
            backbone.denoiser.forward(**arguments)
    return macs if macs.any() else None


def flop_counter() -> FlopCounterMode:
    """A counter of torch's, with the attention it has no formula for."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    attention = {
        getattr(torch.ops.aten, name): _attention_flops for name in _ATTENTION_OPS if hasattr(torch.ops.aten, name)
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]  # all that is asked of one
    return counter


class _Untracked:
    """In place of what attributes FLOPs to modules: only totals are read, and it does not end on cyclic modules.

    Some packages put a denoiser into a module that they put into the denoiser.
    """

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_ATTENTION_OPS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",  # XPU and out-of-tree devices
    "_scaled_dot_product_attention_math_for_mps",
)
"""Fused attention for which torch's counter has no formula: uncounted, attention on these devices would be free."""


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of ``softmax(q k^T) v`` for shapes ``(..., tokens, channels)``."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def time_units(backbone: Backbone, arguments: Mapping[str, Any], repeats: int) -> tuple[np.ndarray, float]:
    """Seconds of each unit and of the rest in one evaluation, the median over some repeats."""
    runs = [_per_unit(backbone, arguments, _clock(backbone)) for _ in range(repeats + 1)][1:]
    units = np.median([seconds for seconds, _ in runs], axis=0)
    # Taken in each run: an interruption counts where it happened, and not as work outside the units.
    return units, median(total - float(seconds.sum()) for seconds, total in runs)


def _per_unit(backbone: Backbone, arguments: Mapping[str, Any], read: Callable[[], float]) -> tuple[np.ndarray, float]:
    """How much a reading grows over each unit and over one whole evaluation."""
    import torch

    grown = np.zeros(len(backbone.units))

    def enter(index: int) -> None:
        grown[index] -= read()

    def leave(index: int) -> None:
        grown[index] += read()

    with _around_units(backbone, enter, leave):
        start = read()
        with torch.no_grad():
            backbone.denoiser.forward(**arguments)
        return grown, read() - start


@contextmanager
def _around_units(backbone: Backbone, before: Callable[[int], None], after: Callable[[int], None]) -> Iterator[None]:
    handles = []
    for index, unit in enumerate(backbone.units):
        handles.append(unit.module.register_forward_pre_hook(lambda *_, index=index: before(index)))
        handles.append(unit.module.register_forward_hook(lambda *_, index=index: after(index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clock(backbone: Backbone) -> Callable[[], float]:
    """Wall-clock seconds, after the denoiser's device has finished what it was given."""
    device = next((parameter.device for parameter in backbone.denoiser.parameters()), "cpu")

    def read() -> float:
        synchronize(device)
        return time.perf_counter()

    return read


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished what it was given; nothing to do on the CPU."""
    import torch

    device = torch.device(device)
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _layout(value: Any) -> Any:
    """What of a call's arguments decides its cost: shapes, dtypes and device, not values."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return tuple(value.shape), str(value.dtype), str(getattr(value, "device", ""))
    if isinstance(value, Mapping):
        return tuple((key, _layout(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_layout, value))
    return str(type(value))
