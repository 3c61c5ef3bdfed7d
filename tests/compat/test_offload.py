"""Offloading by accelerate and by diffusers, put on before or after acceleration, and left as it was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from engine.cases import accelerated, build, counting_blocks, methods_for, planned_runs, record_of, sample
from torch import nn

import fastdiff
from fastdiff.backbones import view

NAMES = pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "FluxPipeline"])
"""PixArt's blocks hold weights of their own, so that offloading weight by weight puts a hook on the block itself."""
ORDER = pytest.mark.parametrize("first", ["fastdiff", "offload"])
METHOD = "inherit-1"


class Noting(ModelHook):
    """Stands for a hook that loads a module's weights: notes each time it is asked to."""

    def __init__(self) -> None:
        self.loads = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.loads += 1
        return args, kwargs


def put_on_every_block(pipe: DiffusionPipeline) -> list[Noting]:
    hooks = [Noting() for _ in view(pipe.transformer).units]
    for hook, unit in zip(hooks, view(pipe.transformer).units, strict=True):
        add_hook_to_module(unit.module, hook)
    return hooks


def model_offload(pipe: DiffusionPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: DiffusionPipeline) -> None:
    """What `enable_sequential_cpu_offload` does, with the CPU in place of an accelerator."""
    for component in (pipe.transformer, pipe.vae):
        cpu_offload(component, torch.device("cpu"))


def group_offload(offload_type: str) -> Callable[[DiffusionPipeline], None]:
    def offload(pipe: DiffusionPipeline) -> None:
        device = torch.device("cpu")
        size = 1 if offload_type == "block_level" else None
        try:
            apply_group_offloading(pipe.transformer, device, device, offload_type, num_blocks_per_group=size)
        except AttributeError as error:
            if "'NoneType' object has no attribute 'type'" not in str(error):
                raise
            pytest.skip("this diffusers offloads groups only to an accelerator")

    return offload


OFFLOADS: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "model": model_offload,
    "sequential": sequential_offload,
    "hooks on blocks": put_on_every_block,
    "group of blocks": group_offload("block_level"),
    "group of leaves": group_offload("leaf_level"),
}


@NAMES
@ORDER
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloaded_pipeline_samples_the_same(name: str, kind: str, first: str) -> None:
    expected = sample(accelerated(name, METHOD), name)
    pipe = build(name)
    plain = sample(pipe, name)
    with counting_blocks(pipe, name) as counted:
        if first == "offload":
            OFFLOADS[kind](pipe)
        fastdiff.enable(pipe, methods_for(pipe, METHOD))
        if first == "fastdiff":
            OFFLOADS[kind](pipe)
        for _ in range(2):  # offloading the whole model puts its hooks on anew after every call
            counted.rows.clear()
            assert torch.equal(sample(pipe, name), expected)
            assert (counted.table(record_of(pipe).units) == planned_runs(record_of(pipe))).all()
            assert record_of(pipe).skipped > 0
        fastdiff.disable(pipe)
        for _ in range(2):
            counted.rows.clear()
            assert torch.equal(sample(pipe, name), plain)
            assert (counted.table(view(pipe.transformer).names) == 1).all()


@NAMES
@ORDER
def test_disable_leaves_the_hooks_of_accelerate(name: str, first: str) -> None:
    pipe = build(name)
    plain = sample(pipe, name)
    hooks = put_on_every_block(pipe) if first == "offload" else []
    fastdiff.enable(pipe, methods_for(pipe, METHOD))
    hooks = hooks or put_on_every_block(pipe)
    sample(pipe, name)
    fastdiff.disable(pipe)

    for hook in hooks:
        hook.loads = 0
    assert torch.equal(sample(pipe, name), plain)
    assert len({hook.loads for hook in hooks}) == 1
    assert hooks[0].loads >= 7
    for unit in view(pipe.transformer).units:
        remove_hook_from_module(unit.module)
        assert getattr(unit.module.forward, "__func__", None) is type(unit.module).forward
    assert torch.equal(sample(pipe, name), plain)


@ORDER
def test_disable_leaves_group_offloading(first: str) -> None:
    pipe = build("FluxPipeline")
    if first == "offload":
        group_offload("block_level")(pipe)
    fastdiff.enable(pipe, methods_for(pipe, METHOD))
    if first == "fastdiff":
        group_offload("block_level")(pipe)
    before = registered(pipe)
    sample(pipe, "FluxPipeline")
    assert {name: [hook for hook in hooks if hook != "fastdiff"] for name, hooks in before.items()} == {
        name: [hook for hook in hooks if hook != "fastdiff"] for name, hooks in registered(pipe).items()
    }
    fastdiff.disable(pipe)
    after = registered(pipe)
    assert any("group_offloading" in hooks for hooks in after.values())
    assert not any("fastdiff" in hooks for hooks in after.values())
    assert sum(len(hooks) for hooks in after.values()) == sum(
        len([hook for hook in hooks if hook != "fastdiff"]) for hooks in before.values()
    )


def registered(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """Returns the names of diffusers' hooks on each module."""
    modules = pipe.transformer.named_modules()
    return {name: list(module._diffusers_hook.hooks) for name, module in modules if hasattr(module, "_diffusers_hook")}


@NAMES
def test_hooks_taken_off_from_under_ours_do_not_take_them_along(name: str) -> None:
    """accelerate takes its hook off a block by putting back the forward it found, and with it drops what came later."""
    expected = sample(accelerated(name, METHOD), name)
    pipe = build(name)
    put_on_every_block(pipe)
    fastdiff.enable(pipe, methods_for(pipe, METHOD))
    sample(pipe, name)
    for unit in view(pipe.transformer).units:
        remove_hook_from_module(unit.module)

    assert torch.equal(sample(pipe, name), expected)
    fastdiff.disable(pipe)
    for unit in view(pipe.transformer).units:
        assert getattr(unit.module.forward, "__func__", None) is type(unit.module).forward
        assert not hasattr(unit.module, "_diffusers_hook")


@pytest.mark.parametrize("then", [DiffusionPipeline.remove_all_hooks, model_offload])
def test_changing_the_way_of_offloading_keeps_the_acceleration(then: Callable[[DiffusionPipeline], None]) -> None:
    name = "PixArtAlphaPipeline"
    expected = sample(accelerated(name, METHOD), name)
    pipe = build(name)
    plain = sample(pipe, name)
    sequential_offload(pipe)
    fastdiff.enable(pipe, methods_for(pipe, METHOD))
    assert torch.equal(sample(pipe, name), expected)
    then(pipe)
    assert torch.equal(sample(pipe, name), expected)
    fastdiff.disable(pipe)
    assert torch.equal(sample(pipe, name), plain)
