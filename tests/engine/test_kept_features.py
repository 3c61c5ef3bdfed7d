"""Kept features are not written to, and what is added to them belongs to the evaluation that computed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine.loops import Sampled, assert_same, encoder_of, kept_between, sample_loop, small_unet
from torch import nn

from fastdiff import EncoderPropagation
from tiny.base import Draw
from tiny.per_sample import one_sample_at_a_time

NO_NOISE = {"prior_noise": 0.0}


def freeu(model: nn.Module) -> None:
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)


def test_freeu_does_not_write_into_kept_features() -> None:
    """It scales the first half of what enters the deepest up stages in place."""
    model = small_unet()
    freeu(model)
    keys = (0, 2, 7)
    method = {"keys": keys, **NO_NOISE}
    with one_sample_at_a_time():
        sequential = sample_loop(model, EncoderPropagation(parallel=False, **method))
        parallel = sample_loop(model, EncoderPropagation(**method))
        assert_same(sequential, parallel)
        assert_same(parallel, sample_loop(model, EncoderPropagation(**method)))
        with kept_between(model, encoder_of(model), keys):
            assert_same(sequential, sample_loop(model))
        model.disable_freeu()
        assert not torch.equal(sequential.latents, sample_loop(model, EncoderPropagation(**method)).latents)


def adapter_residuals(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
    """What a T2I-Adapter adds to each down stage; UNets take the list apart and add in place."""
    draw = Draw(3)
    rows, _, height, width = call["sample"].shape
    shapes = [(8, height, width), (16, height // 2, width // 2), (16, height // 4, width // 4)]
    return call | {"down_intrablock_additional_residuals": [draw(1, *shape).repeat(rows, 1, 1, 1) for shape in shapes]}


def control_residuals(evaluation: int, call: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
    """What a ControlNet adds to the skips and the bottleneck."""
    draw = Draw(3)
    rows, _, height, width = call["sample"].shape
    full, half, quarter = ((height // f, width // f) for f in (1, 2, 4))
    shapes = [(8, *full), (8, *full), (8, *half), (16, *half), (16, *quarter), (16, *quarter)]
    down = tuple(scale * draw(rows, *shape) for shape in shapes)
    middle = scale * draw(rows, 16, *quarter)
    return call | {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


@pytest.mark.parametrize("residuals", [adapter_residuals, control_residuals])
def test_residuals_are_added_once_to_what_is_reused(residuals: Callable[..., dict[str, Any]]) -> None:
    model = small_unet()
    keys = (0, 2, 7)
    arguments = {"batch": 2, "before": residuals}
    with one_sample_at_a_time():
        sequential = sample_loop(model, EncoderPropagation(keys=keys, parallel=False, **NO_NOISE), **arguments)
        parallel = sample_loop(model, EncoderPropagation(keys=keys, **NO_NOISE), **arguments)
        assert_same(sequential, parallel)
        with kept_between(model, encoder_of(model), keys):
            assert_same(sequential, sample_loop(model, **arguments))
        assert not torch.equal(sequential.latents, sample_loop(model, EncoderPropagation(keys=keys)).latents)


@pytest.mark.parametrize("later", [2.0, 0.0, None])
def test_control_belongs_to_the_features_of_its_key(later: float | None) -> None:
    """A scale that changes or ends within a group takes effect at the next key."""
    model = small_unet()
    keys = (0, 4, 8)

    def control(evaluation: int, call: dict[str, Any], change: int) -> dict[str, Any]:
        if evaluation < change:
            return control_residuals(evaluation, call)
        return call if later is None else control_residuals(evaluation, call, scale=later)

    def sampled(change: int, **options: Any) -> Sampled:
        method = EncoderPropagation(keys=keys, **NO_NOISE, **options)
        return sample_loop(model, method, before=lambda row, call: control(row, call, change))

    with one_sample_at_a_time():
        within, parallel = sampled(6, parallel=False), sampled(6)
        assert_same(within, parallel)
        assert_same(within, sampled(8))
        assert not torch.equal(within.latents, sampled(99).latents)
        assert not torch.equal(within.latents, sampled(4).latents)
