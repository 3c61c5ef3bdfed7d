"""What goes wrong in other caching libraries, one test for each; see also offloading, branches and calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from engine.cases import STEPS, accelerated, build, denoiser_calls, methods_for, record_of, sample
from torch import nn

import fastdiff
from fastdiff import Action, ComputePlan, ExitSchedule, FeatureInheritance, LayerSkipping, StateError
from fastdiff.backbones import view
from tiny.models import TINY_MODELS
from tiny.pipelines import PIXELS, TINY_PIPELINES, pipeline, transformer
from tiny.sampling import accelerate, calls_of, counting, evaluate

CONTROLLED = pytest.mark.parametrize("name", ["FluxTransformer2DModel", "ChromaTransformer2DModel"])


# -- state that outlives its call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiTPipeline", "FluxPipeline", "ChromaPipeline"])
def test_denoiser_used_without_its_pipeline_is_plain(name: str) -> None:
    pipe = build(name)
    inputs = [denoiser_calls(pipe, name, seed=seed)[-1] for seed in (1, 2)]
    plain = evaluate(pipe.transformer, inputs)
    fastdiff.enable(pipe, FeatureInheritance())
    sample(pipe, name)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, evaluate(pipe.transformer, inputs), strict=True))


def test_pipeline_that_shares_the_denoiser_is_plain() -> None:
    """`from_pipe` makes another pipeline of the same components; only the accelerated one is accelerated."""
    pipe = build("StableDiffusion3Pipeline")
    plain = sample(pipe, "StableDiffusion3Pipeline")
    fastdiff.enable(pipe, FeatureInheritance())
    accelerated_sample = sample(pipe, "StableDiffusion3Pipeline")
    other = diffusers.StableDiffusion3Pipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)

    assert not fastdiff.is_enabled(other)
    assert torch.equal(sample(other, "StableDiffusion3Pipeline"), plain)
    assert torch.equal(sample(pipe, "StableDiffusion3Pipeline"), accelerated_sample)
    with pytest.raises(StateError, match=r"SD3Transformer2DModel.*shares"):
        fastdiff.enable(other, LayerSkipping())
    assert not fastdiff.is_enabled(other)
    assert torch.equal(sample(other, "StableDiffusion3Pipeline"), plain)
    assert torch.equal(sample(pipe, "StableDiffusion3Pipeline"), accelerated_sample)
    fastdiff.disable(pipe)
    fastdiff.enable(other, FeatureInheritance())
    assert torch.equal(sample(other, "StableDiffusion3Pipeline"), accelerated_sample)


def test_pipeline_made_of_an_accelerated_ones_class_is_plain() -> None:
    """``type(pipe)(**pipe.components)`` is common; nothing was enabled on what it makes."""
    name = "StableDiffusion3Pipeline"
    pipe = build(name)
    plain = sample(pipe, name)
    fastdiff.enable(pipe, FeatureInheritance())
    expected = sample(pipe, name)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)

    assert not fastdiff.is_enabled(other)
    assert torch.equal(sample(other, name), plain)
    assert torch.equal(sample(pipe, name), expected)
    assert fastdiff.disable(other) is other
    fastdiff.disable(pipe)
    fastdiff.enable(other, FeatureInheritance())
    assert torch.equal(sample(other, name), expected)


def test_cache_of_diffusers_and_ours_do_not_act_on_the_same_blocks() -> None:
    pipe = build("FluxPipeline")
    plain = sample(pipe, "FluxPipeline")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(StateError, match=r"disable_cache"):
        fastdiff.enable(pipe, FeatureInheritance())
    assert not fastdiff.is_enabled(pipe)
    pipe.transformer.disable_cache()
    fastdiff.enable(pipe, FeatureInheritance())
    sample(pipe, "FluxPipeline")
    fastdiff.disable(pipe)
    assert torch.equal(sample(pipe, "FluxPipeline"), plain)


# -- SD3's last block, which has no text stream ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        [Action.REUSE] * 4,
        [Action.COMPUTE, Action.COMPUTE, Action.COMPUTE, Action.REUSE],
        [Action.COMPUTE, Action.COMPUTE, Action.REUSE, Action.REUSE],
        [Action.COMPUTE, Action.COMPUTE, Action.COMPUTE, Action.SKIP],
        [Action.COMPUTE, Action.COMPUTE, Action.COMPUTE, Action.EXIT],
        [Action.COMPUTE, Action.EXIT, Action.EXIT, Action.EXIT],
    ],
    ids=lambda row: "-".join(action.name for action in row),
)
def test_last_block_of_sd3(row: list[Action]) -> None:
    """It returns None for the text, which no residual can be taken of."""
    tiny = TINY_MODELS["SD3Transformer2DModel"]
    model = tiny.build()
    assert model.transformer_blocks[-1].context_pre_only
    names = view(model).names
    calls = calls_of(tiny, 1) * 3
    plan = ComputePlan(np.array([[Action.COMPUTE] * 4, row, [Action.COMPUTE] * 4]), names)
    with counting(model, names, calls[0]) as counted:
        outputs, _ = accelerate(model, calls, plan, (3.0, 2.0, 1.0))
    assert np.array_equal(counted.table(names), plan.table == Action.COMPUTE)
    if Action.REUSE in row:
        assert torch.allclose(outputs[1][0], outputs[0][0], atol=1e-5)  # equal inputs
    else:
        assert not torch.allclose(outputs[1][0], outputs[0][0], atol=1e-3)
        shallow = tiny.build()
        shallow.transformer_blocks = shallow.transformer_blocks[: row.count(Action.COMPUTE)]
        assert torch.equal(outputs[1][0], evaluate(shallow, calls[:1])[0][0])
    assert torch.equal(outputs[2][0], outputs[0][0])


# -- ControlNet --------------------------------------------------------------------------------------------------------


def test_controlnet_with_nothing_reused_is_plain() -> None:
    name = "FluxControlNetPipeline"
    pipe = build(name)
    plain = sample(pipe, name)
    assert not torch.equal(plain, sample(pipe, name, controlnet_conditioning_scale=0.0))
    fastdiff.enable(pipe, ComputePlan.full(STEPS, view(pipe.transformer).names))
    assert torch.equal(sample(pipe, name), plain)


def test_controlnet_runs_in_every_evaluation_and_matters_where_blocks_are_reused() -> None:
    name = "FluxControlNetPipeline"
    pipe = accelerated(name, "inherit-0")
    calls: list[int] = []
    pipe.controlnet.register_forward_hook(lambda *_: calls.append(1))
    sampled = sample(pipe, name)
    assert len(calls) == STEPS
    assert not torch.equal(sampled, sample(pipe, name, controlnet_conditioning_scale=0.0))


def controlled_calls(name: str) -> list[dict[str, Any]]:
    """Returns two evaluations with different inputs and control residuals, one for each block but the first."""
    tiny = TINY_MODELS[name]
    calls = []
    for seed, timestep in ((0, 800.0), (1, 700.0)):
        inputs = tiny.inputs(1, seed)
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep / 1000)
        draw = torch.Generator().manual_seed(100 + seed)
        shape = (1, inputs["hidden_states"].shape[1], 32)
        samples = [torch.randn(shape, generator=draw) for _ in range(6)]
        calls.append(inputs | {"controlnet_block_samples": samples[:3], "controlnet_single_block_samples": samples[3:]})
    calls[1] |= {key: calls[0][key] for key in calls[0] if "encoder" in key or "pooled" in key}
    return calls


class Seen:
    """The inputs and outputs of some modules in one plain forward."""

    def __init__(self, model: nn.Module, call: dict[str, Any], modules: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        handles = []
        for key, module in modules.items():
            handles.append(
                module.register_forward_hook(
                    lambda _, args, kwargs, output, key=key: self._note(key, args, kwargs, output), with_kwargs=True
                )
            )
        evaluate(model, [call])
        for handle in handles:
            handle.remove()

    def _note(self, key: str, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        copied = [value.clone() for value in (output if isinstance(output, tuple) else (output,))]
        self.outputs[key] = copied
        named = {name: kwargs[name].clone() for name in ("hidden_states", "encoder_hidden_states") if name in kwargs}
        self.inputs[key] = named | {"args": [arg.clone() for arg in args]}


@torch.no_grad()
def reused_by_hand(model: nn.Module, name: str, calls: list[dict[str, Any]]) -> torch.Tensor:
    """The second evaluation with each block list's sum of changes taken from the first, control residuals and all.

    What the loop adds after a list's last block is not part of what is kept, and is added anew.
    """
    double, single = model.transformer_blocks, model.single_transformer_blocks
    watched = {"first": double[0], "last": double[-1], "first single": single[0], "last single": single[-1]}
    before, now = (Seen(model, call, watched | {"norm": model.norm_out}) for call in calls)
    control, control_single = calls[1]["controlnet_block_samples"], calls[1]["controlnet_single_block_samples"]

    text, image = (
        now.inputs["first"][stream] + before.outputs["last"][place] - before.inputs["first"][stream]
        for place, stream in enumerate(("encoder_hidden_states", "hidden_states"))
    )
    image = image + control[-1]
    if name.startswith("Chroma"):  # its single blocks take one stream of both
        image = torch.cat([text, image], dim=1)
    changed = before.outputs["last single"][-1] - before.inputs["first single"]["hidden_states"]
    image = (image + changed)[:, -control_single[-1].shape[1] :] + control_single[-1]
    return model.proj_out(model.norm_out(image, now.inputs["norm"]["args"][1]))


@CONTROLLED
def test_control_residuals_are_added_once(name: str) -> None:
    """A block list that is reused stands for its own residuals and those the loop added between its blocks."""
    model = TINY_MODELS[name].build()
    names = view(model).names
    calls = controlled_calls(name)
    plain = evaluate(model, calls)
    expected = reused_by_hand(model, name, calls)

    plan = ComputePlan(np.array([[Action.COMPUTE] * 6, [Action.REUSE] * 6]), names)
    outputs, record = accelerate(model, calls, plan, (800.0, 700.0))
    assert torch.equal(outputs[0][0], plain[0][0])
    assert torch.allclose(outputs[1][0], expected, atol=1e-5)
    assert not torch.allclose(outputs[1][0], plain[1][0], atol=1e-2)
    assert not record.denoisers["denoiser"].fallbacks


@CONTROLLED
def test_loop_that_writes_into_block_outputs_does_not_spoil_what_is_kept(name: str) -> None:
    """Equal inputs give equal outputs, however blocks that pass their input through are mixed with others."""
    model = TINY_MODELS[name].build()
    names = view(model).names
    calls = controlled_calls(name)[:1] * 8
    rows = [[Action.COMPUTE] * 6, [Action.REUSE] * 6]
    rows += [[Action.REUSE if unit == column else Action.COMPUTE for unit in range(6)] for column in range(6)]
    inputs = [tensor.clone() for tensor in calls[0]["controlnet_single_block_samples"]]
    outputs, _ = accelerate(model, calls, ComputePlan(np.array(rows), names), np.arange(8, 0, -1.0))
    for output in outputs[1:]:
        assert torch.allclose(output[0], outputs[0][0], atol=1e-5)
    assert all(map(torch.equal, inputs, calls[0]["controlnet_single_block_samples"]))


# -- small stacks, two experts, guidance that leaves out layers --------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "ase-demo", "inherit-0", "inherit-2", "layers-reuse"])
@pytest.mark.parametrize("name", ["DiTPipeline", "StableDiffusion3Pipeline"])
def test_stack_of_one_block(name: str, method: str) -> None:
    pipe = build(name)
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[-1:]
    plain = sample(pipe, name)
    fastdiff.enable(pipe, methods_for(pipe, method))
    if method.startswith("inherit"):
        assert not torch.equal(sample(pipe, name), plain)
        assert record_of(pipe).skipped > 0
    elif method == "full":
        assert torch.equal(sample(pipe, name), plain)
    else:  # nothing can be left out
        with pytest.warns(fastdiff.FastDiffNoEffectWarning):
            assert torch.equal(sample(pipe, name), plain)
    fastdiff.disable(pipe)
    assert torch.equal(sample(pipe, name), plain)


def test_two_experts_have_a_plan_each() -> None:
    name = "WanPipeline (two experts)"
    pipe = build(name)
    fastdiff.enable(pipe, FeatureInheritance(interval=4, span=(1, None), last_key=False))
    sample(pipe, name, steps=12)
    first, second = (record_of(pipe, key) for key in ("transformer", "transformer_2"))
    seen = [sorted({call.evaluation for call in record.calls}) for record in (first, second)]
    assert seen[0] + seen[1] == list(range(12))
    assert min(map(len, seen)) >= 3
    for record, evaluations in zip((first, second), seen, strict=True):
        computed = {call.evaluation for call in record.calls if Action.REUSE not in call.actions}
        assert computed == set(evaluations[::4])  # a key first, and then by its own count
        assert not record.fallbacks
    assert second.plans[0].evaluations == len(seen[1])


def test_guidance_that_leaves_out_layers_is_computed_in_full() -> None:
    name = "StableDiffusion3Pipeline"
    arguments = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6}
    pipe = build(name)
    plain = sample(pipe, name, **arguments)
    assert not torch.equal(plain, sample(pipe, name))
    fastdiff.enable(pipe, ExitSchedule("full"))
    assert torch.equal(sample(pipe, name, **arguments), plain)

    fastdiff.enable(pipe, FeatureInheritance(interval=3))
    sample(pipe, name, **arguments)
    record = record_of(pipe)
    (reason,) = record.fallbacks
    assert "skip_layers" in reason
    guided = [call for call in record.calls if call.branch != record.calls[0].branch]
    assert len(guided) == record.fallbacks[reason] > 0
    assert all(set(call.actions) == {Action.COMPUTE} for call in guided)
    assert record.skipped > 0
    assert reason in pipe.fastdiff.summary()


# -- components that change after enabling -----------------------------------------------------------------------------


def test_second_latent_stepped_with_a_copy_of_the_scheduler_is_no_evaluation() -> None:
    """As in pipelines with sound; others put a scheduler's attributes back as they were before a step."""
    name = "StableDiffusion3Pipeline"
    pipe = accelerated(name, "inherit-0")
    expected = sample(pipe, name)
    evaluations = [call.evaluation for call in record_of(pipe).calls]
    copies = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        copies.append(copy.deepcopy(pipe.scheduler))
        copies[-1].set_timesteps(50)
        copies[-1].step(kwargs["latents"], copies[-1].timesteps[0], kwargs["latents"])
        assert len(pipe.scheduler.timesteps) == STEPS
        vars(pipe.scheduler).update(copy.deepcopy(vars(pipe.scheduler)))
        return kwargs

    assert torch.equal(sample(pipe, name, callback_on_step_end=callback), expected)
    assert [call.evaluation for call in record_of(pipe).calls] == evaluations
    assert not any({"step", "set_timesteps"} & set(vars(scheduler)) for scheduler in (*copies, pipe.scheduler))


def test_pipeline_that_steps_only_copies_of_its_scheduler() -> None:
    """SkyReels' diffusion forcing has one for each latent frame."""
    if not hasattr(diffusers, "SkyReelsV2DiffusionForcingPipeline"):
        pytest.skip("this diffusers has no such pipeline")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
    entry = pipeline(
        "SkyReelsV2DiffusionForcingPipeline",
        lambda: {
            "transformer": transformer("SkyReelsV2Transformer3DModel"),
            "scheduler": diffusers.UniPCMultistepScheduler(**flow),
        },
        lambda call: call.prompt(6.0) | {"prompt": None, "height": PIXELS, "width": PIXELS, "num_frames": 9},
    )

    def run() -> torch.Tensor:
        return pipe(**entry.inputs(steps=STEPS), return_dict=False)[0]

    pipe = entry.build()
    plain = run()
    fastdiff.enable(pipe, ExitSchedule("full"))
    assert torch.equal(run(), plain)
    fastdiff.enable(pipe, FeatureInheritance(interval=3, last_key=False))
    sampled = run()
    assert not torch.equal(sampled, plain)
    assert torch.equal(run(), sampled)
    record = record_of(pipe)
    assert len(record.branches) == 2
    for branch in record.branches:
        computed = [set(call.actions) == {Action.COMPUTE} for call in record.calls if call.branch == branch]
        assert computed == [row % 3 == 0 for row in range(STEPS)]


def other_weights(name: str) -> DiffusionPipeline:
    pipe = build(name)
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.mul_(1.01)
    return pipe


@pytest.mark.parametrize("name", ["DiTPipeline", "FluxPipeline"])
def test_denoiser_may_be_replaced(name: str) -> None:
    pipe = accelerated(name, "inherit-1")
    sample(pipe, name)
    old, replacement = pipe.transformer, other_weights(name)
    pipe.transformer = replacement.transformer
    fastdiff.enable(fresh := other_weights(name), methods_for(replacement, "inherit-1"))
    assert torch.equal(sample(pipe, name), sample(fresh, name))
    assert not any(hasattr(unit.module, "_diffusers_hook") for unit in view(old).units)
    fastdiff.disable(pipe)
    assert torch.equal(sample(pipe, name), sample(other_weights(name), name))


def test_unsupported_denoiser_in_place_of_a_supported_one_is_refused_in_every_call() -> None:
    """Not once and then silently never again."""
    pipe = accelerated("DiTPipeline", "inherit-1")
    expected = sample(pipe, "DiTPipeline")
    own = pipe.transformer
    pipe.transformer = nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(fastdiff.UnsupportedBackboneError, match="Linear"):
            sample(pipe, "DiTPipeline")
    pipe.transformer = own
    assert torch.equal(sample(pipe, "DiTPipeline"), expected)


@pytest.mark.parametrize("name", ["DiTPipeline", "FluxPipeline"])
def test_moving_to_another_dtype(name: str) -> None:
    pipe = accelerated(name, "inherit-1")
    single = sample(pipe, name)
    prompts = {
        key: value.bfloat16()
        for key, value in TINY_PIPELINES[name].inputs().items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    half = sample(pipe.to(torch.bfloat16), name, **prompts)
    assert record_of(pipe).skipped > 0
    assert not record_of(pipe).fallbacks
    fastdiff.enable(fresh := build(name).to(torch.bfloat16), pipe.fastdiff.methods)
    assert torch.equal(half, sample(fresh, name, **prompts))
    assert (half.float() - single).abs().mean() < 0.1 * single.abs().mean()


@pytest.mark.parametrize("name", ["WanPipeline", "FluxPipeline", "StableDiffusion3Pipeline"])
def test_adapters_come_and_go(name: str) -> None:
    peft = pytest.importorskip("peft")

    def adapt(pipe: DiffusionPipeline) -> None:
        torch.manual_seed(0)
        modules = ["to_q", "to_k", "to_v"]
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False))

    pipe = accelerated(name, "inherit-1")
    without = sample(pipe, name)
    adapt(pipe)
    sampled = sample(pipe, name)
    assert record_of(pipe).skipped > 0
    assert not torch.equal(sampled, without)
    adapt(adapted := build(name))
    fastdiff.enable(adapted, methods_for(adapted, "inherit-1"))
    assert torch.equal(sampled, sample(adapted, name))
    pipe.transformer.disable_adapters()
    assert torch.equal(sample(pipe, name), without)
    pipe.transformer.enable_adapters()
    assert torch.equal(sample(pipe, name), sampled)
    fastdiff.disable(pipe)
    fastdiff.disable(adapted)
    assert torch.equal(sample(pipe, name), sample(adapted, name))
