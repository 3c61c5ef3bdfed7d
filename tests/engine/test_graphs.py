"""CUDA graphs: which calls are recorded and replayed, and that a replay is the call. Without a GPU, on a tape."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import peft
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention import FeedForward
from engine.cases import (
    CASES,
    STACKING,
    accelerated,
    build,
    component_of,
    denoiser_of,
    methods_for,
    record_of,
    sample,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import fastdiff
from fastdiff import FeatureInheritance, SkipTuning, UncertaintyExit, sampling_run
from fastdiff.backbones import view
from fastdiff.engine import graphs
from fastdiff.engine.graphs import FIRST, Graphs
from fastdiff.engine.program import lower
from tiny.tape import TapeRecorder
from tiny.uncertainty import random_modules

WHOLE = [case for case in CASES if case[1] not in STACKING]
"""Cases in which every call can be recorded."""


@pytest.fixture(autouse=True)
def _on_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings are tapes, on the CPU."""
    monkeypatch.setattr(graphs, "DeviceRecorder", TapeRecorder)
    monkeypatch.setattr(Graphs.__init__, "__defaults__", (("cpu",),))


def recorded(name: str, method: str) -> Any:
    """Returns a new tiny pipeline that replays its evaluations."""
    pipe = build(name)
    return fastdiff.enable(pipe, methods_for(pipe, method), cuda_graphs=True)


@pytest.mark.parametrize(("name", "method"), WHOLE)
def test_replays_are_the_calls(name: str, method: str) -> None:
    expected = sample(accelerated(name, method), name)
    pipe = recorded(name, method)
    for _ in range(3):
        assert torch.equal(sample(pipe, name), expected)
    record = record_of(pipe)
    assert record.replays + sum(record.computed.values()) == len(record.calls)
    assert set(record.computed) <= {FIRST, "the shapes of what later calls leave out are noted"}
    assert record.replays >= len(record.calls) - 2


def test_every_distinct_row_is_one_recording() -> None:
    pipe = recorded("DiTPipeline", "inherit-2")
    sample(pipe, "DiTPipeline", steps=30)
    record = record_of(pipe)
    program = lower(record.plans[0], view(pipe.transformer))
    rows = [(program.pattern(row), tuple(one.weights for one in program.readings[row])) for row in range(30)]
    repeated = {row for row in rows if rows.count(row) > 1}
    assert record.graphs == len(repeated)
    assert record.computed[FIRST] == len(set(rows))
    assert record.replays == 30 - len(set(rows))
    assert "replayed from CUDA graphs" in pipe.fastdiff.summary()


def test_no_python_of_the_model_runs_in_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = recorded("DiTPipeline", "exit-step")
    for _ in range(2):
        expected = sample(pipe, "DiTPipeline")

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("a layer was called")

    monkeypatch.setattr(FeedForward, "forward", called)
    assert torch.equal(sample(pipe, "DiTPipeline"), expected)
    fastdiff.disable(pipe)
    with pytest.raises(AssertionError, match="a layer was called"):
        sample(pipe, "DiTPipeline")


def test_the_full_model_replays_without_a_method() -> None:
    expected = sample(build("FluxPipeline"), "FluxPipeline")
    pipe = fastdiff.enable(build("FluxPipeline"), (), cuda_graphs=True)
    assert torch.equal(sample(pipe, "FluxPipeline"), expected)
    assert record_of(pipe).replays > 0


def test_other_shapes_are_other_recordings() -> None:
    pipe = recorded("DiTPipeline", "inherit-0")
    plain = accelerated("DiTPipeline", "inherit-0")
    for images in (1, 2, 1, 3, 2):
        assert torch.equal(sample(pipe, "DiTPipeline", batch=images), sample(plain, "DiTPipeline", batch=images))
    assert record_of(pipe).replays == len(record_of(pipe).calls)


# -- what a recording was made of, and is no more ----------------------------------------------------------------------


def write_weights(model: nn.Module) -> None:
    with torch.no_grad():
        model.transformer_blocks[0].attn1.to_q.weight.mul_(2)


def move_weights(model: nn.Module) -> None:
    model.double().float()
    with torch.no_grad():
        model.transformer_blocks[0].attn1.to_q.weight.mul_(2)


def set_attribute(model: nn.Module) -> None:
    model.transformer_blocks[1].norm3.eps = 0.5


def leave_out_a_layer(model: nn.Module) -> None:
    model.transformer_blocks[0].ff.net[0] = nn.Sequential(model.transformer_blocks[0].ff.net[0], nn.ReLU())


@pytest.mark.parametrize("change", [write_weights, move_weights, set_attribute, leave_out_a_layer])
def test_a_changed_model_is_not_replayed_as_it_was(change: Callable[[nn.Module], None]) -> None:
    pipe, plain = recorded("DiTPipeline", "inherit-0"), accelerated("DiTPipeline", "inherit-0")
    for each in (pipe, plain):
        for _ in range(2):
            before = sample(each, "DiTPipeline")
        change(each.transformer)
    expected = sample(plain, "DiTPipeline")
    assert not torch.equal(expected, before)
    assert torch.equal(sample(pipe, "DiTPipeline"), expected)
    assert (record_of(pipe).replays == len(record_of(pipe).calls)) == (change is write_weights)
    assert torch.equal(sample(pipe, "DiTPipeline"), expected)


ADAPTER_CHANGES: dict[str, Callable[[BaseTunerLayer], Any]] = {
    "scaled": lambda layer: layer.set_scale("default", 3.0),
    "off": lambda layer: layer.enable_adapters(False),
    "on": lambda layer: layer.enable_adapters(True),
    "merged": lambda layer: layer.merge(),  # type: ignore[operator]
}


def test_what_is_done_to_adapters_is_seen() -> None:
    pipe, plain = recorded("DiTPipeline", "inherit-0"), accelerated("DiTPipeline", "inherit-0")
    seen = [sample(pipe, "DiTPipeline")]
    for each in (pipe, plain):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, each.transformer)
    for change in (None, *ADAPTER_CHANGES.values()):
        for each in (pipe, plain):
            layers = [module for module in each.transformer.modules() if isinstance(module, BaseTunerLayer)]
            for layer in layers if change is not None else ():
                change(layer)
        expected = sample(plain, "DiTPipeline")
        for _ in range(2):
            assert torch.equal(sample(pipe, "DiTPipeline"), expected)
        assert record_of(pipe).replays == len(record_of(pipe).calls)
        seen.append(expected)
    assert all(not torch.equal(one, two) for one, two in pairwise(seen))


def test_recordings_end_with_the_acceleration() -> None:
    pipe = recorded("DiTPipeline", "inherit-0")
    expected = sample(pipe, "DiTPipeline")
    fastdiff.enable(pipe, pipe.fastdiff.methods)
    assert torch.equal(sample(pipe, "DiTPipeline"), expected)
    assert not record_of(pipe).replays
    fastdiff.disable(pipe)
    assert "forward" not in vars(pipe.transformer)


def test_an_optimised_model_is_recorded_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forecasts take their coefficients from memory that outlives the call."""
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    pipe, plain = recorded("DiTPipeline", "inherit-2"), accelerated("DiTPipeline", "inherit-2")
    for each in (pipe, plain):
        sample(each, "DiTPipeline")
        fastdiff.optimize(each)
    forward = pipe.transformer.forward
    expected = sample(plain, "DiTPipeline")
    for _ in range(2):
        assert torch.equal(sample(pipe, "DiTPipeline"), expected)
    assert record_of(pipe).replays == len(record_of(pipe).calls)
    assert pipe.transformer.forward is forward
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    sample(pipe, "DiTPipeline")
    assert record_of(pipe).computed[FIRST]


# -- calls that are computed -------------------------------------------------------------------------------------------


def check_computed(pipe: Any, name: str, reason: str, expected: torch.Tensor) -> None:
    for _ in range(2):
        assert torch.equal(sample(pipe, name), expected)
    record = record_of(pipe)
    assert any(reason in why for why in record.computed), record.computed
    assert not record.replays


def test_samples_that_stop_on_their_own_are_computed() -> None:
    pipe = build("DiTPipeline")
    method = UncertaintyExit.of(random_modules(pipe.transformer), threshold=0.5)
    expected = sample(fastdiff.enable(pipe, method), "DiTPipeline")
    check_computed(fastdiff.enable(pipe, method, cuda_graphs=True), "DiTPipeline", "samples stop", expected)


def test_evaluations_that_are_one_batch_are_computed() -> None:
    name = "StableDiffusionPipeline"
    expected = sample(accelerated(name, "propagate"), name)
    pipe = recorded(name, "propagate")
    for _ in range(3):
        assert torch.equal(sample(pipe, name), expected)
    assert record_of(pipe).batches
    assert any("at once" in why for why in record_of(pipe).computed)
    assert record_of(pipe).replays


def test_scales_of_skips_belong_to_the_recording() -> None:
    """Skips are scaled in some evaluations only, all of which compute everything."""
    name, method = "StableDiffusionPipeline", SkipTuning(rho=0.6, time="sigma-window", window=(0.5, 3.0))
    expected = sample(fastdiff.enable(build(name), method), name)
    pipe = fastdiff.enable(build(name), method, cuda_graphs=True)
    for _ in range(3):
        assert torch.equal(sample(pipe, name), expected)
    assert 0 < len(record_of(pipe).skip_scales) < len(record_of(pipe).calls) == record_of(pipe).replays


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "training mode"),
        (lambda model: model.compile(backend="eager"), "compiled as a whole"),
        (lambda model: model.proj_out_2.register_forward_hook(lambda *_: None), "a hook on proj_out_2"),
    ],
    ids=["training", "compiled", "hooked"],
)
def test_models_that_cannot_be_recorded_are_computed(change: Callable[[Any], Any], reason: str) -> None:
    pipe, plain = recorded("DiTPipeline", "inherit-0"), accelerated("DiTPipeline", "inherit-0")
    for each in (pipe, plain):
        change(each.transformer)
    check_computed(pipe, "DiTPipeline", reason, sample(plain, "DiTPipeline"))


def test_other_devices_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graphs.__init__, "__defaults__", (("cuda",),))
    expected = sample(accelerated("DiTPipeline", "inherit-0"), "DiTPipeline")
    check_computed(recorded("DiTPipeline", "inherit-0"), "DiTPipeline", "the weights are on cpu", expected)


def test_what_waits_for_the_device_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    pipe, plain = recorded("DiTPipeline", "inherit-0"), accelerated("DiTPipeline", "inherit-0")
    for each in (pipe, plain):
        own = each.transformer.pos_embed.forward
        each.transformer.pos_embed.forward = lambda x, own=own: own(x) * (len(x.nonzero()) >= 0)
    with caplog.at_level(logging.WARNING):
        check_computed(pipe, "DiTPipeline", "cannot be recorded", sample(plain, "DiTPipeline"))
    assert "waits for the device" in caplog.text
    assert "pool" not in caplog.text


def test_unknown_arguments_are_computed() -> None:
    class Odd:
        pass

    model = build("DiTPipeline").transformer
    scheduler = DDIMScheduler()
    noise = torch.randn(1, *(model.config[name] for name in ("in_channels", "sample_size", "sample_size")))
    with torch.no_grad(), sampling_run(model, (), scheduler=scheduler, cuda_graphs=True) as run:
        scheduler.set_timesteps(4)
        for timestep in scheduler.timesteps:
            model(noise, timestep[None], torch.tensor([0]), cross_attention_kwargs={"odd": Odd()})
            scheduler.step(noise, int(timestep), noise)
    assert run.record.denoisers["denoiser"].computed == {"an argument is a Odd": 4}


def test_the_number_of_recordings_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    expected = sample(accelerated("DiTPipeline", "inherit-2"), "DiTPipeline")
    pipe = recorded("DiTPipeline", "inherit-2")
    for _ in range(2):
        assert torch.equal(sample(pipe, "DiTPipeline"), expected)
    assert record_of(pipe).computed["1 other calls are recorded"]


def test_gradients_compute() -> None:
    model = build("DiTPipeline").transformer
    scheduler = DDIMScheduler()
    noise = torch.randn(1, *(model.config[name] for name in ("in_channels", "sample_size", "sample_size")))
    with sampling_run(model, FeatureInheritance(), scheduler=scheduler, cuda_graphs=True) as run:
        scheduler.set_timesteps(3)
        for timestep in scheduler.timesteps:
            model(noise, timestep[None], torch.tensor([0]))
            scheduler.step(noise, int(timestep), noise)
    assert run.record.denoisers["denoiser"].computed == {"gradients may be needed": 3}


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "method"), WHOLE)
def test_replays_on_a_gpu(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pipe = build(name).to("cuda")
    fastdiff.enable(pipe, methods_for(pipe, method))
    expected = sample(pipe, name)
    fastdiff.enable(pipe, pipe.fastdiff.methods, cuda_graphs=True)
    for _ in range(3):
        assert torch.equal(sample(pipe, name), expected)
    assert record_of(pipe, component_of(pipe)).replays
    assert "forward" not in vars(denoiser_of(pipe))
