"""Accelerated UNet pipelines as people use them: offloaded, adapted, shared, replaced, interrupted, resized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from compat.suite import DEEP, METHODS, PARALLEL, PIPELINES, sample
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

import fastdiff
from fastdiff import ExitSchedule, StateError

SD, CONTROLLED = "StableDiffusionPipeline (PNDM)", "StableDiffusionControlNetPipeline"
EVERY_METHOD = pytest.mark.parametrize("method", [PARALLEL, DEEP])


def accelerated(name: str, method: str = PARALLEL) -> Any:
    """Returns a new tiny pipeline with a method of the suite enabled."""
    return fastdiff.enable(PIPELINES[name].build(), METHODS[method])


# -- calls that differ -------------------------------------------------------------------------------------------------


@EVERY_METHOD
def test_size_may_change_from_call_to_call(method: str) -> None:
    """Latents of 9x9 halve to 5, 3 and 2, so that the decoder is told what to grow to."""
    pipe = accelerated(CONTROLLED, method)
    odd = {"height": 72, "width": 88}
    first = sample(pipe, CONTROLLED)
    resized = sample(pipe, CONTROLLED, **odd)
    assert resized.shape[-2:] == (9, 11)
    assert torch.equal(sample(pipe, CONTROLLED), first)
    assert torch.equal(resized, sample(accelerated(CONTROLLED, method), CONTROLLED, **odd))
    assert pipe.fastdiff.last_run.skipped > 0


def test_full_plan_is_plain_at_sizes_that_do_not_halve() -> None:
    pipe = PIPELINES[CONTROLLED].build()
    odd = {"height": 72, "width": 88}
    plain = sample(pipe, CONTROLLED, **odd)
    fastdiff.enable(pipe, ExitSchedule("full"))
    assert torch.equal(sample(pipe, CONTROLLED, **odd), plain)


@EVERY_METHOD
@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline (refiner)"])
def test_strength_may_change_from_call_to_call(name: str, method: str) -> None:
    """Each begins elsewhere on the grid."""
    pipe = accelerated(name, method)
    strengths = (0.7, 1.0, 0.5)
    sampled = [sample(pipe, name, strength=strength, steps=8) for strength in strengths]
    for strength, own in zip(strengths, sampled, strict=True):
        assert torch.equal(own, sample(accelerated(name, method), name, strength=strength, steps=8))
    assert not torch.equal(sampled[0], sampled[1])


def test_image_prompts_weight_may_change_from_call_to_call() -> None:
    name = "StableDiffusionPipeline (IP-Adapter)"
    pipe = accelerated(name)
    first = sample(pipe, name)
    pipe.set_ip_adapter_scale(0.1)
    weak = sample(pipe, name)
    assert not torch.equal(weak, first)
    fresh = accelerated(name)
    fresh.set_ip_adapter_scale(0.1)
    assert torch.equal(weak, sample(fresh, name))


@EVERY_METHOD
def test_call_that_was_interrupted_leaves_nothing(method: str) -> None:
    pipe = accelerated(CONTROLLED, method)
    expected = sample(pipe, CONTROLLED)

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return kwargs

    stopped = sample(pipe, CONTROLLED, seed=1, callback_on_step_end=interrupt)
    assert len(pipe.fastdiff.last_run.denoisers["unet"].calls) == 2
    assert not torch.equal(stopped, expected)
    assert torch.equal(sample(pipe, CONTROLLED), expected)


# -- components that change --------------------------------------------------------------------------------------------


def model_offload(pipe: DiffusionPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: DiffusionPipeline) -> None:
    for component in (pipe.unet, pipe.controlnet, pipe.vae):
        cpu_offload(component, torch.device("cpu"))


def group_offload(pipe: DiffusionPipeline) -> None:
    device = torch.device("cpu")
    try:
        apply_group_offloading(pipe.unet, device, device, "leaf_level")
    except AttributeError as error:
        if "'NoneType' object has no attribute 'type'" not in str(error):
            raise
        pytest.skip("this diffusers offloads groups only to an accelerator")


@pytest.mark.parametrize("first", ["fastdiff", "offload"])
@pytest.mark.parametrize("offload", [model_offload, sequential_offload, group_offload])
@EVERY_METHOD
def test_offloaded_pipeline_samples_the_same(
    method: str, offload: Callable[[DiffusionPipeline], None], first: str
) -> None:
    expected = sample(accelerated(CONTROLLED, method), CONTROLLED)
    pipe = PIPELINES[CONTROLLED].build()
    plain = sample(pipe, CONTROLLED)
    if first == "offload":
        offload(pipe)
    fastdiff.enable(pipe, METHODS[method])
    if first == "fastdiff":
        offload(pipe)
    for _ in range(2):
        assert torch.equal(sample(pipe, CONTROLLED), expected)
        assert pipe.fastdiff.last_run.skipped > 0
    fastdiff.disable(pipe)
    for _ in range(2):
        assert torch.equal(sample(pipe, CONTROLLED), plain)


@EVERY_METHOD
def test_adapters_come_and_go(method: str) -> None:
    peft = pytest.importorskip("peft")

    def adapt(pipe: DiffusionPipeline) -> None:
        torch.manual_seed(0)
        modules = ["to_q", "to_k", "to_v", "conv1", "conv_shortcut"]
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False))

    pipe = accelerated(CONTROLLED, method)
    without = sample(pipe, CONTROLLED)
    adapt(pipe)
    sampled = sample(pipe, CONTROLLED)
    assert pipe.fastdiff.last_run.skipped > 0
    assert not torch.equal(sampled, without)
    adapted = PIPELINES[CONTROLLED].build()
    adapt(adapted)
    fastdiff.enable(adapted, METHODS[method])
    assert torch.equal(sampled, sample(adapted, CONTROLLED))
    pipe.unet.disable_adapters()
    assert torch.equal(sample(pipe, CONTROLLED), without)


@EVERY_METHOD
def test_denoiser_and_control_may_be_replaced(method: str) -> None:
    pipe = accelerated(CONTROLLED, method)
    sample(pipe, CONTROLLED)
    other = PIPELINES[CONTROLLED].build()
    with torch.no_grad():
        for model in (other.unet, other.controlnet):
            for weight in model.parameters():
                weight.mul_(1.01)
    expected = sample(fastdiff.enable(other, METHODS[method]), CONTROLLED)
    fastdiff.disable(other)
    pipe.unet, pipe.controlnet = other.unet, other.controlnet
    assert torch.equal(sample(pipe, CONTROLLED), expected)
    assert pipe.fastdiff.last_run.skipped > 0


@EVERY_METHOD
def test_pipelines_that_share_a_denoiser(method: str) -> None:
    """`from_pipe` makes another pipeline of the same UNet: it stays plain, and may be accelerated in turn."""
    pipe = accelerated(SD, method)
    expected = sample(pipe, SD)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    name = "StableDiffusionImg2ImgPipeline"
    plain = PIPELINES[name].build()
    plain.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)

    assert torch.equal(sample(other, name), sample(plain, name))
    with pytest.raises(StateError, match="shares"):
        fastdiff.enable(other, METHODS[method])
    assert torch.equal(sample(pipe, SD), expected)
    fastdiff.disable(pipe)
    fastdiff.enable(other, METHODS[method])
    sample(other, name)
    assert other.fastdiff.last_run.skipped > 0


@EVERY_METHOD
def test_moving_to_another_dtype(method: str) -> None:
    pipe = accelerated(CONTROLLED, method)
    single = sample(pipe, CONTROLLED)
    half = sample(pipe.to(torch.bfloat16), CONTROLLED)
    record = pipe.fastdiff.last_run.denoisers["unet"]
    assert half.dtype == torch.bfloat16
    assert record.skipped > 0
    assert not record.fallbacks
    assert (half.float() - single).abs().mean() < 0.2 * single.abs().mean()
