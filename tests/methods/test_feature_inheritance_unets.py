"""Feature inheritance on UNets: what runs between keys, and that it is the model with one value kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine.loops import kept_between, sample_loop, small_unet
from torch import nn

from fastdiff import ComputePlan, ConfigError, FeatureInheritance
from fastdiff.backbones import view
from fastdiff.engine.program import lower
from fastdiff.methods import PlanRequest
from tiny.models import TINY_MODELS
from tiny.plans import C, D, R, request_of
from tiny.sampling import accelerate, calls_at, counting
from tiny.unets import TINY_UNETS

SD = "UNet2DConditionModel (SD)"
"""Four stages of two layers, all but the deepest with attentions."""


def layer(stage: str, index: int, attention: bool = True) -> list[str]:
    return [f"{stage}.resnets.{index}", *([f"{stage}.attentions.{index}"] if attention else [])]


HEAD = ["conv_norm_out", "conv_out"]
LAST_UP = [name for index in range(3) for name in layer("up_blocks.3", index)]
FIRST_DOWN = [*layer("down_blocks.0", 0), *layer("down_blocks.0", 1)]
SECOND_UP = [*(name for index in range(3) for name in layer("up_blocks.2", index)), "up_blocks.2.upsamplers.0"]
SECOND_DOWN = ["down_blocks.0.downsamplers.0", *layer("down_blocks.1", 0), *layer("down_blocks.1", 1)]


def unet_request(name: str = SD, evaluations: int = 6, level: str = "layer") -> PlanRequest:
    return PlanRequest(view(TINY_UNETS[name].build(), level), request_of(1, evaluations).grid, lambda: None)


@pytest.mark.parametrize(
    ("method", "boundary", "live"),
    [
        (
            FeatureInheritance(level="stage", keep_up=1),
            "up_blocks.2.upsamplers.0",
            ["conv_in", *FIRST_DOWN, *LAST_UP, *HEAD],
        ),
        (
            FeatureInheritance(level="stage"),  # two stages
            "up_blocks.1.upsamplers.0",
            ["conv_in", *FIRST_DOWN, *SECOND_DOWN, *SECOND_UP, *LAST_UP, *HEAD],
        ),
        (FeatureInheritance(level="stage", keep_up=0), "up_blocks.3.attentions.2", HEAD),
        (FeatureInheritance(), "up_blocks.3.attentions.1", ["conv_in", *layer("up_blocks.3", 2), *HEAD]),
        (FeatureInheritance.deepcache(2, 0), "up_blocks.3.attentions.1", ["conv_in", *LAST_UP[4:], *HEAD]),
        (
            FeatureInheritance.deepcache(2, 1),
            "up_blocks.3.attentions.0",
            ["conv_in", *FIRST_DOWN[:2], *LAST_UP[2:], *HEAD],
        ),
        (
            FeatureInheritance.deepcache(2, 2),
            "up_blocks.2.upsamplers.0",
            ["conv_in", *FIRST_DOWN, *LAST_UP, *HEAD],
        ),
        (
            FeatureInheritance.deepcache(2, 3),
            "up_blocks.2.attentions.1",
            ["conv_in", *FIRST_DOWN, *SECOND_DOWN[:1], *SECOND_UP[4:], *LAST_UP, *HEAD],
        ),
    ],
    ids=str,
)
def test_live_units_between_keys(method: FeatureInheritance, boundary: str, live: list[str]) -> None:
    """What is kept of the decoder, what of the encoder it reads, and no more; one value is read instead of the rest."""
    tiny = TINY_UNETS[SD]
    model = tiny.build()
    backbone = view(model)
    plan = lower(method.plan(unet_request()), backbone).plan
    assert set(map(tuple, plan.table[[0, 2, 4]].tolist())) == {(C,) * len(backbone.units)}
    assert [unit for unit, action in zip(plan.units, plan.table[1], strict=True) if action == C] == live
    assert [unit for unit, action in zip(plan.units, plan.table[1], strict=True) if action == R] == [boundary]
    assert (plan.table[1] == D).sum() == len(backbone.units) - len(live) - 1

    (call, other), times = calls_at(tiny, (900, 500)), (900, 500)
    with counting(model, backbone.names, call) as counted:
        accelerate(model, [call, other] * 3, method, times * 3)
    ran = counted.table(backbone.names)
    assert ran[1].tolist() == [int(unit in live) for unit in backbone.names]
    assert (ran[[0, 2, 4]] == 1).all()


@pytest.mark.parametrize(
    ("method", "boundary"),
    [
        (FeatureInheritance(level="stage", keep_up=1, last_key=False), "up_blocks.1"),
        (FeatureInheritance(interval=3, last_key=False), "up_blocks.2.attentions.0"),
        (FeatureInheritance.deepcache(5, 2), "up_blocks.1.attentions.0"),
    ],
    ids=str,
)
def test_inheritance_is_the_boundary_kept_between_keys(method: FeatureInheritance, boundary: str) -> None:
    """Bitwise the model in which one module returns what it returned at the last key, and everything else runs."""
    model = small_unet()
    sampled = sample_loop(model, method, batch=2, size=(10, 14))
    keys = np.flatnonzero(method.key_evaluations(12)).tolist()
    with kept_between(model, [model.get_submodule(boundary)], keys):
        expected = sample_loop(model, batch=2, size=(10, 14))
    assert torch.equal(sampled.latents, expected.latents)
    assert all(map(torch.equal, sampled.predictions, expected.predictions))
    assert not torch.equal(sampled.latents, sample_loop(model, batch=2, size=(10, 14)).latents)


def test_forecast_features_are_a_line_through_the_last_keys() -> None:
    """With two keys before, the boundary's value at the third distance is ``2 b - a``, ``3 b - 2 a`` and so on."""
    model = small_unet()
    seen: list[torch.Tensor] = []
    follower = model.up_blocks[2].resnets[1].norm1
    handle = follower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, :8].clone()))
    sample_loop(model, FeatureInheritance(interval=3, order=1, last_key=False), steps=9)
    handle.remove()
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[0])
    for row, later in ((4, 1), (5, 2)):
        line = seen[3] + later * (seen[3] - seen[0]) / 3
        assert torch.allclose(seen[row], line, atol=1e-5)
    for row, later in ((7, 1), (8, 2)):
        line = seen[6] + later * (seen[6] - seen[3]) / 3
        assert torch.allclose(seen[row], line, atol=1e-5)


def test_branch_level_reuses_residual_branches_only() -> None:
    request = unet_request(level="branch")
    traits = {trait.name: trait for trait in request.backbone.traits}
    plan = FeatureInheritance(level="branch", keep_up=1).plan(request)
    reused = {unit for unit, action in zip(plan.units, plan.table[1], strict=True) if action == R}
    assert set(np.unique(plan.table[1])) == {C, R}
    assert {traits[unit].reuse for unit in reused} == {"residual", "branch"}
    assert not any(unit.startswith("up_blocks.3") or unit in ("conv_in", *HEAD) for unit in reused)
    assert not any("samplers" in unit for unit in reused)
    kept = {unit for unit in plan.units if unit.startswith("down_blocks.0") and "samplers" not in unit}
    assert not kept & reused, "the last up stage reads them"
    everything_else = {
        unit
        for unit in plan.units
        if traits[unit].reuse != "output" and not unit.startswith(("up_blocks.3", "down_blocks.0"))
    }
    assert reused == everything_else
    assert {name.rsplit(".", 1)[-1] for name in reused if "attentions" in name} == {"attn1", "attn2", "ff"}
    pruned = lower(plan, request.backbone).plan
    assert (pruned.table == plan.table).all(), "everything else still reads the fresh hidden state"


def test_reused_branches_are_added_to_the_fresh_hidden_state() -> None:
    """Transformer branches return what they returned at the key, resnets add their convolutions' share to the input."""
    model = small_unet()
    method = FeatureInheritance(interval=3, level="branch", keep_up=1, last_key=False)
    units = view(model, "branch").units
    plan = method.plan(PlanRequest(view(model, "branch"), request_of(1, 12).grid, lambda: None))
    reused = [unit for unit, action in zip(units, plan.table[1], strict=True) if action == R]
    branches = [unit.module for unit in reused if unit.traits.reuse == "branch"]
    resnets = [unit.module for unit in reused if unit.traits.reuse == "residual"]
    assert branches
    assert resnets
    sampled = sample_loop(model, method, batch=2)
    shares = [KeptShare(resnet) for resnet in resnets]
    handle = model.register_forward_pre_hook(lambda *_: [share.next_call() for share in shares] and None)
    with kept_between(model, branches, range(0, 12, 3)):
        for share in shares:
            share.attach()
        expected = sample_loop(model, batch=2)
    for share in shares:
        share.detach()
    handle.remove()
    assert torch.allclose(sampled.latents, expected.latents, rtol=0, atol=1e-3)
    assert not torch.allclose(sampled.latents, sample_loop(model, batch=2).latents, rtol=0, atol=1e-2)


class KeptShare:
    """A resnet that adds to its shortcut what it added in the last call whose number is a multiple of three."""

    def __init__(self, resnet: nn.Module) -> None:
        self.resnet, self.calls = resnet, -1

    def next_call(self) -> None:
        self.calls += 1

    def attach(self) -> None:
        forward = self.resnet.forward

        def with_kept_share(hidden: torch.Tensor, embedding: torch.Tensor, *_: Any) -> torch.Tensor:
            shortcut = hidden if self.resnet.conv_shortcut is None else self.resnet.conv_shortcut(hidden)
            if self.calls % 3 == 0:
                self.share = forward(hidden, embedding) - shortcut
            return shortcut + self.share

        self.resnet.forward = with_kept_share

    def detach(self) -> None:
        del vars(self.resnet)["forward"]


def test_residuals_of_branches_are_not_outputs_when_the_input_changed() -> None:
    """Reusing a resnet's output makes later hidden states those of the key; reusing its residual does not."""
    tiny = TINY_UNETS[SD]
    model = tiny.build()
    names = view(model, "branch").names
    table = np.zeros((2, len(names)))
    table[1, names.index("mid_block.resnets.1")] = R
    key, later = tiny.inputs(2, 0), tiny.inputs(2, 0) | {"sample": tiny.inputs(2, 1)["sample"]}
    look_finely = FeatureInheritance(interval=1, level="branch", keep_up=1)

    def second(call: dict[str, Any], **meta: Any) -> torch.Tensor:
        plan = ComputePlan(table, names, meta)
        return accelerate(model, [key, call], [look_finely, plan], (900, 500))[0][1][0]

    replaced = {"replaced": ["mid_block.resnets.1"]}
    assert torch.allclose(second(key), second(key, **replaced), atol=1e-5)
    assert not torch.allclose(second(later), second(later, **replaced), atol=1e-3)


def test_executed_branch_plan_can_be_used_again() -> None:
    model = small_unet()
    sampled = sample_loop(model, FeatureInheritance(level="branch", keep_up=1))
    assert torch.equal(sample_loop(model, sampled.record.plan).latents, sampled.latents)


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        (FeatureInheritance(span=(1, -1)), SD, r"span is for transformers.*UNet2DConditionModel.*keep_up"),
        (FeatureInheritance(level="stage"), "DiT", r"level is for UNets.*span"),
        (FeatureInheritance(keep_up=1), "DiT", r"keep_up is for UNets.*span"),
        (FeatureInheritance.deepcache(), "DiT", r"level is for UNets"),
        (FeatureInheritance(level="stage", keep_up=4), SD, r"keep_up=4 leaves nothing to inherit.*4 up stages"),
        (FeatureInheritance(keep_up=12), SD, r"keep_up=12 leaves nothing.*12 up layers"),
        (FeatureInheritance.deepcache(3, 11), SD, r"keep_up=12"),
        (FeatureInheritance(level="branch", keep_up=9), SD, r"keep_up=9.*4 up stages"),
    ],
    ids=str,
)
def test_settings_for_the_other_family_are_refused(method: FeatureInheritance, name: str, message: str) -> None:
    request = request_of(4, 6)
    if name == "DiT":
        dit = view(TINY_MODELS["DiTTransformer2DModel"].build())
        request = PlanRequest(dit, request.grid, request.costs)
    else:
        request = unet_request(name, level=method.view_level)
    with pytest.raises(ConfigError, match=message):
        method.plan(request)


@pytest.mark.parametrize("branch", [-1, 1.0, True, None, "0"])
def test_deepcache_refuses_what_is_no_skip(branch: Any) -> None:
    with pytest.raises(ConfigError, match="number of a skip connection from 0"):
        FeatureInheritance.deepcache(5, branch)


def test_deepcache_is_a_setting_of_feature_inheritance() -> None:
    method = FeatureInheritance.deepcache(3, 1, order=1)
    assert method == FeatureInheritance(interval=3, level="layer", keep_up=2, order=1, last_key=False)
    assert FeatureInheritance.deepcache(3, last_key=True).last_key
