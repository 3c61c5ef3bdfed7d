"""`fastdiff.optimize` beside what else is done to pipelines: methods, adapters, offloading, in either order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook
from engine.cases import accelerated, build, denoiser_of, methods_for, record_of, sample
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import fastdiff
from fastdiff import ConfigError, FastDiffPipeline
from fastdiff.kernels.patching import parts
from fastdiff.kernels.patching.replacement import Replacement, innermost
from fastdiff.kernels.steps import Steps, steps_of
from fastdiff.pipelines import pipeline

ORDER = pytest.mark.parametrize("first", ["optimize", "other"])
KINDS = pytest.mark.parametrize(
    "name", ["DiTPipeline", "PixArtAlphaPipeline", "FluxPipeline", "UViTPipeline", "StableDiffusionPipeline"]
)
WEIGHTED = ("UViTPipeline", "StableDiffusionPipeline")
"""Where all norms have weights."""
METHODS = {"StableDiffusionPipeline": "deepcache"}
"""What mixes computed and reused units in each pipeline; by default exits and reuse."""


def method_of(name: str) -> str:
    return METHODS.get(name, "merged")


def optimize(pipe: DiffusionPipeline) -> None:
    """Every value is to stay the same to the bit, whatever the memory layout."""
    fastdiff.optimize(pipe, rounding="match_eager")


def in_either_order(first: str, pipe: DiffusionPipeline, other: Callable[[DiffusionPipeline], Any]) -> None:
    for action in (optimize, other) if first == "optimize" else (other, optimize):
        action(pipe)


def forwards(model: nn.Module) -> list[str]:
    """Returns the names of modules with a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """References run, and every one counts."""
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    calls: list[int] = []
    run = parts.residual_norm_modulate.residual_norm_modulate

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(parts.residual_norm_modulate, "residual_norm_modulate", counting)
    return calls


# -- methods -----------------------------------------------------------------------------------------------------------


@KINDS
@ORDER
def test_plans_give_the_same_images(name: str, first: str, reference: list[int]) -> None:
    expected = sample(accelerated(name, method_of(name)), name)
    assert not reference
    pipe = build(name)
    in_either_order(first, pipe, lambda pipe: fastdiff.enable(pipe, methods_for(pipe, method_of(name))))
    assert torch.equal(sample(pipe, name), expected)
    assert reference
    assert record_of(pipe).skipped > 0


@pytest.mark.parametrize(
    "name", ["DiTPipeline", *(pytest.param(name, marks=pytest.mark.slow) for name in ("FluxPipeline", "DDIMPipeline"))]
)
@pytest.mark.usefixtures("forced")
def test_plans_give_the_same_images_with_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "inherit-stages" if name == "DDIMPipeline" else "merged"
    pipe = accelerated(name, method, steps=4)
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    fastdiff.optimize(pipe)
    expected = sample(pipe, name, steps=4)
    monkeypatch.setenv("FASTDIFF_KERNELS", "triton")
    result = sample(pipe, name, steps=4)
    assert not torch.equal(result, expected)
    assert record_of(pipe).skipped > 0
    # Images are eight bits deep or numbers between 0 and 1: a sampling call may carry float32 roundings that far.
    torch.testing.assert_close(result.double(), expected.double(), rtol=0, atol=1e-4)


@KINDS
@ORDER
@pytest.mark.parametrize("last", ["restore", "disable"])
def test_either_can_be_taken_off_first(name: str, first: str, last: str, reference: list[int]) -> None:
    pipe = build(name)
    plain = sample(pipe, name)
    in_either_order(first, pipe, lambda pipe: fastdiff.enable(pipe, methods_for(pipe, method_of(name))))
    steps = [fastdiff.restore, fastdiff.disable]
    for action in steps if last == "disable" else reversed(steps):
        action(pipe)
    reference.clear()
    assert torch.equal(sample(pipe, name), plain)
    assert not reference
    assert not forwards(denoiser_of(pipe))


@torch.no_grad()
def test_components_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    pipe = build("StableDiffusionPipeline")
    pipe.vae.double()
    latents = torch.randn(2, pipe.vae.config.latent_channels, 4, 4, dtype=torch.float64)
    plain = pipe.vae.decode(latents).sample
    report = fastdiff.optimize(pipe)
    assert {name.partition(".")[0] for name in report.replaced} == {"unet", "vae"}
    assert not [name for name in report.left if "resnets" in name]
    torch.testing.assert_close(pipe.vae.decode(latents).sample, plain)
    assert fastdiff.restore(pipe) == len(report.replaced)
    assert not forwards(pipe.unet)
    assert not forwards(pipe.vae)


def test_compiled_denoiser_is_optimised() -> None:
    pipe = build("DiTPipeline")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert "transformer.transformer_blocks.0" in fastdiff.optimize(pipe).replaced


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_from_pretrained(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("DiTPipeline").save_pretrained(tmp_path)
    pipe = FastDiffPipeline.from_pretrained(tmp_path, kernels=kernels)
    assert steps_of(pipe.transformer) == Steps("fused" if kernels == "auto" else None)
    assert bool(fastdiff.restore(pipe)) == (kernels == "auto")
    monkeypatch.setattr(pipeline, "_resolve", lambda name: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="'auto' or 'off'; got 'on'"):
        FastDiffPipeline.from_pretrained(tmp_path, kernels="on")


# -- adapters ----------------------------------------------------------------------------------------------------------


def add_adapter(pipe: DiffusionPipeline) -> None:
    torch.manual_seed(0)
    modules = ["to_q", "to_v", "proj", "linear_1", "conv1"]
    # Not every class of diffusers has a method for this.
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False), denoiser_of(pipe)
    )


def switch_adapter(pipe: DiffusionPipeline, on: bool) -> None:
    for module in denoiser_of(pipe).modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)


@KINDS
@ORDER
def test_adapters_before_and_after(name: str, first: str, reference: list[int]) -> None:
    pipe = build(name)
    plain = sample(pipe, name)
    add_adapter(pipe)
    expected = sample(pipe, name)
    assert not torch.equal(expected, plain)

    pipe = build(name)
    in_either_order(first, pipe, add_adapter)
    assert torch.equal(sample(pipe, name), expected)
    assert reference
    switch_adapter(pipe, False)
    assert torch.equal(sample(pipe, name), plain)
    switch_adapter(pipe, True)
    fastdiff.restore(pipe)
    assert torch.equal(sample(pipe, name), expected)


# -- offloading --------------------------------------------------------------------------------------------------------


def model_offload(pipe: DiffusionPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: DiffusionPipeline) -> None:
    """What `enable_sequential_cpu_offload` does, with the CPU in place of an accelerator."""
    for component in (denoiser_of(pipe), pipe.vae):
        cpu_offload(component, torch.device("cpu"))


def group_offload(pipe: DiffusionPipeline) -> None:
    device = torch.device("cpu")
    try:
        apply_group_offloading(denoiser_of(pipe), device, device, "leaf_level")
    except AttributeError as error:
        if "'NoneType' object has no attribute 'type'" not in str(error):
            raise
        pytest.skip("this diffusers offloads groups only to an accelerator")


def hooks_on_every_module(pipe: DiffusionPipeline) -> None:
    for module in denoiser_of(pipe).modules():
        HookRegistry.check_if_exists_or_initialize(module).register_hook(DiffusersHook(), "nothing")
        add_hook_to_module(module, ModelHook())


OFFLOADS = {
    "model": model_offload,
    "sequential": sequential_offload,
    "group": group_offload,
    "hooks of both": hooks_on_every_module,
}


@KINDS
@ORDER
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloading_before_and_after(name: str, kind: str, first: str, reference: list[int]) -> None:
    pipe = build(name)
    plain = sample(pipe, name)
    in_either_order(first, pipe, OFFLOADS[kind])
    replaced = [module for module in denoiser_of(pipe).modules() if is_replaced(module)]
    assert len(replaced) == len(
        [module for module in denoiser_of(build_optimized(name)).modules() if is_replaced(module)]
    )
    reference.clear()
    assert torch.equal(sample(pipe, name), plain)
    assert torch.equal(sample(pipe, name), plain)  # offloading the whole model puts its hooks on anew
    # Where norms have hooks that load their weights, the models' own operations call them.
    assert reference or kind in ("group", "hooks of both") or (kind == "sequential" and name in WEIGHTED)
    fastdiff.restore(pipe)
    assert not any(map(is_replaced, denoiser_of(pipe).modules()))
    assert torch.equal(sample(pipe, name), plain)


@KINDS
@ORDER
def test_hooks_can_be_taken_off_first(name: str, first: str, reference: list[int]) -> None:
    pipe = build(name)
    plain = sample(pipe, name)
    model = denoiser_of(pipe)
    in_either_order(first, pipe, hooks_on_every_module)
    for module in model.modules():
        remove_hook_from_module(module)
        HookRegistry.check_if_exists_or_initialize(module).remove_hook("nothing", recurse=False)
    assert torch.equal(sample(pipe, name), plain)
    assert any(map(is_replaced, model.modules()))
    fastdiff.restore(pipe)
    reference.clear()
    assert torch.equal(sample(pipe, name), plain)
    assert not reference


@ORDER
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_methods_and_kernels_together(kind: str, first: str, reference: list[int]) -> None:
    name = "PixArtAlphaPipeline"
    expected = sample(accelerated(name, "inherit-1"), name)
    pipe = build(name)
    OFFLOADS[kind](pipe)
    in_either_order(first, pipe, lambda pipe: fastdiff.enable(pipe, methods_for(pipe, "inherit-1")))
    assert torch.equal(sample(pipe, name), expected)
    assert reference
    assert record_of(pipe).skipped > 0
    pipe.remove_all_hooks()
    assert torch.equal(sample(pipe, name), expected)


def build_optimized(name: str) -> DiffusionPipeline:
    pipe = build(name)
    fastdiff.optimize(pipe)
    return pipe


def is_replaced(module: nn.Module) -> bool:
    place = innermost(module)
    return place is not None and isinstance(getattr(*place), Replacement)
