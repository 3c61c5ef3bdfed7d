"""Rows of an evaluation with numbers that are made up, to see what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastdiff.eval import Ratio, describe_environment
from fastdiff.eval.points import Point, Timing
from fastdiff.eval.results import Results
from fastdiff.eval.speed import Latency

SAMPLES = 40
BATCH = 8


def per_image(mean: float, *, spread: float = 1.0, higher_is_better: bool = True) -> dict[str, Any]:
    """A metric of images of which half lie above and half below the mean."""
    values = mean + spread * np.where(np.arange(SAMPLES) % 2, 1.0, -1.0)
    error = float(np.std(values, ddof=1) / np.sqrt(SAMPLES))
    told = {"name": "", "value": mean, "worst": mean - spread, "higher_is_better": higher_is_better}
    return {**told, "values": values.tolist(), "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def distance(value: float, *, error: float = 0.5, own: float = 0.0) -> dict[str, Any]:
    """A distance whose resampled ones move with everyone else's, and by ``own`` for itself."""
    shared, alone = (np.random.default_rng(seed).normal(size=100) for seed in (0, int(1000 * value)))
    resampled = value + error * (shared - shared.mean()) / shared.std() + own * alone
    half = 1.96 * float(resampled.std(ddof=1))
    told = {"samples": SAMPLES, "reference_samples": 100, "library": "torchmetrics", "absent": {}}
    return {
        "value": value,
        "low": max(0.0, value - half),
        "high": value + half,
        "resampled": resampled.tolist(),
        **told,
    }


def row(
    key: str,
    *,
    speedup: float | None = 1.0,
    fid: float | None = 10.0,
    psnr: float = 30.0,
    group: str = "fewer-steps",
    label: str = "",
    steps: int = 50,
    model: str = "main",
    peer: str | None = None,
    same_time: str | None = None,
    **changes: Any,
) -> Point:
    """A row; without a distance it could not be sampled."""
    plain = group in ("full", "fewer-steps")
    way = {"spec": key, "label": label or key, "group": group, "model": model, "num_inference_steps": steps}
    way |= {"plain": plain, "peer": None if peer is None else {"name": peer, "version": "1"}}
    timing = None
    if speedup is not None:
        ratio = Ratio(speedup, speedup - 0.02, speedup + 0.02, 7)
        latency = Latency.of([8 / speedup] * 7, BATCH)
        timing = Timing(latency, ratio, None, None, None)
    point = Point(
        key=key,
        baseline="full" if model == "main" else f"{model}-full",
        way=way,
        timings={} if timing is None else {1: timing, BATCH: timing},
        quality=None if fid is None else {"fid": distance(fid, own=0.01), "psnr": per_image(psnr)},
        macs=1e9,
        macs_share=1.0 if speedup is None else 1 / speedup,
        depth=None,
        plan=None,
        same_time=same_time,
        notes=[],
        error=None if fid is not None else {"kind": "PeerUnavailableError", "message": "it <refuses>"},
    )
    return replace(point, **changes)


def results(points: Sequence[Point], **header: Any) -> Results:
    """These rows as results."""
    told: Mapping[str, Any] = {
        "date": "2026-01-01",
        "command": "fastdiff eval a/model --method '<b>'",
        "commit": None,
        "model": "a/<model>",
        "num_inference_steps": 50,
        "num_samples": SAMPLES,
        "seeds": [0],
        "dtype": "float32",
        "scheduler": "DDIMScheduler",
        "asked": "no guidance",
        "judged": {"features": "net@1", "reference": "set", "reference_samples": 100, "reference_digest": "d"},
        "environment": describe_environment(),
    }
    return Results({**told, **header}, points, BATCH)


def field() -> list[Point]:
    """Full sampling, fewer steps, a method better and one worse than them, a package and one that cannot run."""
    return [
        row("full", group="full", label="50 steps", psnr=100.0),
        row("better", speedup=2.0, fid=10.1, psnr=35.0, group="skipping", same_time="steps-25", label="share=0.5"),
        row("worse", speedup=1.9, fid=14.0, psnr=20.0, group="skipping", same_time="steps-25", label="share=0.6"),
        row("cache", speedup=2.1, fid=9.5, psnr=20.0, group="cache", peer="cache", same_time="steps-25"),
        row("unable", speedup=None, fid=None, group="cache", peer="cache"),
        row("steps-25", speedup=2.05, fid=11.0, psnr=25.0, label="25 steps", steps=25),
        row("steps-10", speedup=4.8, fid=20.0, psnr=18.0, label="10 steps", steps=10),
    ]
