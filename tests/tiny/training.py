"""Trainings of a second, for a tiny DiT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fastdiff.uem import TrainConfig
from fastdiff.uem.train import train

from .pipelines import TINY_PIPELINES
from .uvit import OWN_PIPELINES

SMALL: dict[str, Any] = {
    "samples": 12,
    "record_batch": 4,
    "evaluations": 4,
    "num_inference_steps": 4,
    "steps": 6,
    "batch_size": 8,
    "warmup_steps": 0,
    "rank": 4,
    "checkpoint_every": 2,
    "validation_rows": 16,
}

DRAWN_ANEW = ("generator", "num_inference_steps", "output_type", "latents")


def small(**settings: Any) -> TrainConfig:
    """Returns how to train."""
    return TrainConfig(**SMALL | settings)


def tiny_dit() -> DiffusionPipeline:
    """Returns the pipeline."""
    return TINY_PIPELINES["DiTPipeline"].build()


def pipeline_and_call(name: str, images: int = 3) -> tuple[DiffusionPipeline, dict[str, Any], dict[str, Any]]:
    """Returns a tiny pipeline, what it is asked for, with a value for each image, and further arguments of its call."""
    tiny = {**TINY_PIPELINES, **OWN_PIPELINES}[name]
    given = {key: value for key, value in tiny.inputs(batch=images).items() if key not in DRAWN_ANEW}
    requests = {
        key: value for key, value in given.items() if isinstance(value, (list, torch.Tensor)) and len(value) == images
    }
    return tiny.build(), requests, {key: value for key, value in given.items() if key not in requests}


def train_in_turns(rank: int, port: int, folder: Path, said: Any, settings: dict[str, dict[str, Any]]) -> None:
    """One of two processes, as a launcher starts them, which train with several settings."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, given in settings.items():
        try:
            results[name] = train(tiny_dit(), small(**given), folder / name)
        except Exception as error:  # noqa: PERF203 - each by itself
            results[name] = f"{type(error).__name__}: {error}"
    said.put((rank, results))
