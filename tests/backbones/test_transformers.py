"""Every transformer of the catalogue: its units are found, driven by plans, and left as they were."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import Action, ComputePlan, PlanError
from fastdiff.backbones import view
from tiny.models import TINY_MODELS
from tiny.sampling import accelerate, calls_of, counting, evaluate, traces, without

EVERY_MODEL = pytest.mark.parametrize("name", TINY_MODELS)

UNITS_ELSEWHERE = {
    "Flux3Transformer2DModel": ("single_transformer_blocks",),  # the other lists run side by side on separate streams
}
"""Denoisers of which not all block lists are units."""

WORK_BETWEEN_BLOCKS = {
    "AceStepTransformer1DModel": "takes the attention mask by the block's place",
    "BriaFibo2Transformer2DModel": "replaces half of the text by the block's place",
    "BriaFiboTransformer2DModel": "replaces half of the text by the block's place",
    "ChromaTransformer2DModel": "cuts the modulation by the number of blocks",
    "ConsisIDTransformer3DModel": "adds face attention by the block's place",
    "HiDreamImageTransformer2DModel": "appends a text layer by the block's place",
    "HunyuanDiT2DModel": "long skips by the block's place",
    "LatteTransformer3DModel": "pairs blocks of two lists",
    "WanAnimateTransformer3DModel": "adds face attention by the block's place",
    "WanVACETransformer3DModel": "adds control hints by the block's place",
}
"""Denoisers that are no longer the same network when a block is taken out of its list."""


def tensors(output: Any) -> list[torch.Tensor]:
    if torch.is_tensor(output):
        return [output]
    return [tensor for item in output if item is not None for tensor in tensors(item)]


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(left), tensors(right), strict=True))


def far(left: Any, right: Any) -> bool:
    pairs = zip(tensors(left), tensors(right), strict=True)
    return any(not torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in pairs)


@EVERY_MODEL
def test_units_are_the_block_lists(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    backbone = view(model)
    lists = UNITS_ELSEWHERE.get(name, tiny.block_lists)
    expected = [f"{path}.{index}" for path in lists for index in range(len(model.get_submodule(path)))]
    if name == "UViT":
        pairs = [f"{block}.{part}" for block in expected[3:] for part in ("skip", "block")]
        expected = [*expected[:3], "transformer_mid_block", *pairs]

    assert sorted(backbone.names) == sorted(expected)
    assert all(unit.module is model.get_submodule(unit.name) for unit in backbone.units)
    assert backbone.class_name == name


@EVERY_MODEL
def test_units_are_in_execution_order(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    names = view(model).names
    ran: list[str] = []
    for unit in names:
        model.get_submodule(unit).register_forward_pre_hook(lambda *_, unit=unit: ran.append(unit))
    evaluate(model, calls_of(tiny, 1))
    assert tuple(ran) == names


@EVERY_MODEL
def test_full_plan_is_the_plain_model(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    calls = calls_of(tiny, 2)
    plain = evaluate(model, calls)
    names = view(model).names

    with counting(model, names, calls[0]) as counted:
        full, record = accelerate(model, calls, ComputePlan.full(2, names), (2.0, 1.0))
    assert same(plain, full)
    assert far(plain[0], plain[1])
    assert (counted.table(names) == 1).all()
    assert record.skipped == 0
    assert not record.denoisers["denoiser"].fallbacks


@EVERY_MODEL
def test_reuse_with_the_same_input_gives_the_same_output(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    names = view(model).names
    calls = calls_of(tiny, 1) * (len(names) + 2)
    # Everything computed, everything reused, then each unit reused alone: its own streams must be read and written.
    table = np.vstack([np.zeros(len(names)), np.full(len(names), Action.REUSE), Action.REUSE * np.eye(len(names))])

    with counting(model, names, calls[0]) as counted:
        outputs, _ = accelerate(model, calls, ComputePlan(table, names), np.arange(len(calls), 0, -1.0))
    for output in outputs[1:]:
        for a, b in zip(tensors(outputs[0]), tensors(output), strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    assert np.array_equal(counted.table(names), table == Action.COMPUTE)


@EVERY_MODEL
def test_skip_and_exit_are_the_network_without_those_blocks(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    calls = calls_of(tiny, 1)
    plain = evaluate(model, calls)
    names = view(model).names
    computed = [Action.COMPUTE] * len(names)
    skip = [Action.COMPUTE, Action.SKIP, *computed[2:]]
    leave = [Action.COMPUTE] + [Action.EXIT] * (len(names) - 1)
    rows = {names[1:2]: skip} if name == "MotifVideoTransformer3DModel" else {names[1:2]: skip, names[1:]: leave}

    for gone, row in rows.items():
        plan = ComputePlan(np.array([row]), names)
        with counting(model, names, calls[0]) as counted:
            output, _ = accelerate(model, calls, plan, (1.0,))
        assert counted.table(names).tolist() == [[unit not in gone for unit in names]]
        assert far(plain, output)
        if name not in WORK_BETWEEN_BLOCKS:
            assert same(output, evaluate(without(tiny.build(), gone), calls))


@EVERY_MODEL
def test_a_run_leaves_no_trace(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    calls = calls_of(tiny, 2)
    plain = evaluate(model, calls)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    forwards = [type(unit.module).forward for unit in view(model).units]
    names = view(model).names
    reuse = ComputePlan(np.array([[Action.COMPUTE] * len(names), [Action.REUSE] * len(names)]), names)

    accelerate(model, calls, reuse, (2.0, 1.0))
    assert traces(model) == []
    assert forwards == [type(unit.module).forward for unit in view(model).units]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert same(plain, evaluate(model, calls))


@pytest.mark.skipif("MotifVideoTransformer3DModel" not in TINY_MODELS, reason="needs a newer diffusers")
def test_motif_video_cannot_exit_before_its_decoder_has_begun() -> None:
    tiny = TINY_MODELS["MotifVideoTransformer3DModel"]
    model = tiny.build()
    names = view(model).names
    for depth in range(1, len(names)):
        row = np.where(np.arange(len(names)) >= depth, Action.EXIT, Action.COMPUTE)
        with pytest.raises(PlanError, match="V3") as caught:
            accelerate(model, calls_of(tiny, 1), ComputePlan(row[None], names), (1.0,))
        assert caught.value.unit == names[depth]
    assert traces(model) == []


def test_runs_of_reused_units_end_where_the_denoiser_reshapes() -> None:
    model = TINY_MODELS["LatteTransformer3DModel"].build()
    assert len(set(view(model).segments)) == len(view(model).names)

    flux = view(TINY_MODELS["FluxTransformer2DModel"].build())
    groups = {name.split(".")[0]: segment for name, segment in zip(flux.names, flux.segments, strict=True)}
    assert groups["transformer_blocks"] != groups["single_transformer_blocks"]
    assert list(flux.segments) == list(chain([flux.segments[0]] * 3, [flux.segments[-1]] * 3))


@pytest.mark.parametrize("name", ["Bria", "Chroma", "Flux", "QwenImage"])
def test_reuse_stands_for_what_a_controlnet_added_within_the_run(name: str) -> None:
    # Some loops add to a block's output in place, which is the block's input where it was passed through.
    tiny = TINY_MODELS[f"{name}Transformer2DModel"]
    model = tiny.build()
    names = view(model).names
    call = calls_of(tiny, 1)[0]
    tokens = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    accepted = inspect.signature(model.forward).parameters
    control = {
        key: [tokens, -tokens, 2 * tokens]
        for key in ("controlnet_block_samples", "controlnet_single_block_samples")
        if key in accepted
    }
    assert control
    if name == "Bria":  # which leaves out as many image tokens as there are text tokens
        control["controlnet_single_block_samples"] = [tokens[:, 6:]] * 3
    plain = evaluate(model, [call | control])[0]
    assert far(plain, evaluate(model, [call])[0])
    rows = [[Action.COMPUTE] * len(names), [Action.REUSE] * len(names)]
    outputs, record = accelerate(model, [call | control] * 2, ComputePlan(np.array(rows), names), (2.0, 1.0))
    assert record.skipped == len(names)
    assert same(plain, outputs[0])
    assert torch.allclose(plain[0], outputs[1][0], atol=1e-4)
