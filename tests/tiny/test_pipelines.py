"""The tiny pipelines sample, repeat themselves, and use every model they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

from .pipelines import TINY_PIPELINES
from .staged_pipelines import PRIOR_PIPELINES
from .unet_pipelines import UNET_PIPELINES
from .uvit import OWN_PIPELINES

PIPELINES = TINY_PIPELINES | PRIOR_PIPELINES | UNET_PIPELINES | OWN_PIPELINES
EVERY_PIPELINE = pytest.mark.parametrize("name", PIPELINES)


def sample(pipe: DiffusionPipeline, name: str, **arguments: Any) -> torch.Tensor:
    """Returns what the pipeline sampled."""
    return PIPELINES[name].sample(pipe, **arguments)


@EVERY_PIPELINE
def test_samples_repeat_use_every_model_and_hear_every_argument(name: str) -> None:
    ignored = PIPELINES[name].ignores
    pipe = PIPELINES[name].build()
    with calls_of(pipe, name) as ran:
        first = sample(pipe, name)

    assert ran == models_of(pipe, name)
    assert first.isfinite().all()
    assert first.std() > 0.01
    assert not torch.allclose(first, sample(pipe, name, steps=5))
    assert "guidance" in ignored or not torch.allclose(first, sample(pipe, name, guidance=False))
    other = sample(pipe, name, seed=1, **({} if "batch" in ignored else {"batch": 2}))
    assert len(other) == len(first) * (1 if "batch" in ignored else 2)
    assert not torch.allclose(first, other[: len(first)])
    torch.rand(1)
    assert torch.equal(first, sample(PIPELINES[name].build(), name))


def models_of(pipe: DiffusionPipeline, name: str) -> set[str]:
    """Returns the names of what predicts noise, and of what helps with it."""
    helpers = {"controlnet", "adapter"} & set(pipe.components)
    return {*PIPELINES[name].denoisers} | (set() if "ControlNetXS" in name else helpers)  # XS is a part of its UNet


@contextmanager
def calls_of(pipe: DiffusionPipeline, name: str) -> Iterator[set[str]]:
    """Collects the names of the models that run."""
    ran: set[str] = set()
    hooks = [
        getattr(pipe, key).register_forward_pre_hook(lambda *_, key=key: ran.add(key)) for key in models_of(pipe, name)
    ]
    yield ran
    for hook in hooks:
        hook.remove()


def test_dit_takes_another_scheduler() -> None:
    pipe = PIPELINES["DiTPipeline"].build()
    first = sample(pipe, "DiTPipeline")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert not torch.allclose(first, sample(pipe, "DiTPipeline"))
