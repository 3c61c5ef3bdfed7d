"""Long skips are scaled where the decoder reads them: each by its own factor, out of place, and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff
from fastdiff import EncoderPropagation, FastDiffNoEffectWarning, FeatureInheritance, SkipTuning
from fastdiff.backbones import view
from fastdiff.engine import sampling_run
from fastdiff.engine.hooks import InstalledHooks
from fastdiff.engine.skips import SkipScales, scaled
from fastdiff.methods import PlanRequest
from tiny.base import TinyModel
from tiny.models import TINY_MODELS
from tiny.per_sample import one_sample_at_a_time
from tiny.plans import grid_of
from tiny.sampling import accelerate, calls_of, evaluate, traces
from tiny.unet_pipelines import UNET_PIPELINES
from tiny.unets import TINY_UNETS

TIMESTEPS = [900.0, 500.0, 100.0]
NO_SITES = ("Kandinsky3UNet",)
"""UNets that join their long skips outside of any module."""
WITH_SKIPS: dict[str, TinyModel] = {
    **{name: tiny for name, tiny in TINY_UNETS.items() if name not in NO_SITES},
    "HunyuanDiT2DModel": TINY_MODELS["HunyuanDiT2DModel"],
}
EVERY_MODEL = pytest.mark.parametrize("name", WITH_SKIPS)
SOME_MODELS = pytest.mark.parametrize(
    "name",
    ["UNet2DModel (DDPM)", "UNet2DConditionModel (SD)", "UNet2DConditionModel (SDXL)", "UNet2DConditionModel (IF)"],
)
LINEAR = SkipTuning(rho_bottom=0.4, rho_top=0.9)
RISING = SkipTuning(rho_bottom=0.4, rho_top=0.9, time="increasing")


def sampled(name: str, methods: Any, model: nn.Module | None = None, evaluations: int = 3) -> list[torch.Tensor]:
    """Returns what a tiny model predicts in each evaluation with some methods."""
    tiny = WITH_SKIPS[name]
    calls = calls_of(tiny, evaluations)
    outputs, _ = accelerate(model or tiny.build(), calls, methods, TIMESTEPS[:evaluations])
    return [output[0] for output in outputs]


def plain(name: str, model: nn.Module | None = None, evaluations: int = 3) -> list[torch.Tensor]:
    tiny = WITH_SKIPS[name]
    return [output[0] for output in evaluate(model or tiny.build(), calls_of(tiny, evaluations))]


def all_equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


Change = Callable[[int, torch.Tensor], torch.Tensor]
"""Place of a skip, counted from the one that the decoder reads first, and the skip, to what is read in its place."""


@contextmanager
def read_as(model: nn.Module, change: Change) -> Iterator[None]:
    """Changes every skip by hand, with torch's own hooks on what reads them and nothing of fastdiff."""
    seen: list[torch.Tensor | None] = []

    def one(skip: torch.Tensor | None) -> torch.Tensor | None:
        if skip is None or not any(skip is other for other in seen):  # Cascade reads one in every round of a level
            seen.append(skip)
        if skip is None:  # the latent upscaler's stages make some that they do not read
            return None
        return change(next(place for place, other in enumerate(seen) if other is skip), skip)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "skip" in kwargs:  # HunyuanDiT
            return args, kwargs | {"skip": one(kwargs["skip"])}
        name = next((name for name in kwargs if name.startswith("res_hidden_states_tuple")), None)
        if name:
            return args, kwargs | {name: tuple(map(one, reversed(kwargs[name])))[::-1]}
        if isinstance(args[1], tuple):
            return (args[0], tuple(map(one, reversed(args[1])))[::-1], *args[2:]), kwargs
        return (args[0], None if args[1] is None else one(args[1]), *args[2:]), kwargs  # StableCascade

    readers = list(model.blocks[len(model.blocks) // 2 + 1 :]) if hasattr(model, "blocks") else list(model.up_blocks)
    if isinstance(readers[0], nn.ModuleList):
        readers = [level[0] for level in readers]
    handles = [model.register_forward_pre_hook(lambda *_: seen.clear())]
    handles += [reader.register_forward_pre_hook(before, with_kwargs=True) for reader in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- the factor --------------------------------------------------------------------------------------------------------


@EVERY_MODEL
def test_every_skip_has_its_own_factor(name: str) -> None:
    """As when scaled by hand, deepest first; 1 is bitwise the plain model, 0 is no skips, and no hook is left."""
    model = WITH_SKIPS[name].build()
    before = plain(name, model, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastDiffNoEffectWarning)
        assert all_equal(sampled(name, SkipTuning(rho=1), model, 2), before)

    with read_as(model, lambda place, skip: torch.zeros_like(skip)):
        without = plain(name, model, 2)
    assert all_equal(sampled(name, SkipTuning(rho=0), model, 2), without)
    assert not any(torch.equal(one, other) for one, other in zip(without, before, strict=True))

    rho = np.linspace(0.4, 0.9, view(model).skips)
    with read_as(model, lambda place, skip: skip * float(rho[place])):
        by_hand = plain(name, model, 2)
    assert all_equal(sampled(name, LINEAR, model, 2), by_hand)
    assert traces(model) == []
    assert all_equal(plain(name, model, 2), before)


def test_skip_left_as_it_is_is_handed_over_itself() -> None:
    hooks = InstalledHooks(view(TINY_UNETS["UNet2DModel (DDPM)"].build()))
    hook = hooks.skip_hooks[0]
    skips = tuple(torch.ones(1) for _ in hook.site.skips)
    scales: list[float | None] = [None] * hooks.backbone.skips
    (_, unscaled), _ = hook.pre_forward(hook.site.module, torch.ones(1), skips)
    assert unscaled is skips
    scales[hook.site.skips[-1]] = 0.5
    hooks.scale_skips(scales)
    (_, read), _ = hook.pre_forward(hook.site.module, torch.ones(1), skips)
    assert all(one is other for one, other in zip(read[:-1], skips[:-1], strict=True))
    assert read[-1].item() == 0.5
    assert skips[-1].item() == 1
    _, by_name = hook.pre_forward(hook.site.module, torch.ones(1), res_hidden_states_tuple=skips)
    assert by_name["res_hidden_states_tuple"][-1].item() == 0.5


class Reading:
    """What the resnets of a decoder are given, beside the encoder's outputs as they were made."""

    def __init__(self, model: nn.Module) -> None:
        self.made: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] = []
        self.read: list[tuple[ResnetBlock2D, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        model.register_forward_pre_hook(self._start)
        model.conv_in.register_forward_hook(lambda module, args, output: self._note(output))
        for stage in model.down_blocks:
            stage.register_forward_hook(lambda module, args, output: self._note(*output[1]))
        for stage in model.up_blocks:
            for resnet in stage.resnets:
                resnet.register_forward_hook(
                    lambda module, args, output: self.read.append((module, args[0], args[1], output))
                )

    def _start(self, *_: Any) -> None:
        for noted in (self.made, self.copies, self.read):
            noted.clear()

    def _note(self, *skips: torch.Tensor) -> None:
        self.made += skips
        self.copies += [skip.clone() for skip in skips]


@SOME_MODELS
def test_resnets_read_every_skip_once_and_deepest_first(name: str) -> None:
    model = WITH_SKIPS[name].build()
    reading = Reading(model)
    sampled(name, LINEAR, model)
    assert len(reading.read) == len(reading.made) == view(model).skips
    factors = []
    for (_, given, _, _), made in zip(reading.read, reversed(reading.made), strict=True):
        part = given[:, -made.shape[1] :]
        factors.append(float((part * made).sum() / (made * made).sum()))
        assert torch.allclose(part, factors[-1] * made, rtol=1e-5, atol=1e-7)
    assert factors == pytest.approx(np.linspace(0.4, 0.9, len(factors)), rel=1e-5)


@SOME_MODELS
def test_skips_themselves_are_not_written_to(name: str) -> None:
    model = WITH_SKIPS[name].build()
    reading = Reading(model)
    sampled(name, [LINEAR], model)
    assert all_equal(reading.made, reading.copies)
    assert all(skip._version == 0 for skip in reading.made)


def test_aligned_resnets_see_the_factor_in_their_shortcut_alone() -> None:
    """Their first norm takes a factor out where no group has channels of both the skip and the hidden state."""
    name = "UNet2DConditionModel (SDXL)"
    model = WITH_SKIPS[name].build()
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.norm1.eps = 1e-9  # what is left of the factor otherwise
    reading = Reading(model)
    sampled(name, SkipTuning(rho=0.5), model)
    errors: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for (resnet, given, time, _), made in zip(list(reading.read), reversed(list(reading.made)), strict=True):
            unscaled = torch.cat([given[:, : -made.shape[1]], made], dim=1)
            whole, before = resnet(given, time), resnet(unscaled, time)
            shortcut = before + resnet.conv_shortcut(given) - resnet.conv_shortcut(unscaled)
            group = unscaled.shape[1] // resnet.norm1.num_groups
            is_aligned = (unscaled.shape[1] - made.shape[1]) % group == 0
            errors[is_aligned].append(float((whole - shortcut).norm() / (whole - before).norm()))
    assert len(errors[True]) > 1
    assert len(errors[False]) > 1
    assert max(errors[True]) < 1e-4
    assert min(errors[False]) > 1e-2


# -- several evaluations at once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frames", [1, 3])
def test_batch_of_evaluations_is_scaled_as_each_of_them(dtype: torch.dtype, frames: int) -> None:
    features = torch.randn(2 * 3 * frames, 4, 5, 5).to(dtype, memory_format=torch.channels_last)
    control = torch.randn_like(features)
    factors = torch.tensor([0.3, 1.0, 0.78])
    for added in (None, control):
        together = scaled(features, factors, added)
        parts = [
            scaled(part, factor, extra)
            for part, factor, extra in zip(
                features.chunk(3), factors, (None,) * 3 if added is None else added.chunk(3), strict=True
            )
        ]
        assert together.dtype == dtype
        assert torch.equal(together, torch.cat(parts))


def propagated(tune: Any, parallel: bool, pipe: Any, name: str, **options: Any) -> tuple[torch.Tensor, Any]:
    keys = EncoderPropagation((0, 1, 4), parallel=parallel, prior_noise=0, **options)
    fastdiff.enable(pipe, [keys, tune])
    with one_sample_at_a_time():
        images = UNET_PIPELINES[name].sample(pipe, steps=7, batch=2)
    return images, pipe.fastdiff.last_run.denoisers["unet"]


@pytest.mark.parametrize("freeu", [False, True])
@pytest.mark.parametrize("time", ["increasing", "decreasing"])
def test_parallel_decoding_is_sequential_with_factors_that_change(time: str, freeu: bool) -> None:
    name = "StableDiffusionPipeline"
    pipe = UNET_PIPELINES[name].build()
    if freeu:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    tune = SkipTuning(rho_bottom=0.4, rho_top=0.9, time=time)
    sequential, record = propagated(tune, False, pipe, name)
    assert set(record.skip_scales) == set(range(7)) - {0 if time == "increasing" else 6}
    for options in ({}, {"max_parallel": 2}):
        parallel, record = propagated(tune, True, pipe, name, **options)
        assert sum(record.batches) == 6
        assert torch.equal(parallel, sequential)
        assert set(record.skip_scales) == set(range(7)) - {0 if time == "increasing" else 6}
    assert not torch.equal(propagated(SkipTuning(rho=1), True, pipe, name)[0], sequential)


@pytest.mark.parametrize("name", ["UNet2DModel (DDPM)", "UNet2DConditionModel (SD)", "UNet3DConditionModel"])
def test_reused_features_are_scaled_anew_in_each_evaluation(name: str) -> None:
    """As when the factors of each evaluation are applied by hand to what encoder propagation reuses."""
    model = WITH_SKIPS[name].build()
    keys = EncoderPropagation((0,), parallel=False, prior_noise=0)
    tuned = sampled(name, [keys, RISING], model)
    row = -1
    rho = np.linspace(0.4, 0.9, view(model).skips)

    def next_row(*_: Any) -> None:
        nonlocal row
        row += 1

    def by_hand(place: int, skip: torch.Tensor) -> torch.Tensor:
        factor = 1 - row / (len(TIMESTEPS) - 1) * (1 - rho[place])
        return skip * torch.tensor(factor, dtype=torch.float32)

    handle = model.register_forward_pre_hook(next_row)
    with read_as(model, by_hand):
        expected = sampled(name, keys, model)
    handle.remove()
    assert all_equal(tuned, expected)
    assert not torch.equal(tuned[1], tuned[2])


def test_calls_that_cannot_follow_the_plan_are_scaled_too() -> None:
    """A batch that grows within a run is computed in full, with its evaluation's factors."""
    name = "UNet2DModel (DDPM)"
    tiny = WITH_SKIPS[name]
    model = tiny.build()
    one, two = calls_of(tiny, 3, batch=1), calls_of(tiny, 3, batch=2)
    calls = [one[0], two[1], two[2]]
    outputs, record = accelerate(model, calls, [FeatureInheritance(interval=4), SkipTuning(rho=0.5)], TIMESTEPS[:3])
    assert sum(record.denoisers["denoiser"].fallbacks.values()) == 1
    with read_as(model, lambda place, skip: skip * 0.5):
        assert torch.equal(outputs[1][0], evaluate(model, [calls[1]])[0][0])


# -- FreeU and ControlNets ---------------------------------------------------------------------------------------------


def test_freeu_acts_on_the_scaled_skips() -> None:
    name = "UNet2DConditionModel (SD)"
    model = WITH_SKIPS[name].build()
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    with_freeu = plain(name, model)
    assert all_equal(sampled(name, SkipTuning(rho=1), model), with_freeu)
    with read_as(model, lambda place, skip: skip * 0.5):
        by_hand = plain(name, model)
    assert all_equal(sampled(name, SkipTuning(rho=0.5), model), by_hand)
    assert not all_equal(by_hand, with_freeu)


def control_for(name: str, model: nn.Module) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Returns what a ControlNet could give a tiny model, by argument and as a list in the order of the skips."""
    shapes: list[torch.Size] = []

    def note(place: int, skip: torch.Tensor) -> torch.Tensor:
        shapes.append(skip.shape)
        return skip

    with read_as(model, note):
        evaluate(model, calls_of(WITH_SKIPS[name], 1))
    torch.manual_seed(1)
    added = [torch.randn(shape) for shape in reversed(shapes)]
    if name == "HunyuanDiT2DModel":
        return {"controlnet_block_samples": added}, added
    bottleneck = torch.zeros(shapes[0])
    return {"down_block_additional_residuals": added, "mid_block_additional_residual": bottleneck}, added


@pytest.mark.parametrize("name", ["UNet2DConditionModel (SD)", "UNetMotionModel", "HunyuanDiT2DModel"])
def test_control_is_left_as_it_is_on_demand(name: str) -> None:
    tiny = WITH_SKIPS[name]
    model = tiny.build()
    control, added = control_for(name, model)
    call = calls_of(tiny, 1)[0]

    def given() -> dict[str, Any]:
        return call | {key: list(value) if isinstance(value, list) else value for key, value in control.items()}

    def predict(method: SkipTuning) -> torch.Tensor:
        return accelerate(model, [given()], method, TIMESTEPS[:1])[0][0][0]

    with read_as(model, lambda place, skip: skip * 0.5):
        everything = evaluate(model, [given()])[0][0]
    with read_as(model, lambda place, skip: (skip - added[-1 - place]) * 0.5 + added[-1 - place]):
        without_control = evaluate(model, [given()])[0][0]
    assert torch.equal(predict(SkipTuning(rho=0.5)), everything)
    excluding = predict(SkipTuning(rho=0.5, exclude_control=True))
    scale = float(without_control.abs().max())
    assert torch.allclose(excluding, without_control, rtol=0, atol=1e-5 * scale)
    assert not torch.allclose(excluding, everything, rtol=0, atol=1e-2 * scale)


def test_control_of_a_group_is_left_as_it_is() -> None:
    name = "StableDiffusionControlNetPipeline"
    pipe = UNET_PIPELINES[name].build()
    tune = SkipTuning(rho=0.5, time="increasing", exclude_control=True)
    sequential, _ = propagated(tune, False, pipe, name)
    parallel, record = propagated(tune, True, pipe, name)
    assert sum(record.batches) == 6
    assert torch.equal(parallel, sequential)
    scaling_control = SkipTuning(rho=0.5, time="increasing")
    assert not torch.equal(propagated(scaling_control, True, pipe, name)[0], parallel)


# -- hooks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["UNet2DConditionModel (latent upscaler)", "UNet2DModel (DDPM)", "HunyuanDiT2DModel"])
def test_hooks_within_somebody_elses(name: str) -> None:
    """accelerate wraps a module that has ours, and its wrapper stays when ours go; if it goes, ours are missed."""
    model = WITH_SKIPS[name].build()
    expected = plain(name)
    hooks = InstalledHooks(view(model))
    reader = hooks.skip_hooks[0].site.module
    assert hooks.in_place
    add_hook_to_module(reader, ModelHook())
    assert hooks.in_place
    hooks.remove()
    assert reader._old_forward.__func__ is type(reader).forward
    assert all_equal(plain(name, model), expected)
    remove_hook_from_module(reader)
    assert all_equal(plain(name, model), expected)

    hooks = InstalledHooks(view(model))
    reader.forward = type(reader).forward.__get__(reader)
    assert not hooks.in_place


def test_disabled_pipeline_is_the_plain_one() -> None:
    name = "StableDiffusionPipeline"
    tiny = UNET_PIPELINES[name]
    pipe = tiny.build()
    before = tiny.sample(pipe, steps=3)
    fastdiff.enable(pipe, SkipTuning(rho=0.5))
    assert not torch.equal(tiny.sample(pipe, steps=3), before)
    fastdiff.disable(pipe)
    assert torch.equal(tiny.sample(pipe, steps=3), before)
    assert traces(pipe.unet) == []


# -- the record --------------------------------------------------------------------------------------------------------


def test_record_says_what_was_scaled() -> None:
    name = "UNet2DModel (DDPM)"
    tiny = WITH_SKIPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastDiffNoEffectWarning)
        _, run = accelerate(tiny.build(), calls_of(tiny, 3), RISING, TIMESTEPS)
    scales = run.denoisers["denoiser"].skip_scales
    assert sorted(scales) == [1, 2]
    assert scales[2] == pytest.approx(np.linspace(0.9, 0.4, 12))
    assert scales[1] == pytest.approx(np.linspace(0.95, 0.7, 12))
    assert run.skipped == 0
    assert "long skips scaled by 0.4 to 0.95 in 2 evaluation(s)" in run.summary()


def test_call_in_which_nothing_is_scaled_warns() -> None:
    tiny = WITH_SKIPS["UNet2DModel (DDPM)"]
    scheduler = DDIMScheduler()
    model = tiny.build()
    window = SkipTuning(rho=0.5, time="sigma-window", window=(1e6, 1e7))
    latents = tiny.inputs(1, 0)["sample"]
    with pytest.warns(FastDiffNoEffectWarning):  # noqa: PT031, SIM117 - the run warns when it is left
        with torch.no_grad(), sampling_run(model, window, scheduler=scheduler) as run:
            scheduler.set_timesteps(10)
            for timestep in scheduler.timesteps:
                latents = scheduler.step(model(latents, timestep).sample, timestep, latents).prev_sample
    assert not run.record.scaled
    assert "long skips" not in run.record.summary()


def test_factors_of_several_methods_are_multiplied() -> None:
    name = "UNet2DModel (DDPM)"
    both = sampled(name, [SkipTuning(rho=0.5), SkipTuning(rho=0.5)])
    assert all_equal(both, sampled(name, SkipTuning(rho=0.25)))
    with pytest.raises(fastdiff.ConfigError, match="exclude_control"):
        sampled(name, [SkipTuning(rho=0.5), SkipTuning(rho=0.5, exclude_control=True)])


def test_table_that_does_not_fit_the_call_is_refused() -> None:
    backbone = view(WITH_SKIPS["UNet2DModel (DDPM)"].build())
    request = PlanRequest(backbone, grid_of(TIMESTEPS), lambda: pytest.fail("nothing is measured"))
    method: Any = SimpleNamespace(skip_scales=lambda request: np.ones((3, 11)), scales_control=True)
    with pytest.raises(fastdiff.ConfigError, match=r"shape \(3, 11\).*= \(3, 12\)"):
        SkipScales.of([method], request)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "graphs"), [(SkipTuning(rho=0.5), 1), (RISING, 2)])
def test_changing_factors_are_no_guards(method: SkipTuning, graphs: int) -> None:
    """One graph for all evaluations that scale; another for the one that, in the end, does not."""
    torch._dynamo.reset()
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    timesteps = np.linspace(900, 100, 6).tolist()
    calls = [{"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor(timestep)} for timestep in timesteps]
    expected = [output[0] for output in accelerate(model, calls, method, timesteps)[0]]
    counter = CompileCounterWithBackend("eager")
    outputs, _ = accelerate(torch.compile(model, backend=counter, fullgraph=True), calls, method, timesteps)
    assert all_equal([output[0] for output in outputs], expected)
    assert counter.frame_count == graphs
    torch._dynamo.reset()
