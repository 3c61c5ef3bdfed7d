"""What a call of a pipeline computes: multiply-accumulates of its denoisers, and which units ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fastdiff.cost import flop_counter
from fastdiff.pipelines.acceleration import DENOISERS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.engine.record import DenoiserRecord
    from fastdiff.plan import ComputePlan


@dataclass(frozen=True, eq=False)
class Work:
    """What a call computed.

    Args:
        macs: multiply-accumulates of the denoisers for one image; None if unknown.
        depth: units of the denoisers that were computed, as a share of all cells, in [0, 1]; None if unknown.
        plan: what the first denoiser executed; None if unknown.
    """

    macs: float | None = None
    depth: float | None = None
    plan: ComputePlan | None = None


def recorded_work(pipe: DiffusionPipeline, images: int) -> Work:
    """What the last call did, from the record that fastdiff's methods leave.

    Args:
        pipe: a pipeline whose methods are still enabled.
        images: how many that call made.
    """
    records = _records(pipe)
    if not records:
        return Work()
    cells = sum(len(call.actions) for record in records for call in record.calls)
    skipped = sum(record.skipped for record in records)
    return Work(sum(record.macs or 0.0 for record in records) / images, 1 - skipped / cells, records[0].plan)


def _records(pipe: DiffusionPipeline) -> list[DenoiserRecord]:
    acceleration = getattr(pipe, "fastdiff", None)
    run = None if acceleration is None else acceleration.last_run
    return [] if run is None else [record for record in run.denoisers.values() if record.calls]


def counted_macs(pipe: DiffusionPipeline, call: Callable[[], Any]) -> float:
    """Multiply-accumulates of a call's denoiser evaluations, counted by torch while they run.

    It needs no record, and so holds for plain sampling and for other packages. Work in compiled code and in kernels
    that torch has no formula for is not seen.
    """
    macs = 0.0

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal macs
            with flop_counter() as counter:
                result = forward(*args, **kwargs)
            macs += counter.get_total_flops() / 2
            return result

        return counted

    with ExitStack() as stack:
        for denoiser in denoisers_of(pipe):
            stack.enter_context(_wrapped_forward(denoiser, counting))
        call()
    return macs


def denoisers_of(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The components that predict noise."""
    return [part for name in DENOISERS if isinstance(part := getattr(pipe, name, None), nn.Module)]


@contextmanager
def _wrapped_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
