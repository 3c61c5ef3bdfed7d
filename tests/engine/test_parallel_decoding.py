"""Decoding several evaluations as one batch makes what decoding them one after the other makes, and frees it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from engine.loops import (
    RowCounter,
    Sampled,
    assert_same,
    counters,
    encoder_of,
    kept_between,
    sample_loop,
    small_unet,
    text_of,
)
from torch import nn

from fastdiff import EncoderPropagation
from fastdiff.backbones import view
from fastdiff.engine import batching
from tiny.base import Draw
from tiny.per_sample import one_sample_at_a_time
from tiny.sampling import traces
from tiny.unet_condition import POOLED, SDXL

SOLVERS = ("DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "UniPCMultistep", "PNDM")
SOLVERS = (*SOLVERS, "HeunDiscrete")
SETTINGS: list[dict[str, Any]] = [
    {"batch": 1, "guidance": True, "size": (10, 14)},
    {"batch": 3, "guidance": False, "size": (8, 8)},
]
ULPS_OF_A_CALL = 2000
"""Bound on what the batch's shape changes in a whole call, in float32 ulps of the latents' largest value."""
SEQUENTIAL = EncoderPropagation(parallel=False)
PARALLEL = EncoderPropagation()
EVERY_FOURTH = EncoderPropagation(keys=4)
NO_NOISE = {"prior_noise": 0.0}


def both(model: nn.Module, **arguments: Any) -> tuple[Sampled, Sampled]:
    """Returns what sequential and parallel decoding make, with kernels that do not see the batch."""
    with one_sample_at_a_time():
        return sample_loop(model, SEQUENTIAL, **arguments), sample_loop(model, PARALLEL, **arguments)


# -- parallel is sequential --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting.values())))
@pytest.mark.parametrize("solver", SOLVERS)
def test_parallel_is_sequential_for_every_solver(solver: str, setting: dict[str, Any]) -> None:
    sequential, parallel = both(small_unet(), scheduler=solver, **setting)
    assert_same(sequential, parallel)
    assert max(parallel.record.batches) > 1
    assert sequential.record.batches == []
    for sampled in (sequential, parallel):
        assert not sampled.record.fallbacks
        assert not sampled.record.one_by_one


@pytest.mark.parametrize(
    "setting",
    [{"batch": 1, "guidance": False}, {"batch": 3, "guidance": True}, {"batch": 2, "guidance": True, "apart": True}],
    ids=str,
)
def test_parallel_is_sequential_for_every_batch(setting: dict[str, Any]) -> None:
    sequential, parallel = both(small_unet(), **setting)
    assert_same(sequential, parallel)
    assert not torch.equal(sequential.latents, sample_loop(small_unet(), **setting).latents)
    assert len(parallel.record.branches) == (2 if setting.get("apart") else 1)
    assert max(parallel.record.batches) > 1


def added(draw: Draw, rows: int) -> dict[str, Any]:
    sizes = 64 * draw(rows, 6).abs()
    text = {"encoder_hidden_states": draw(rows, 6, SDXL["cross_attention_dim"])}
    return text | {"added_cond_kwargs": {"text_embeds": draw(rows, POOLED), "time_ids": sizes}}


CONDITIONED: dict[str, tuple[dict[str, Any], Callable[[Draw, int], dict[str, Any]]]] = {
    "added conditioning": (SDXL | {"layers_per_block": 1}, added),
    "class labels": (
        {"num_class_embeds": 10},
        lambda draw, rows: text_of(draw, rows) | {"class_labels": draw.ints(10, rows)},
    ),
    "guidance embedding": (
        {"time_cond_proj_dim": 8},
        lambda draw, rows: text_of(draw, rows) | {"timestep_cond": draw(rows, 8)},
    ),
    "activation": ({"time_embedding_act_fn": "silu"}, text_of),
}


@pytest.mark.parametrize("embedding", CONDITIONED)
def test_the_whole_embedding_is_made_for_every_timestep(embedding: str) -> None:
    """Every part of it changes the decoder, so a version that embeds the timestep alone makes something else."""
    config, conditioning = CONDITIONED[embedding]
    model = small_unet(**config)
    sequential, parallel = both(model, conditioning=conditioning, batch=2)
    assert_same(sequential, parallel)
    assert max(parallel.record.batches) > 1


def test_kernels_that_see_the_batch_differ_by_rounding_alone() -> None:
    worst = 0.0
    for solver in ("DDIM", "EulerAncestralDiscrete", "HeunDiscrete"):
        sequential = sample_loop(small_unet(), SEQUENTIAL, scheduler=solver, batch=3).latents
        parallel = sample_loop(small_unet(), PARALLEL, scheduler=solver, batch=3).latents
        worst = max(worst, float((sequential - parallel).abs().max() / sequential.abs().max()) / 2**-23)
    assert worst < ULPS_OF_A_CALL


def test_sequential_is_the_method_written_down_a_second_time() -> None:
    for scheduler in ("DDIM", "HeunDiscrete"):
        model = small_unet()
        method = EncoderPropagation(parallel=False, **NO_NOISE)
        sampled = sample_loop(model, method, scheduler=scheduler, batch=2)
        with kept_between(model, encoder_of(model), method.key_evaluations(len(sampled.predictions))):
            assert_same(sample_loop(model, scheduler=scheduler, batch=2), sampled)


@pytest.mark.parametrize("order", [1, 2])
def test_forecast_features_are_those_of_each_evaluation(order: int) -> None:
    """Every row of a batch has weights of its own."""
    model = small_unet()
    forecast = EncoderPropagation(keys=3, order=order)
    with one_sample_at_a_time():
        sequential = sample_loop(model, EncoderPropagation(keys=3, order=order, parallel=False), batch=2)
        parallel = sample_loop(model, forecast, batch=2)
        carried = sample_loop(model, EncoderPropagation(keys=3), batch=2)
    assert_same(sequential, parallel)
    assert max(parallel.record.batches) > 1
    assert not torch.equal(parallel.latents, carried.latents)


# -- groups that are split ---------------------------------------------------------------------------------------------


def test_split_groups_make_the_same() -> None:
    model = small_unet()
    keys = EncoderPropagation(keys=7)
    with one_sample_at_a_time():
        whole = sample_loop(model, keys, steps=20, batch=2)
        split = sample_loop(model, EncoderPropagation(keys=7, max_parallel=3), steps=20, batch=2)
        alone = sample_loop(model, EncoderPropagation(keys=7, max_parallel=1), steps=20, batch=2)
    assert whole.record.batches == [6, 7, 6]
    assert split.record.batches == [3, 3, 3, 3, 1, 3, 3]
    assert alone.record.batches == [1] * 19
    assert_same(whole, split)
    assert_same(whole, alone)


def test_little_memory_splits_groups_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_unet()
    with one_sample_at_a_time():
        whole = sample_loop(model, EVERY_FOURTH)
    features = sample_loop(model, EncoderPropagation(keys=4, parallel=False)).record.peak_bytes
    for room, batches in ((4, [3, 4, 4]), (3, [3, 3, 1, 3, 1]), (0, [1] * 11)):
        available = 2 * room * batching.DECODER_MEMORY * features
        monkeypatch.setattr(
            batching.psutil, "virtual_memory", lambda free=available: types.SimpleNamespace(available=free)
        )
        with one_sample_at_a_time():
            sampled = sample_loop(model, EVERY_FOURTH)
        assert sampled.record.batches == batches
        assert_same(sampled, whole)


def test_bytes_held_are_the_features_and_bounded_by_max_parallel() -> None:
    model = small_unet()
    features: dict[str, int] = {}
    units = {unit.name: unit.module for unit in view(model).units}
    handles = [
        units[name].register_forward_hook(lambda _, __, output, name=name: features.update({name: _nbytes(output)}))
        for name in view(model).encoded
    ]
    plain = sample_loop(model, steps=1)
    for handle in handles:
        handle.remove()
    one, prediction = sum(features.values()), plain.predictions[0].nbytes

    sequential = sample_loop(model, EncoderPropagation(keys=8, parallel=False), steps=16)
    assert sequential.record.peak_bytes == one
    for limit in (1, 2, 5):
        peak = sample_loop(model, EncoderPropagation(keys=8, max_parallel=limit), steps=16).record.peak_bytes
        assert one < peak <= (1 + limit) * one + 8 * prediction
    unlimited = sample_loop(model, EncoderPropagation(keys=8), steps=16).record.peak_bytes
    assert (1 + 8) * one <= unlimited <= (1 + 8) * one + 8 * prediction


def _nbytes(output: Any) -> int:
    return output.nbytes if isinstance(output, torch.Tensor) else sum(part.nbytes for part in output)


# -- what runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "steps", "keys", "groups"),
    [
        (EncoderPropagation(), 50, 9, 9),
        (EncoderPropagation(), 20, 7, 7),
        (EncoderPropagation(official_truncate=True), 20, 7, 7),
        (EncoderPropagation(keys=5), 20, 4, 5),  # evaluation 0 is decoded by itself
        (EncoderPropagation(keys=(0, 1, 9)), 20, 3, 3),
        (EncoderPropagation(keys=(0,)), 20, 1, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance", [True, False])
def test_encoder_runs_at_keys_and_decoder_once_for_each_group(
    method: EncoderPropagation, steps: int, keys: int, groups: int, guidance: bool
) -> None:
    model = small_unet()
    encoder, decoder = counters(model)
    sampled = sample_loop(model, method, steps=steps, guidance=guidance)
    rows = 1 + guidance
    assert encoder.rows == [rows] * keys
    assert len(decoder.rows) == groups
    assert sum(decoder.rows) == steps * rows
    assert len(sampled.record.calls) == steps
    batched = sum(sampled.record.batches)
    assert batched == steps - sum(count == rows for count in decoder.rows)
    assert f"{batched} evaluations made in" in "\n".join(sampled.record.lines())


def test_sequential_decoder_runs_in_every_evaluation() -> None:
    model = small_unet()
    encoder, decoder = counters(model)
    sample_loop(model, SEQUENTIAL, steps=50)
    assert encoder.rows == [2] * 9
    assert decoder.rows == [2] * 50


@pytest.mark.parametrize(("solver", "evaluations"), [("PNDM", 21), ("HeunDiscrete", 23), ("KDPM2Discrete", 23)])
def test_keys_count_evaluations(solver: str, evaluations: int) -> None:
    """Solvers that evaluate more than once for a step have more evaluations than steps, and as many answers."""
    model = small_unet()
    encoder, decoder = counters(model)
    sampled = sample_loop(model, EVERY_FOURTH, scheduler=solver)
    assert len(sampled.predictions) == evaluations
    assert len(encoder.rows) == -(-evaluations // 4)
    assert sum(decoder.rows) == 2 * evaluations


@pytest.mark.parametrize("stage", ["down_blocks.1", "up_blocks.1"])
def test_weights_matter_in_the_call_that_makes_the_predictions(stage: str) -> None:
    """All of a group's predictions are made in its key's call: what the weights are later does not matter to them."""
    model = small_unet()
    weight = model.get_submodule(stage).resnets[0].conv1.weight
    clean = weight.detach().clone()

    def spoiled(at: int) -> list[bool]:
        def spoil(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
            with torch.no_grad():
                weight.copy_(torch.full_like(clean, torch.nan) if evaluation == at else clean)
            return call

        latents = sample_loop(model, EVERY_FOURTH, before=spoil)
        return [not torch.isfinite(prediction).all() for prediction in latents.predictions]

    assert not any(spoiled(5) + spoiled(6) + spoiled(7))
    assert spoiled(4) == [False] * 4 + [True] * 8
    assert spoiled(1) == ([False] * 12 if stage.startswith("down") else [False] + [True] * 11)


# -- what a prediction depends on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [True, False])
def test_latents_between_keys_do_not_matter(parallel: bool) -> None:
    """A latent that is overwritten within a group takes effect at the next key, and only there."""
    model = small_unet()
    method = EncoderPropagation(keys=4, parallel=parallel, **NO_NOISE)

    def garbage(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
        return call if evaluation % 4 == 0 else call | {"sample": torch.full_like(call["sample"], torch.nan)}

    clean = sample_loop(model, method)
    assert_same(clean, sample_loop(model, method, before=garbage))

    for overwritten in (4, 6):  # before evaluations 5 and 7, of which 8 is the first key
        painted = sample_loop(
            model, method, edit=lambda row, latents, at=overwritten: latents + 1.0 if row == at else latents
        )
        differ = [not torch.equal(a, b) for a, b in zip(clean.predictions, painted.predictions, strict=True)]
        assert differ == [False] * 8 + [True] * 4
    at_key = sample_loop(model, method, edit=lambda row, latents: latents + 1.0 if row == 3 else latents)
    assert [not torch.equal(a, b) for a, b in zip(clean.predictions, at_key.predictions, strict=True)].index(True) == 4


@pytest.mark.parametrize("parallel", [True, False])
def test_timesteps_and_prompts_between_keys_matter(parallel: bool) -> None:
    model = small_unet()
    method = EncoderPropagation(keys=4, parallel=parallel, **NO_NOISE)
    clean = sample_loop(model, method)

    def moved(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
        return call | {"timestep": call["timestep"] + 100} if evaluation == 6 else call

    def asked(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
        other = text_of(Draw(7), 2)
        return call | other if evaluation == 6 else call

    for change in (moved, asked):
        changed = sample_loop(model, method, before=change)
        differ = [not torch.allclose(a, b) for a, b in zip(clean.predictions, changed.predictions, strict=True)]
        assert differ.index(True) == 6
        assert not differ[7]
        assert torch.isfinite(changed.latents).all()


def test_predictions_made_for_another_timestep_are_not_handed_out() -> None:
    model = small_unet()
    method = EncoderPropagation(keys=4, **NO_NOISE)
    plain: dict[int, torch.Tensor] = {}

    def moved(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
        return call | {"timestep": call["timestep"] + 100} if evaluation == 6 else call

    def noted(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
        plain[evaluation] = call = moved(evaluation, call)
        return call

    sampled = sample_loop(model, method, before=noted)
    assert sampled.record.fallbacks == {"another timestep than the prediction was made for": 1}
    with torch.no_grad():
        assert torch.equal(sampled.predictions[6], model(**plain[6], return_dict=False)[0])


# -- what cannot be stacked --------------------------------------------------------------------------------------------


class CrossFrame(AttnProcessor2_0):
    """Keys and values of the first row for all, as Text2Video-Zero has them."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return super().__call__(attn, hidden_states, context[:1].expand_as(context), **kwargs)


def test_attentions_that_mix_rows_are_run_one_by_one() -> None:
    model = small_unet()
    model.set_attn_processor(CrossFrame())
    sequential = sample_loop(model, EncoderPropagation(keys=4, parallel=False), batch=2)
    parallel = sample_loop(model, EncoderPropagation(keys=4), batch=2)
    assert torch.equal(sequential.latents, parallel.latents)
    assert parallel.record.batches == []
    ((reason, times),) = parallel.record.one_by_one.items()
    assert "CrossFrame may mix the samples" in reason
    assert times > 0
    assert reason in "\n".join(parallel.record.lines())


def test_loops_with_timesteps_of_their_own_are_run_one_by_one() -> None:
    model = small_unet()
    shifted = {"before": lambda row, call: call | {"timestep": call["timestep"] + 1}}
    sequential = sample_loop(model, EncoderPropagation(keys=4, parallel=False), **shifted)
    parallel = sample_loop(model, EncoderPropagation(keys=4), **shifted)
    assert torch.equal(sequential.latents, parallel.latents)
    assert list(parallel.record.one_by_one) == ["the denoiser is not given the scheduler's own timesteps"]
    assert parallel.record.batches == []


@pytest.mark.parametrize("last", [4, 6])
def test_guidance_that_ends_within_a_call(last: int) -> None:
    """As a callback ends it: at a key nothing of the new batch has run yet, within a group nothing of it is kept."""
    arguments = {"guided_until": last, "batch": 2}
    with one_sample_at_a_time():
        sequential = sample_loop(small_unet(), EncoderPropagation(keys=4, parallel=False), **arguments)
        parallel = sample_loop(small_unet(), EVERY_FOURTH, **arguments)
    assert_same(sequential, parallel)
    rows = [len(prediction) for prediction in parallel.predictions]
    assert rows == [4] * last + [2] * (12 - last)
    kept_nothing = {"nothing kept to reuse for this branch and shape": 2} if last == 6 else {}
    assert sequential.record.fallbacks == parallel.record.fallbacks == kept_nothing
    assert bool(parallel.record.one_by_one) == (last == 4)


# -- calls are independent ---------------------------------------------------------------------------------------------


def test_calls_share_nothing() -> None:
    model = small_unet()
    first = sample_loop(model, PARALLEL)
    for change in ({"seed": 5}, {"size": (10, 14)}, {"batch": 2}, {"guidance": False}, {"steps": 9}):
        changed = sample_loop(model, PARALLEL, **change)
        assert_same(changed, sample_loop(small_unet(), PARALLEL, **change))
        assert not changed.record.fallbacks
    assert_same(first, sample_loop(model, PARALLEL))


class Broken(Exception):
    """Raised inside a call."""


@pytest.mark.parametrize("where", ["decoder", "between"])
def test_error_within_a_group_leaves_nothing(where: str) -> None:
    model = small_unet()
    expected = sample_loop(model, EVERY_FOURTH)
    calls = RowCounter(model.up_blocks[-1].resnets[-1].norm1)
    handle = None
    if where == "decoder":

        def fail(*_: Any) -> None:
            if len(calls.rows) == 3:
                raise Broken

        handle = model.up_blocks[-1].resnets[-1].norm2.register_forward_pre_hook(fail)

    def stop(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
        if where == "between" and evaluation == 6:
            raise Broken
        return call

    with pytest.raises(Broken):
        sample_loop(model, EVERY_FOURTH, before=stop, seed=3)
    if handle:
        handle.remove()
    model.up_blocks[-1].resnets[-1].norm1._forward_hooks.clear()
    assert traces(model) == []
    assert_same(expected, sample_loop(model, EVERY_FOURTH))
