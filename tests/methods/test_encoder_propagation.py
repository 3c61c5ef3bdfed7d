"""Encoder propagation: which evaluations are keys, the prior noise, ControlNets, and transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from engine.loops import RowCounter, make_scheduler, sample_loop, small_unet
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import Action, ConfigError, EncoderPropagation, FastDiffNoEffectWarning
from fastdiff.backbones import view
from fastdiff.engine import Grid
from fastdiff.methods import Method, PlanRequest
from fastdiff.methods.encoder_propagation import KEY_SETS
from tiny.models import TINY_MODELS
from tiny.per_sample import one_sample_at_a_time
from tiny.pipelines import TINY_PIPELINES
from tiny.plans import request_of
from tiny.sampling import counting
from tiny.unet_pipelines import UNET_PIPELINES
from tiny.unets import TINY_UNETS

# -- keys --------------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, tuple[int, Sequence[int]]] = {
    "nonuniform-50": (50, (0, 1, 2, 3, 5, 10, 15, 25, 35)),
    "nonuniform-50-II": (50, (0, 10, 11, 12, 15, 20, 25, 30, 35, 45)),
    "nonuniform-50-III": (50, (0, 20, 25, 30, 35, 45, 46, 47, 48, 49)),
    "nonuniform-50-IV": (50, (0, 9, 13, 14, 15, 28, 29, 32, 36, 45)),
    "pro": (75, [order for order in range(75) if math.isqrt(9 + 8 * order) ** 2 == 9 + 8 * order]),
    "if-100": (100, [100 - step for step in (*range(100, 90, -1), *range(90, 14, -5), *range(14, 0, -1))]),
    "if-75": (75, [order for order in range(75) if order < 10 or order > 65 or order % 5 == 0]),
    "if-75-II": (75, (0, 1, 2, 3, 5, 10, 15, 25, 35, 45, 55, 65)),
    "if-super-resolution": (50, [order for order in range(50) if not 20 <= order <= 40 or order % 2 == 0]),
    "ldm-250": (
        250,
        [
            *(0, 1, 2, 3, 4, 5, 10, 15, 25, 35, 55, 75, 85, 95, 96, 97, 98, 99, 110, 125, 135, 140, 145, 146, 147),
            *(148, 149, 155, 160, 170, 171, 172, 173, 174, 185, 195, 196, 197, 198, 199, 210, 222, 223, 224, 235),
            *(247, 248, 249),
        ],
    ),
}


def test_named_sets_are_the_published_ones() -> None:
    assert set(KEY_SETS) == set(PUBLISHED)
    for name, (evaluations, keys) in PUBLISHED.items():
        assert list(EncoderPropagation(keys=name).key_evaluations(evaluations)) == sorted(keys), name
    lengths = {name: len(keys) for name, (_, keys) in PUBLISHED.items()}
    assert (lengths["nonuniform-50"], lengths["pro"], lengths["if-100"], lengths["ldm-250"]) == (9, 11, 40, 48)
    paper = [75 - key for key in PUBLISHED["pro"][1]]
    assert paper == [75, 73, 70, 66, 61, 55, 48, 40, 31, 21, 10]


@pytest.mark.parametrize(
    ("steps", "truncated", "expected"),
    [
        (50, False, [0, 1, 2, 3, 5, 10, 15, 25, 35]),
        (50, True, [0, 1, 2, 3, 5, 10, 15, 25, 35]),
        (20, True, [0, 1, 2, 3, 5, 10, 15]),
        (25, True, [0, 1, 2, 3, 5, 10, 15]),
        (30, True, [0, 1, 2, 3, 5, 10, 15, 25]),
        (20, False, [0, 1, 2, 4, 6, 10, 14]),
        (100, False, [0, 2, 4, 6, 10, 20, 30, 50, 70]),
        (5, False, [0, 1, 2, 4]),
        (1, False, [0]),
    ],
)
def test_default_set_is_rescaled_or_cut(steps: int, truncated: bool, expected: list[int]) -> None:
    assert list(EncoderPropagation(official_truncate=truncated).key_evaluations(steps)) == expected


@given(st.sampled_from(list(KEY_SETS)), st.integers(1, 400), st.booleans())
@settings(deadline=None)
def test_any_set_fits_any_call(name: str, evaluations: int, truncated: bool) -> None:
    keys = EncoderPropagation(keys=name, official_truncate=truncated).key_evaluations(evaluations)
    assert keys[0] == 0
    assert keys == tuple(sorted(set(keys)))
    assert keys[-1] < evaluations


def test_other_ways_to_say_the_keys() -> None:
    every_third = (0, 3, 6, 9)
    assert EncoderPropagation(keys=3).key_evaluations(10) == every_third
    assert EncoderPropagation(keys="uniform-3").key_evaluations(10) == every_third
    assert EncoderPropagation(keys=[9, 0, 6, 3, 3]).key_evaluations(10) == every_third
    assert EncoderPropagation(keys=lambda n: range(0, n, 3)).key_evaluations(10) == every_third
    assert EncoderPropagation(keys=lambda n: np.arange(0, n, 3)).key_evaluations(10) == every_third
    assert EncoderPropagation(keys=1).is_neutral
    assert EncoderPropagation(keys="uniform-1").is_neutral
    assert not EncoderPropagation(keys=2).is_neutral


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"keys": (1, 5)}, r"keys are evaluation indices from 0, and 0 is one of them.*\(1, 5\)"),
        ({"keys": ()}, "0 is one of them"),
        ({"keys": (0, -1)}, "evaluation indices from 0"),
        ({"keys": (0, 1.5)}, "evaluation indices from 0"),
        ({"keys": (0, True)}, "evaluation indices from 0"),
        ({"keys": (0, math.nan)}, "evaluation indices from 0"),
        ({"keys": (0, "1")}, "evaluation indices from 0"),
        ({"keys": 0}, "keys is a number from 1"),
        ({"keys": -3}, "keys is a number from 1"),
        ({"keys": True}, "keys is a name, a number, a list or a function; got True"),
        ({"keys": 2.5}, "keys is a name, a number"),
        ({"keys": math.nan}, "keys is a name, a number"),
        ({"keys": None}, "keys is a name, a number"),
        ({"keys": "50ls"}, r"no set '50ls'; there are uniform-M, nonuniform-50, .*ldm-250"),
        ({"keys": "uniform-0"}, "no set 'uniform-0'"),
        ({"keys": "uniform-x"}, "no set 'uniform-x'"),
        ({"keys": "uniform--2"}, "no set"),
        ({"max_parallel": 0}, "max_parallel is a whole number from 1"),
        ({"max_parallel": 2.5}, "max_parallel is a whole number"),
        ({"max_parallel": True}, "max_parallel"),
        ({"max_parallel": math.nan}, "max_parallel.*nan"),
        ({"prior_noise": -0.1}, "prior_noise is a number from 0 to 1"),
        ({"prior_noise": math.nan}, "prior_noise.*nan"),
        ({"prior_noise": True}, "prior_noise"),
        ({"tau": 1.5}, "tau is a number from 0 to 1; got 1.5"),
        ({"tau": None}, "tau"),
        ({"inject": "after"}, "inject is 'before' or 'official-parallel'; got 'after'"),
        ({"parallel": 1}, "parallel is True or False; got 1"),
        ({"official_truncate": "yes"}, "official_truncate is True or False"),
        ({"encoder_share": 2}, "encoder_share is a number from 0 to 1"),
        ({"order": 4}, "order is a whole number from 0 to 3"),
    ],
)
def test_setting_out_of_range_is_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderPropagation(**given_)


def unet_request(evaluations: int | Grid) -> PlanRequest:
    return PlanRequest(view(small_unet()), request_of(1, evaluations).grid, lambda: pytest.fail("asked for costs"))


@pytest.mark.parametrize("keys", [(0, 5, 20), lambda evaluations: (0, evaluations)])
def test_keys_beyond_the_call_are_refused(keys: Any) -> None:
    with pytest.raises(ConfigError, match=r"names evaluation 20, but this call makes 20, 0 to 19"):
        EncoderPropagation(keys=keys).plan(unet_request(20))
    assert EncoderPropagation(keys=(0, 5, 20)).plan(unet_request(21)).evaluations == 21


@pytest.mark.parametrize("made", [(1, 2), (), (0, 1.5), (0, -1)])
def test_what_a_function_makes_is_checked(made: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="evaluation indices from 0"):
        EncoderPropagation(keys=lambda evaluations: made).plan(unet_request(9))


@pytest.mark.parametrize("solver", ["HeunDiscrete", "KDPM2Discrete"])
def test_a_list_is_refused_where_steps_are_evaluated_twice(solver: str) -> None:
    model = small_unet()
    with pytest.raises(ConfigError, match=r"this scheduler makes 23.*Give a named set, a number, or a function"):
        sample_loop(model, EncoderPropagation(keys=(0, 4)), scheduler=solver)
    for keys in ("nonuniform-50", 4, lambda evaluations: (0, evaluations // 2)):
        assert len(sample_loop(model, EncoderPropagation(keys=keys), scheduler=solver).predictions) == 23


def test_functions_cannot_be_saved_and_all_else_round_trips(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="function, which cannot be saved; give the list it makes"):
        EncoderPropagation(keys=lambda evaluations: (0,)).to_dict()
    for method in (
        EncoderPropagation(),
        EncoderPropagation(keys=(0, 4), parallel=False, max_parallel=3, prior_noise=0.01, tau=0.3),
        EncoderPropagation(keys="uniform-4", inject="official-parallel", official_truncate=True, encoder_share=0.5),
    ):
        assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    pipe = UNET_PIPELINES["DDIMPipeline"].build()
    fastdiff.enable(pipe, EncoderPropagation(keys=lambda evaluations: (0,)))
    with pytest.raises(ConfigError, match="cannot be saved"):
        pipe.save_pretrained(tmp_path)


def test_every_evaluation_a_key_is_the_plain_model() -> None:
    for solver in ("DDIM", "EulerAncestralDiscrete", "PNDM"):
        model = small_unet()
        method = EncoderPropagation(keys=1, prior_noise=0.0)
        assert torch.equal(
            sample_loop(model, method, scheduler=solver).latents, sample_loop(model, scheduler=solver).latents
        )


# -- prior noise -------------------------------------------------------------------------------------------------------


def injections(method: EncoderPropagation, steps: int = 50, **options: Any) -> np.ndarray:
    """Returns how much of the initial latents is added before each evaluation of a call whose keys are all of them.

    Read from what the model is given, with a model that predicts no noise, so that DDIM only scales the latents.
    """
    seen: list[torch.Tensor] = []

    def note(evaluation: int, call: dict[str, Any]) -> dict[str, Any]:
        seen.append(call["sample"].double())
        return call

    model = small_unet()
    torch.nn.init.zeros_(model.conv_out.weight)
    torch.nn.init.zeros_(model.conv_out.bias)
    sample_loop(model, method, steps=steps, guidance=False, before=note, **options)
    grid, alphas = _grid(steps)
    initial = seen[0]
    added = [0.0]
    for row in range(1, steps):
        carried = seen[row - 1] * math.sqrt(alphas[grid[row]] / alphas[grid[row - 1]])
        added.append(float(((seen[row] - carried) / initial).median()))
    return np.array(added)


def _grid(steps: int) -> tuple[list[int], np.ndarray]:
    scheduler = make_scheduler("DDIM")
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist(), scheduler.alphas_cumprod.double().numpy()


def test_prior_noise_is_added_before_each_evaluation_of_the_last_half() -> None:
    added = injections(EncoderPropagation(keys=1))
    assert np.flatnonzero(np.abs(added) > 1e-4).tolist() == list(range(25, 50))
    assert added[25:] == pytest.approx(0.003, rel=0.02)
    grid, alphas = _grid(50)
    last = alphas[grid[-1]]
    weight = sum(added[row] * math.sqrt(last / alphas[grid[row]]) for row in range(50))
    assert weight == pytest.approx(0.096, abs=0.004)


@pytest.mark.parametrize(
    ("options", "first"),
    [({"tau": 0.2}, 16), ({"tau": 1.0}, 0), ({"inject": "official-parallel"}, 11), ({"tau": 0.5}, 10)],
    ids=str,
)
def test_share_of_the_evaluations_with_prior_noise(options: dict[str, Any], first: int) -> None:
    """What is added after the encoder, the next evaluation is the first to see; the first has nothing added."""
    added = injections(EncoderPropagation(keys=1, **options), steps=20)
    assert np.flatnonzero(np.abs(added) > 1e-4).tolist() == list(range(max(first, 1), 20))


@pytest.mark.parametrize("off", [{"prior_noise": 0.0}, {"tau": 0.0}, {"prior_noise": 0}])
def test_no_prior_noise_is_exactly_none(off: dict[str, Any]) -> None:
    plain = sample_loop(small_unet(), EncoderPropagation(keys=1, **off)).latents
    assert torch.equal(plain, sample_loop(small_unet()).latents)
    assert not torch.equal(plain, sample_loop(small_unet(), EncoderPropagation(keys=1)).latents)


def test_modes_see_the_same_noise_and_the_official_one_another() -> None:
    model = small_unet()
    with one_sample_at_a_time():
        before = [
            sample_loop(model, EncoderPropagation(prior_noise=0.05, parallel=parallel), batch=2).latents
            for parallel in (False, True)
        ]
        official = sample_loop(model, EncoderPropagation(prior_noise=0.05, inject="official-parallel"), batch=2).latents
    assert torch.equal(*before)
    assert not torch.allclose(official, before[1], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("UNet2DConditionModel (SD)", True),
        ("UNet2DConditionModel (SDXL)", True),
        ("UNet2DModel (DDPM)", False),
        ("UNet2DConditionModel (IF)", False),
    ],
)
def test_default_noise_is_for_latents(name: str, expected: bool) -> None:
    backbone = view(TINY_UNETS[name].build())
    assert (EncoderPropagation().latent_edit(backbone) is not None) == expected
    assert EncoderPropagation(prior_noise=0.01).latent_edit(backbone) is not None
    assert EncoderPropagation(prior_noise=0).latent_edit(backbone) is None


def test_transformers_have_no_default_noise() -> None:
    backbone = view(TINY_MODELS["DiTTransformer2DModel"].build())
    assert EncoderPropagation().latent_edit(backbone) is None


# -- pipelines ---------------------------------------------------------------------------------------------------------


def run(pipe: DiffusionPipeline, name: str, **arguments: Any) -> torch.Tensor:
    return (TINY_PIPELINES | UNET_PIPELINES)[name].sample(pipe, **arguments)


@pytest.mark.parametrize("name", ["StableDiffusionControlNetPipeline", "StableDiffusionControlNetPipeline (multi)"])
@pytest.mark.parametrize("parallel", [True, False])
def test_controlnets_run_at_keys_only(name: str, parallel: bool) -> None:
    pipe = UNET_PIPELINES[name].build()
    nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    insides = [RowCounter(net.down_blocks[0].resnets[0].norm1) for net in nets]
    encoder = RowCounter(pipe.unet.down_blocks[0].resnets[0].norm1)
    decoder = RowCounter(pipe.unet.up_blocks[-1].resnets[-1].norm1)
    fastdiff.enable(pipe, EncoderPropagation(parallel=parallel))
    run(pipe, name, steps=20)
    assert [len(inside.rows) for inside in insides] == [7] * len(nets)
    assert encoder.rows == [2] * 7
    assert len(decoder.rows) == (7 if parallel else 20)
    assert sum(decoder.rows) == 40
    assert set(pipe.fastdiff.last_run.denoisers) == {"unet", "controlnet"}
    assert not pipe.fastdiff.last_run.denoisers["controlnet"].fallbacks


@pytest.mark.parametrize("name", ["StableDiffusionControlNetPipeline", "StableDiffusionControlNetPipeline (multi)"])
def test_controlled_pipeline_is_the_same_in_parallel(name: str) -> None:
    """Also where one of several ControlNets ends within a group of evaluations."""
    images = []
    for parallel in (False, True):
        pipe = UNET_PIPELINES[name].build()
        fastdiff.enable(pipe, EncoderPropagation(keys=4, parallel=parallel))
        with one_sample_at_a_time():
            images.append(run(pipe, name, steps=12))
            assert torch.equal(images[-1], run(pipe, name, steps=12))
            other = run(pipe, name, steps=12, seed=1)
        fresh = UNET_PIPELINES[name].build()
        fastdiff.enable(fresh, EncoderPropagation(keys=4, parallel=parallel))
        with one_sample_at_a_time():
            assert torch.equal(other, run(fresh, name, steps=12, seed=1))
    assert torch.equal(*images)


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiTPipeline", "PixArtAlphaPipeline"])
def test_transformers_run_their_first_blocks_at_keys_only(name: str) -> None:
    pipe = TINY_PIPELINES[name].build()
    blocks = [RowCounter(block.ff) for block in pipe.transformer.transformer_blocks]
    encoder = round(18 / 28 * len(blocks))
    results = []
    for parallel in (False, True):
        fastdiff.enable(pipe, EncoderPropagation(keys=4, parallel=parallel))
        for block in blocks:
            block.rows.clear()
        with one_sample_at_a_time():
            results.append(run(pipe, name, steps=12))
        rows = [block.rows for block in blocks]
        batch = rows[0][0]
        assert rows[:encoder] == [[batch] * 3] * encoder
        expected = [1, 3, 4, 4] if parallel else [1] * 12
        assert rows[encoder:] == [[batch * evaluations for evaluations in expected]] * (len(blocks) - encoder)
    assert torch.equal(*results)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_transformer_without_both_parts_is_refused(share: float) -> None:
    request = request_of(4, 12)
    with pytest.raises(ConfigError, match=r"cannot tell an encoder from a decoder.*4 units.*encoder_share"):
        EncoderPropagation(encoder_share=share).plan(request)


def test_encoder_share_says_which_blocks_are_reused() -> None:
    table = EncoderPropagation(encoder_share=0.5, keys=3).plan(request_of(6, 6)).table
    assert np.flatnonzero(table[1] == Action.REUSE).tolist() == [2]
    assert (table[[0, 3]] == Action.COMPUTE).all()


# -- settings without effect -------------------------------------------------------------------------------------------


def test_call_whose_evaluations_are_all_keys_warns() -> None:
    with pytest.warns(FastDiffNoEffectWarning, match=r"EncoderPropagation\(.*skipped nothing"):
        sample_loop(small_unet(), EncoderPropagation(), steps=2)
    model = small_unet()
    with counting(model, ["conv_in"], TINY_UNETS["UNet2DConditionModel (SD)"].inputs(1, 0)) as counted:
        sample_loop(model, EncoderPropagation(keys=1), steps=3)
    assert counted.table(["conv_in"]).tolist() == [[1]] * 3
