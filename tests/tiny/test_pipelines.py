"""The tiny pipelines sample, repeat themselves, and use every model they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

from .pipelines import TINY_PIPELINES

EVERY_PIPELINE = pytest.mark.parametrize("name", TINY_PIPELINES)


def sample(pipe: DiffusionPipeline, name: str, **arguments: Any) -> np.ndarray:
    """Returns what the pipeline sampled."""
    return np.asarray(pipe(**TINY_PIPELINES[name].inputs(**arguments), return_dict=False)[0])


@EVERY_PIPELINE
def test_samples_repeat(name: str) -> None:
    pipe = TINY_PIPELINES[name].build()
    first = sample(pipe, name)

    assert len(first) == 1
    assert np.isfinite(first).all()
    assert first.std() > 0.01
    np.testing.assert_array_equal(first, sample(pipe, name))
    torch.rand(1)
    np.testing.assert_array_equal(first, sample(TINY_PIPELINES[name].build(), name))


@EVERY_PIPELINE
def test_every_argument_changes_the_sample(name: str) -> None:
    pipe = TINY_PIPELINES[name].build()
    first = sample(pipe, name)

    assert not np.allclose(first, sample(pipe, name, seed=1))
    assert not np.allclose(first, sample(pipe, name, steps=5))
    assert not np.allclose(first, sample(pipe, name, guidance=False))
    assert len(sample(pipe, name, batch=2)) == 2


@EVERY_PIPELINE
def test_every_denoiser_runs(name: str) -> None:
    pipe = TINY_PIPELINES[name].build()
    wanted = [key for key in ("transformer", "transformer_2", "controlnet") if pipe.components.get(key) is not None]
    ran: set[str] = set()
    for key in wanted:
        pipe.components[key].register_forward_pre_hook(lambda *_, key=key: ran.add(key))
    sample(pipe, name)
    assert ran == set(wanted)


def test_dit_takes_another_scheduler() -> None:
    pipe = TINY_PIPELINES["DiTPipeline"].build()
    first = sample(pipe, "DiTPipeline")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert not np.allclose(first, sample(pipe, "DiTPipeline"))
