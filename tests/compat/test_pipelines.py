"""Every tiny diffusers pipeline: full is plain, reuse runs what it should, `disable` restores."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from engine.cases import EVERY_PIPELINE, build, denoiser_calls, sample
from torch import nn

import fastdiff
from fastdiff import ExitSchedule, FastDiffPipeline, FeatureInheritance
from fastdiff.backbones import view
from tiny.sampling import BlockCalls, counting

SEPARATE_PASSES = (
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "FluxControlNetPipeline",
    "WanPipeline",
    "WanPipeline (two experts)",
    "Lumina2Pipeline",
    "QwenImagePipeline",
    "CogView4Pipeline",
    "ChromaPipeline",
)
"""Pipelines that evaluate the guidance branches one after the other; the rest stacks them."""


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    names = ("transformer", "transformer_2")
    return {name: module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)}


def count(stack: ExitStack, pipe: DiffusionPipeline, name: str) -> dict[str, BlockCalls]:
    """Counts the blocks of every denoiser until the stack closes."""
    counts = {}
    for key, model in denoisers(pipe).items():
        inputs = denoiser_calls(pipe, name, key)[0]
        counts[key] = stack.enter_context(counting(model, view(model).names, inputs))
    return counts


@EVERY_PIPELINE
def test_full_plan_is_bitwise_the_plain_pipeline(name: str) -> None:
    pipe = build(name)
    plain = sample(pipe, name, steps=4)
    fastdiff.enable(pipe, ExitSchedule("full"))
    assert torch.equal(sample(pipe, name, steps=4), plain)
    run = pipe.fastdiff.last_run
    assert set(run.denoisers) == set(denoisers(pipe))
    assert run.calls > 0
    assert not any(record.fallbacks for record in run.denoisers.values())


@EVERY_PIPELINE
def test_reuse_runs_what_it_should_and_disable_restores(name: str) -> None:
    pipe = build(name)
    own = type(pipe)
    plain = sample(pipe, name)
    with ExitStack() as stack:
        counts = count(stack, pipe, name)
        fastdiff.enable(pipe, FeatureInheritance(interval=3, span=(1, None), last_key=False))
        for calls in counts.values():
            calls.rows.clear()
        assert isinstance(pipe, FastDiffPipeline)
        assert isinstance(pipe, own)
        sampled = sample(pipe, name)
        assert not torch.equal(sampled, plain)
        assert torch.equal(sample(pipe, name), sampled)

        for key, calls in counts.items():
            record = pipe.fastdiff.last_run.denoisers[key]
            assert not record.fallbacks
            assert len(record.branches) == (2 if name in SEPARATE_PASSES else 1)
            expected = [runs(call.evaluation - record.calls[0].evaluation, len(record.units)) for call in record.calls]
            assert np.array_equal(calls.table(record.units), np.array(expected * 2))

        fastdiff.disable(pipe)
        assert type(pipe) is own
        for model in denoisers(pipe).values():
            assert not any(hasattr(unit.module, "_diffusers_hook") for unit in view(model).units)
            assert not any("forward" in vars(unit.module) for unit in view(model).units)
        assert torch.equal(sample(pipe, name), plain)


def runs(row: int, units: int) -> list[Any]:
    """Every third evaluation computes all units, the others the first."""
    return [True] * units if row % 3 == 0 else [True] + [False] * (units - 1)


def test_every_evaluation_of_every_pipeline_is_seen() -> None:
    """The clock's rows are the scheduler's evaluations, whatever the pipeline does around them."""
    for name in ("PixArtSigmaPipeline", "CogVideoXPipeline", "StableDiffusion3Img2ImgPipeline"):
        pipe = build(name)
        fastdiff.enable(pipe, ExitSchedule("full"))
        sample(pipe, name, steps=8)
        first = 4 if "Img2Img" in name else 0
        seen = [call.evaluation for call in pipe.fastdiff.last_run.denoisers["transformer"].calls]
        assert sorted(set(seen)) == list(range(first, 8))
