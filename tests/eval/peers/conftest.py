from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fastdiff import zoo

STEPS = 6


def sample(pipe: DiffusionPipeline, steps: int = STEPS, batch: int = 2) -> np.ndarray:
    """Images of the seeds 0, 1, ..., float32 of shape ``(batch, 32, 32, 3)``."""
    taken = inspect.signature(pipe.__call__).parameters
    asked: dict[str, Any] = {"batch_size": batch}
    if "class_labels" in taken:
        asked = {"class_labels": list(range(batch)), "guidance_scale": 2.0}
    elif "prompt" in taken:
        asked = {"prompt": ["a red A on a blue background"] * batch, "guidance_scale": 2.0}
    seeds = [torch.Generator("cpu").manual_seed(seed) for seed in range(batch)]
    return pipe(**asked, num_inference_steps=steps, generator=seeds, output_type="np").images


def load(model: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(zoo.path(model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def plain() -> dict[str, tuple[DiffusionPipeline, np.ndarray]]:
    """The shipped pipelines with what they sample; tests leave them as they find them."""
    pipes = {model: load(model) for model in ("glyphs-dit", "glyphs-sd", "glyphs-ddpm")}
    return {model: (pipe, sample(pipe)) for model, pipe in pipes.items()}


@pytest.fixture(autouse=True)
def _traceless(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a trace on the shared pipelines."""
    shared = request.getfixturevalue("plain") if "plain" in request.fixturenames else {}
    before = {model: traces(pipe) for model, (pipe, _) in shared.items()}
    yield
    assert {model: traces(pipe) for model, (pipe, _) in shared.items()} == before


def traces(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything that hangs on a pipeline's class and modules: attributes, submodules, hooks."""
    modules = {
        f"{name}.{path}": (type(module), sorted(vars(module)), list(module._modules), len(module._forward_pre_hooks))
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
        for path, module in part.named_modules()
    }
    cls = type(pipe)
    return {**modules, "class": sorted(vars(cls)), "call": cls.__call__, "pipe": sorted(set(vars(pipe)) & COMPARED)}


COMPARED = {"_context_manager", "_context_kwargs", "_is_cached", "_original_call", "unet", "transformer"}
