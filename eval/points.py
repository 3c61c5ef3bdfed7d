"""What a sweep found out about each way of sampling, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdiff.eval.speed import Latency, Ratio, Turn, paired_ratio
from fastdiff.eval.store import Store
from fastdiff.eval.ways import MAIN, plain
from fastdiff.plan import ComputePlan


@dataclass(frozen=True, eq=False)
class Timing:
    """How fast a way is with some number of images at a time.

    Args:
        pipeline: latency of whole calls.
        speedup: over full sampling in the same rounds.
        denoiser: latency of all the denoisers' evaluations of a call; None if they were not timed.
        denoiser_speedup: over full sampling's in the same rounds.
        peak_bytes: of GPU memory; None elsewhere.
    """

    pipeline: Latency
    speedup: Ratio
    denoiser: Latency | None
    denoiser_speedup: Ratio | None
    peak_bytes: int | None


@dataclass(frozen=True, eq=False)
class Point:
    """One way of sampling, and what is known about it.

    Args:
        key: the way's name in files.
        baseline: key of full sampling with the same weights.
        way: what ``way.json`` says: spec, label, group, model, num_inference_steps, plain, peer.
        timings: by images at a time; empty if it was not timed.
        quality: what the judge says; None if there are no images.
        macs: of the denoisers for one image.
        macs_share: of what full sampling spends.
        depth: share of the denoisers' units that were computed; None for what leaves no record.
        plan: what the first batch executed; None for plain sampling and other packages.
        same_time: key of the plain way that takes the same time.
        notes: what is to be known beside.
        error: ``kind`` and ``message`` of why it could not be sampled.
    """

    key: str
    baseline: str
    way: Mapping[str, Any]
    timings: Mapping[int, Timing]
    quality: Mapping[str, Any] | None
    macs: float | None
    macs_share: float | None
    depth: float | None
    plan: ComputePlan | None
    same_time: str | None
    notes: Sequence[str]
    error: Mapping[str, str] | None

    @property
    def is_baseline(self) -> bool:
        """Whether other points are compared with this one."""
        return self.key == self.baseline


def read_points(store: Store) -> list[Point]:
    """All points of a sweep, finished or not, by key.

    Raises:
        StoreError: if the folder holds no sweep.
    """
    full = int(store.settings["num_inference_steps"])
    rounds = {batch: store.rounds(batch) for batch in store.timed_batches}
    matches = store.fact("matches") or {}
    return [_point(store, key, full, rounds, matches) for key in store.way_keys()]


def _point(
    store: Store, key: str, full: int, rounds: Mapping[int, list[dict[str, Turn]]], matches: Mapping[str, int]
) -> Point:
    way = store.told(key) or {}
    model = way.get("model", MAIN)
    baseline = plain(full, model=model).key
    work, whole = store.work(key), store.work(baseline)
    timings = {batch: _timing(turns, batch, key, baseline) for batch, turns in rounds.items()}
    return Point(
        key=key,
        baseline=baseline,
        way=way,
        timings={batch: timing for batch, timing in timings.items() if timing is not None},
        quality=store.quality(key),
        macs=work.macs,
        macs_share=work.macs / whole.macs if work.macs is not None and whole.macs else None,
        depth=work.depth,
        plan=work.plan,
        same_time=plain(matches[key], model=model).key if key in matches else None,
        notes=store.notes(key),
        error=store.error(key),
    )


def _timing(rounds: Sequence[Mapping[str, Turn]], batch: int, key: str, baseline: str) -> Timing | None:
    both = [(turns[key], turns[baseline]) for turns in rounds if key in turns and baseline in turns]
    if not both:
        return None
    denoisers = [(own.denoiser_seconds, full.denoiser_seconds) for own, full in both]
    known = [(own, full) for own, full in denoisers if own and full]
    peaks = [own.peak_bytes for own, _ in both if own.peak_bytes is not None]
    return Timing(
        pipeline=Latency.of([own.seconds for own, _ in both], batch),
        speedup=paired_ratio([full.seconds for _, full in both], [own.seconds for own, _ in both]),
        denoiser=Latency.of([own for own, _ in known], batch) if known else None,
        denoiser_speedup=paired_ratio([full for _, full in known], [own for own, _ in known]) if known else None,
        peak_bytes=max(peaks, default=None),
    )
