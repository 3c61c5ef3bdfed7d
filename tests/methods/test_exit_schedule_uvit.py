"""Exit schedules on denoisers with long skips: which blocks go, that every skip is merged, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniDiffuserModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import Action, ComputePlan, ConfigError, ExitSchedule
from fastdiff.backbones import view
from fastdiff.cli.main import main
from fastdiff.methods import PlanRequest
from fastdiff.methods.exit_schedule import ORDERS, exit_at_depths
from fastdiff.models import UViT, UViTPipeline
from fastdiff.spec import format_method
from tiny.base import build
from tiny.models import TINY_MODELS
from tiny.plans import grid_of, request_of
from tiny.sampling import accelerate, calls_at, counting, evaluate, without
from tiny.uvit import MODEL

BLOCKS = 7
"""Three before the middle, the middle block, three after."""
LEFT_OUT = {
    "output": {7: [], 6: [2], 5: [1, 2], 4: [0, 1, 2]},
    "middle": {7: [], 6: [0], 5: [0, 1], 4: [0, 1, 2]},
}
"""Out-blocks that do not run, by order and depth."""


def schedule_of(depth: int, order: str = "output") -> ExitSchedule:
    return ExitSchedule(bin_edges=(0,), depths=(depth,), full=BLOCKS, order=order)


def predict(model: nn.Module, schedule: ExitSchedule | ComputePlan) -> torch.Tensor:
    return accelerate(model, calls_at(MODEL, (500,)), schedule, (500,))[0][0][0]


def by_hand(model: UViT, gone: list[int], merged: bool = True) -> torch.Tensor:
    """The prediction with some out-blocks left out: reduced to their skip linear, or with that left out too."""
    inputs = calls_at(MODEL, (500,))[0]
    with torch.no_grad():
        tokens = model._embed(inputs["hidden_states"], inputs["timestep"], inputs["class_labels"], None)
        skips = []
        for block in model.transformer_in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = model.transformer_mid_block(tokens)
        for index, pair in enumerate(model.transformer_out_blocks):
            skip = skips.pop()
            if index not in gone or merged:
                tokens = pair["skip"].skip_linear(torch.cat([tokens, skip], dim=-1))
            if index not in gone:
                tokens = pair["block"](tokens)
        return model.conv_out(model._unpatchify(model.proj_out(model.norm_out(tokens))[:, 2:]))


@pytest.mark.parametrize("order", LEFT_OUT)
@pytest.mark.parametrize("depth", range(4, 8))
def test_left_out_block_is_its_skip_linear_alone(order: str, depth: int) -> None:
    model = MODEL.build()
    gone = LEFT_OUT[order][depth]
    predicted = predict(model, schedule_of(depth, order))
    assert torch.equal(predicted, by_hand(model, gone))
    identity = by_hand(model, gone, merged=False)
    assert torch.allclose(predicted, identity, rtol=0, atol=1e-3) == (not gone)


def test_leaving_the_skip_out_too_is_another_plan() -> None:
    model = MODEL.build()
    names = view(model).names
    row = np.array([Action.SKIP if name.startswith("transformer_out_blocks.2") else Action.COMPUTE for name in names])
    assert torch.equal(predict(model, ComputePlan(row[None], names)), by_hand(model, [2], merged=False))
    row[names.index("transformer_out_blocks.2.skip")] = Action.COMPUTE
    assert torch.equal(predict(model, ComputePlan(row[None], names)), predict(model, schedule_of(6)))


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_run_as_the_table_says(order: str) -> None:
    model = MODEL.build()
    names = view(model).names
    table = (7, 7, 6, 6, 6, 5, 5, 5, 4, 4)
    timesteps = (999, 900, 899, 200, 199, 100, 99, 0)  # both sides of each edge
    schedule = ExitSchedule(bin_edges=tuple(range(0, 1000, 100)), depths=table, order=order)
    calls = calls_at(MODEL, timesteps)
    with counting(model, names, calls[0]) as counted:
        _, record = accelerate(model, calls, schedule, timesteps)
    for row, timestep in zip(counted.table(names), timesteps, strict=True):
        depth = table[timestep // 100]
        ran = {name for name, count in zip(names, row, strict=True) if count}
        assert sum(not name.endswith(".skip") for name in ran) == depth
        if order == "exit":
            assert tuple(name for name in names if name in ran) == names[: len(ran)]
            assert sum(name.endswith(".skip") for name in ran) == depth - 4
        else:
            assert {f"transformer_out_blocks.{index}.skip" for index in range(3)} < ran
            assert set(names) - ran == {f"transformer_out_blocks.{index}.block" for index in LEFT_OUT[order][depth]}
    assert record.skipped == counted.table(names).size - counted.table(names).sum()


@pytest.mark.parametrize("name", ["UViT", "DiTTransformer2DModel"])
def test_row_may_exit_before_any_unit(name: str) -> None:
    tiny = TINY_MODELS[name]
    names = view(tiny.build()).names
    calls = calls_at(tiny, (500,))
    for depth in range(1, len(names)):
        row = np.where(np.arange(len(names)) >= depth, Action.EXIT, Action.COMPUTE)
        left = accelerate(tiny.build(), calls, ComputePlan(row[None], names), (500,))[0][0][0]
        assert torch.equal(left, evaluate(without(tiny.build(), names[depth:]), calls)[0][0])


def test_exits_in_the_first_half_run_nothing_behind_them() -> None:
    model = MODEL.build()
    names = view(model).names
    for depth in range(1, BLOCKS):
        last = 2 * depth - 4 if depth > 4 else depth
        gone = without(MODEL.build(), names[last:])
        assert torch.equal(predict(model, schedule_of(depth, "exit")), evaluate(gone, calls_at(MODEL, (500,)))[0][0])


def test_diffusers_own_u_vit_keeps_its_skips_too() -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 6}
    inputs = {"text_dim": 16, "clip_img_dim": 12, "num_text_tokens": 6, "sample_size": 8, "patch_size": 2}
    backbone = view(build(UniDiffuserModel, config | inputs))
    plan = schedule_of(5).plan(PlanRequest(backbone, grid_of((500,)), lambda: pytest.fail("asked for costs")))
    left_out = [name for name, action in zip(plan.units, plan.table[0], strict=True) if action != Action.COMPUTE]
    assert left_out == [f"transformer.transformer_out_blocks.{index}.block" for index in (1, 2)]


def test_order_makes_no_difference_without_long_skips() -> None:
    request = request_of(6, grid_of((900, 100)))
    schedules = [ExitSchedule(bin_edges=(0, 500), depths=(6, 2), order=order) for order in ("output", "exit")]
    assert np.array_equal(schedules[0].plan(request).table, schedules[1].plan(request).table)


def test_order_middle_needs_long_skips() -> None:
    with pytest.raises(ConfigError, match="'middle' is for denoisers with long skips"):
        ExitSchedule("ase-demo", order="middle").plan(request_of(6, grid_of((900, 100))))


def test_depths_that_lie_in_the_first_half() -> None:
    model = MODEL.build()
    with pytest.raises(ConfigError, match=r"as few as 3 blocks.*first 4 always run.*order='output'.*order='exit'"):
        predict(model, ExitSchedule(bin_edges=(0,), depths=(3,)))
    assert torch.equal(predict(model, schedule_of(1)), predict(model, schedule_of(4)))
    assert not torch.equal(predict(model, schedule_of(3, "exit")), predict(model, schedule_of(4)))


def test_schedule_with_an_order_is_saved_and_named() -> None:
    schedule = ExitSchedule("ase-demo", order="exit")
    again = ExitSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert again.order == "exit"
    assert "order='exit'" in str(schedule)
    assert {ExitSchedule.step(7, 300, 4, order="middle").order, ExitSchedule.linear(7, 4, order="middle").order} == {
        "middle"
    }


# -- what a schedule saves ---------------------------------------------------------------------------------------------

SAVING = ExitSchedule(bin_edges=tuple(range(0, 1000, 100)), depths=(7, 7, 6, 6, 6, 5, 5, 4, 4, 4))


@pytest.mark.parametrize("karras", [False, True])
def test_plan_show_prints_the_mean_depth_at_the_samplers_timesteps(
    karras: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=karras)
    UViTPipeline(MODEL.build(), scheduler).save_pretrained(tmp_path / "model")
    scheduler.set_timesteps(23)
    mean = SAVING.depth_at(scheduler.timesteps.numpy(), BLOCKS).mean()
    of_model = [str(tmp_path / "model"), "--method", format_method(SAVING), "--steps", "23"]
    saved = str(tmp_path / "plan.json")
    for words in (["show", *of_model], ["save", *of_model, "--out", saved], ["show", saved]):
        assert main(["plan", *words]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert words[0] == "save" or f"{mean:.2f} of 7 blocks run on average" in shown


def test_work_shrinks_as_the_depth_does() -> None:
    model = MODEL.build()
    timesteps = tuple(range(950, 0, -100))
    calls = calls_at(MODEL, timesteps)

    def flops_of(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    full = flops_of(lambda: evaluate(model, calls))
    tokens = torch.zeros(2, model.pos_embed.shape[1], model.pos_embed.shape[2])
    block = flops_of(lambda: model.transformer_mid_block(tokens))
    outside_blocks = full - block * BLOCKS * len(timesteps)
    executed = flops_of(lambda: accelerate(model, calls, SAVING, timesteps))
    depth = np.mean(SAVING.depth_at(np.array(timesteps), BLOCKS))
    assert 0 < outside_blocks < full / 4
    assert (executed - outside_blocks) / (full - outside_blocks) == pytest.approx(depth / BLOCKS, rel=1e-9)


# -- the forward that is trained with ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_training_forward_leaves_out_the_same_blocks(order: str) -> None:
    model = MODEL.build()
    depths = [4, 7, 5, 6]
    inputs = MODEL.inputs(4, 0)
    with torch.no_grad(), exit_at_depths(model, torch.tensor(depths), order):
        trained = model(**inputs).sample
    for index, depth in enumerate(depths):
        sample = {name: value[index : index + 1] for name, value in inputs.items()}
        sampled = accelerate(model, [sample], schedule_of(depth, order), (500,))[0][0][0]
        assert torch.allclose(trained[index], sampled[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("depths", "order", "message"),
    [
        ([4, 3], "output", "first 4 blocks always run.*order='output'.*3"),
        ([3, 4], "middle", "first 4 blocks always run"),
        ([4, 4], "input", "'output' or 'middle' or 'exit'.*'input'"),
        ([4, 0], "exit", "at least 1"),
    ],
)
def test_training_depths_that_cannot_be_are_refused(depths: list[int], order: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message), exit_at_depths(MODEL.build(), torch.tensor(depths), order):
        pass
