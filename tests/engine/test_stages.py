"""Stages of which no unit runs are not entered, and answer what they would have put together."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from engine.loops import small_unet

from fastdiff import EncoderPropagation, FeatureInheritance
from fastdiff.backbones import view
from fastdiff.engine.hooks import StageHook
from tiny.sampling import accelerate, calls_at
from tiny.unets import TINY_UNETS

METHODS = {
    "encoder": EncoderPropagation(keys=(0, 2), parallel=False, prior_noise=0.0),
    "deep": FeatureInheritance(interval=2, min_evaluations=0, last_key=False),
}
TIMES = (900.0, 700.0, 500.0, 300.0)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the forwards of the stages themselves, which hooks replace on the instance."""
    counts: Counter[str] = Counter()
    for stage in {type(stage.module) for tiny in TINY_UNETS.values() for stage in view(tiny.build()).stages}:

        @functools.wraps(stage.forward)
        def counted(self: Any, *args: Any, _forward: Any = stage.forward, **kwargs: Any) -> Any:
            counts[self.fastdiff_name] += 1
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(stage, "forward", counted)
    return counts


def never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageHook, "new_forward", lambda hook, module, *a, **k: hook.fn_ref.original_forward(*a, **k))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name, tiny in TINY_UNETS.items() if view(tiny.build()).stages])
def test_same_predictions_as_with_every_stage_entered(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY_UNETS[name]
    model = tiny.build()
    calls = calls_at(tiny, TIMES)
    predictions, _ = accelerate(model, calls, METHODS[method], TIMES)
    never_idle(monkeypatch)
    expected, _ = accelerate(model, calls, METHODS[method], TIMES)
    for one, other in zip(predictions, expected, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("method", "forwards"),
    [
        ("encoder", {"down_blocks.0": 2, "down_blocks.2": 2, "mid_block": 2, "up_blocks.0": 4, "up_blocks.2": 4}),
        ("deep", {"down_blocks.0": 2, "down_blocks.2": 2, "mid_block": 2, "up_blocks.0": 2, "up_blocks.2": 4}),
    ],
)
def test_idle_stages_are_not_entered(method: str, forwards: dict[str, int], entered: Counter[str]) -> None:
    tiny = TINY_UNETS["UNet2DConditionModel (SD)"]
    model = small_unet()
    for name, module in model.named_modules():
        module.fastdiff_name = name
    calls = [{"sample": torch.randn(1, 4, 8, 8), "timestep": t} for t in TIMES]
    text = tiny.inputs(1, 0)["encoder_hidden_states"]
    accelerate(model, [call | {"encoder_hidden_states": text} for call in calls], METHODS[method], TIMES)
    assert {name: entered[name] for name in forwards} == forwards
