"""Every tiny diffusers pipeline: full is plain, reuse runs what it should, `disable` restores."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
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


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    names = ("transformer", "transformer_2")
    return {name: module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)}


@dataclass
class Counted:
    """What is known of a denoiser beside the record: how often a plain call used it, which blocks then ran."""

    plain_calls: int
    blocks: BlockCalls


def count(stack: ExitStack, pipe: DiffusionPipeline, name: str) -> dict[str, Counted]:
    """Counts the blocks of every denoiser until the stack closes."""
    counted = {}
    for key, model in denoisers(pipe).items():
        calls = denoiser_calls(pipe, name, key)
        counted[key] = Counted(len(calls), stack.enter_context(counting(model, view(model).names, calls[0])))
    for item in counted.values():
        item.blocks.rows.clear()
    return counted


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
        counted = count(stack, pipe, name)
        fastdiff.enable(pipe, FeatureInheritance(interval=3, span=(1, None), last_key=False))
        assert isinstance(pipe, FastDiffPipeline)
        assert isinstance(pipe, own)
        sampled = sample(pipe, name)
        assert not torch.equal(sampled, plain)
        assert torch.equal(sample(pipe, name), sampled)

        for key, item in counted.items():
            record = pipe.fastdiff.last_run.denoisers[key]
            assert not record.fallbacks
            passes = item.plain_calls / len({call.evaluation for call in record.calls})
            assert len(record.branches) == passes  # guidance branches evaluated one after the other
            expected = [runs(call.evaluation - record.calls[0].evaluation, len(record.units)) for call in record.calls]
            assert np.array_equal(item.blocks.table(record.units), np.array(expected * 2))

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
