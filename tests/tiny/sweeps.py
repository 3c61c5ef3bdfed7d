"""A small sweep over a tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from fastdiff.eval.points import Point, read_points
from fastdiff.eval.sampling import Samples
from fastdiff.eval.store import Store
from fastdiff.eval.sweep import Settings, Sweep
from fastdiff.eval.tasks import make_task
from fastdiff.eval.ways import Way, parse_ways

from .pipelines import TINY_PIPELINES

STEPS = 4
SPECS = ("steps:2", "feature-inheritance:interval=2")
KEYS = ("steps-2", "steps-4", "steps-4+feature-inheritance")


def tiny_dit() -> DiffusionPipeline:
    return TINY_PIPELINES["DiTPipeline"].build()


def judge(samples: Samples, full: Samples) -> dict[str, Any]:
    error = np.square(samples.denoised - full.denoised).mean()
    return {"mean": samples.images.mean(axis=(0, 1, 2)), "error": float(error), "samples": len(samples)}


def sweep(
    folder: Path,
    specs: tuple[str, ...] = SPECS,
    *,
    pipe: DiffusionPipeline | None = None,
    seed: int = 0,
    ways: tuple[Way, ...] = (),
    judged: Mapping[str, Any] | None = None,
    judge: Callable[[Samples, Samples], Mapping[str, Any]] = judge,
    **settings: Any,
) -> Sweep:
    pipe = pipe or tiny_dit()
    task = make_task(pipe, class_labels=range(10), guidance_scale=1.5, seed=seed)
    given = {"num_samples": 7, "batch_size": 2, "rounds": 0, "matches": False, "timing_batch": 2} | settings
    return Sweep(
        pipe,
        [*parse_ways(specs, STEPS), *ways],
        task,
        judge,
        folder,
        Settings(num_inference_steps=STEPS, **given),
        judged=judged,
        progress=False,
    )


def contents(store: Store) -> dict[str, Any]:
    """All images to the byte, and all quality."""
    return {
        key: (
            store.samples(key, 7, 2).images.tobytes(),
            store.samples(key, 7, 2).denoised.tobytes(),
            store.quality(key),
        )
        for key in store.way_keys()
    }


def points(store: Store) -> dict[str, Point]:
    return {point.key: point for point in read_points(store)}
