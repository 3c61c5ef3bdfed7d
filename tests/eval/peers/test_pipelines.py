"""Peers on pipelines: they change images, leave no trace, keep nothing, and say why where they cannot."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.models.attention import BasicTransformerBlock

import fastdiff
from fastdiff.errors import FastDiffError
from fastdiff.eval.peers import MagCache, Peer, PeerUnavailableError, default_peers, names, parse_peer
from tiny.pipelines import TINY_PIPELINES

from .conftest import STEPS, load, sample

Plain = dict[str, tuple[DiffusionPipeline, np.ndarray]]

RUNNING = [
    ("glyphs-dit", "cache-dit:front=1,warmup=2,threshold=1"),
    ("glyphs-dit", "cache-dit-taylorseer:front=1,warmup=2,threshold=1"),
    ("glyphs-dit", "first-block-cache:threshold=0.3"),
    ("glyphs-dit", "mag-cache:threshold=1"),
    ("glyphs-dit", "pyramid-attention-broadcast"),
    ("glyphs-dit", "faster-cache:guidance-interval=2"),
    ("glyphs-dit", "faster-cache:guidance-interval=none"),
    ("glyphs-dit", "taylorseer:interval=3,warmup=2,modules=.*blocks.[0-9]+"),
    ("glyphs-dit", "tomesd:max-downsample=2,random=false"),
    ("glyphs-sd", "deepcache:interval=2"),
    ("glyphs-sd", "freeu"),
    ("glyphs-sd", "pyramid-attention-broadcast:cross-interval=2"),
    ("glyphs-sd", "taylorseer:interval=2,warmup=2,modules=.*transformer_blocks.[0-9]+"),
    ("glyphs-sd", "tomesd:random=false"),
    ("glyphs-ddpm", "deepcache:interval=2"),
    ("glyphs-ddpm", "pyramid-attention-broadcast"),
    ("glyphs-ddpm", "taylorseer:interval=2,warmup=2,modules=.*resnets.[0-9]+"),
]
running = pytest.mark.parametrize(("model", "spec"), RUNNING, ids=[" ".join(case) for case in RUNNING])


def peer_for(spec: str, pipe: DiffusionPipeline, steps: int = STEPS) -> Peer:
    peer = parse_peer(spec)
    pytest.importorskip(peer.module)
    return peer.prepared(pipe, steps, lambda: sample(pipe, steps))


@running
def test_images_change_and_come_back(model: str, spec: str, plain: Plain) -> None:
    pipe, images = plain[model]
    peer = peer_for(spec, pipe)
    with peer.applied(pipe, STEPS):
        accelerated = sample(pipe)
    assert np.isfinite(accelerated).all()
    assert not np.array_equal(accelerated, images)
    assert np.array_equal(sample(pipe), images)


@running
def test_nothing_is_kept_from_another_call(model: str, spec: str, plain: Plain) -> None:
    pipe, _ = plain[model]

    def accelerated(on: DiffusionPipeline, steps: int, batch: int) -> np.ndarray:
        with peer_for(spec, on, steps).applied(on, steps):
            return sample(on, steps, batch)

    first = accelerated(pipe, STEPS, 2)
    accelerated(pipe, STEPS + 3, 1)
    assert np.array_equal(accelerated(pipe, STEPS, 2), first)
    assert np.array_equal(accelerated(load(model), STEPS, 2), first)


@running
def test_an_interrupted_call_is_undone(model: str, spec: str, plain: Plain) -> None:
    pipe, images = plain[model]
    peer = peer_for(spec, pipe)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = denoiser.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), peer.applied(pipe, STEPS):
            sample(pipe)
    finally:
        handle.remove()
    assert np.array_equal(sample(pipe), images)


@pytest.mark.parametrize(
    ("model", "spec", "reason"),
    [
        ("glyphs-dit", "deepcache", "made for UNets; DiTPipeline has a DiTTransformer2DModel"),
        ("glyphs-dit", "freeu", "made for UNets"),
        ("glyphs-dit", "taylorseer", "whose names begin with blocks, end in attn"),
        ("glyphs-dit", "mag-cache", "must be calibrated on the pipeline"),
        ("glyphs-sd", "cache-dit", "UNet2DConditionModel has stages of several shapes"),
        ("glyphs-sd", "first-block-cache", "lists by the usual names of transformers"),
        ("glyphs-sd", "mag-cache:ratios=[1]", "UNet2DConditionModel has none"),
        ("glyphs-sd", "faster-cache", "UNet2DConditionModel has none"),
        ("glyphs-sd", "taylorseer:modules=nothing", "match nothing; UNet2DConditionModel has none"),
        ("glyphs-ddpm", "freeu", "UNet2DModel has no enable_freeu"),
        ("glyphs-ddpm", "tomesd", "BasicTransformerBlock; UNet2DModel has none"),
    ],
)
def test_what_cannot_run_says_why(model: str, spec: str, reason: str, plain: Plain) -> None:
    pipe, images = plain[model]
    peer = parse_peer(spec)
    pytest.importorskip(peer.module)
    with pytest.raises(PeerUnavailableError, match=reason):
        peer.apply(pipe, STEPS)
    assert np.array_equal(sample(pipe), images)


@pytest.mark.parametrize("name", names())
def test_a_missing_package_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch, plain: Plain) -> None:
    pipe, _ = plain["glyphs-sd"]
    peer = parse_peer(name)
    monkeypatch.setitem(sys.modules, peer.module, None)
    with pytest.raises(PeerUnavailableError, match=f"pip install {peer.distribution}"):
        peer.apply(pipe, STEPS)
    assert issubclass(PeerUnavailableError, FastDiffError)


def test_a_package_that_breaks_when_imported_says_so(monkeypatch: pytest.MonkeyPatch, plain: Plain) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(PeerUnavailableError, match="cannot be imported here: RuntimeError: operator does not exist"):
        parse_peer("tomesd").apply(plain["glyphs-sd"][0], STEPS)


def test_a_peer_does_not_mix_with_fastdiff() -> None:
    pipe = load("glyphs-ddpm")
    fastdiff.enable(pipe, fastdiff.FeatureInheritance(interval=2))
    with pytest.raises(PeerUnavailableError, match=r"fastdiff\.disable"):
        parse_peer("pyramid-attention-broadcast").apply(pipe, STEPS)
    fastdiff.disable(pipe)
    with parse_peer("pyramid-attention-broadcast").applied(pipe, STEPS):
        pass


def test_a_refusal_half_way_leaves_nothing(plain: Plain) -> None:
    class Unknown(BasicTransformerBlock):
        pass

    pipe, images = plain["glyphs-dit"]
    block = pipe.transformer.transformer_blocks[5]
    block.__class__ = Unknown
    try:
        with pytest.raises(PeerUnavailableError, match=r"diffusers .* refuses DiTPipeline with ValueError"):
            parse_peer("first-block-cache").apply(pipe, STEPS)
    finally:
        block.__class__ = BasicTransformerBlock
    assert np.array_equal(sample(pipe), images)


def test_hooks_come_off_modules_that_had_a_registry_before() -> None:
    pipe = load("glyphs-dit")
    images = sample(pipe)
    for block in pipe.transformer.transformer_blocks:
        HookRegistry.check_if_exists_or_initialize(block)
    for _ in range(2):
        with parse_peer("first-block-cache:threshold=0.3").applied(pipe, STEPS):
            assert not np.array_equal(sample(pipe), images)
        assert np.array_equal(sample(pipe), images)


def test_a_setting_without_effect_leaves_the_images_equal(plain: Plain) -> None:
    pipe, images = plain["glyphs-dit"]
    with parse_peer("first-block-cache:threshold=0").applied(pipe, STEPS):
        assert np.array_equal(sample(pipe), images)


@pytest.mark.parametrize(("warmup", "engaged"), [(1, True), (STEPS, False)])
def test_cache_dit_tells_whether_it_did_anything(warmup: int, engaged: bool, plain: Plain) -> None:
    pipe, images = plain["glyphs-dit"]
    peer = peer_for(f"cache-dit:front=1,threshold=1,warmup={warmup}", pipe)
    with peer.applied(pipe, STEPS):
        assert np.array_equal(sample(pipe), images) != engaged
        assert peer.engaged(pipe) is engaged


def test_two_pipelines_of_a_class_are_refused_where_the_package_cannot_tell_them_apart(plain: Plain) -> None:
    pipe, _ = plain["glyphs-dit"]
    peer = peer_for("cache-dit", pipe)
    other = load("glyphs-dit")
    with peer.applied(pipe, STEPS), pytest.raises(PeerUnavailableError, match="keeps that on the class"):
        peer.apply(other, STEPS)


def test_undoing_tells_what_the_package_left_behind(plain: Plain) -> None:
    pipe, _ = plain["glyphs-dit"]
    undo = parse_peer("pyramid-attention-broadcast").apply(pipe, STEPS)
    assert set(undo()) == {"_diffusers_hook", "forward"}
    undo = parse_peer("pyramid-attention-broadcast").apply(pipe, STEPS)
    undo()


def test_every_peer_has_settings_for_every_pipeline(plain: Plain) -> None:
    for pipe, _ in plain.values():
        assert {peer.name for peer in default_peers(pipe)} == set(names())


# -- the caches of diffusers -------------------------------------------------------------------------------------------


def test_calibration_measures_the_ratios_and_changes_nothing(plain: Plain) -> None:
    pipe, images = plain["glyphs-dit"]
    calls = []
    peer = MagCache().prepared(pipe, STEPS, lambda: calls.append(sample(pipe)))
    assert isinstance(peer, MagCache)
    assert len(peer.ratios) == STEPS
    assert peer.ratios[0] == 1
    assert len(set(peer.ratios)) > 2
    assert peer == MagCache(ratios=peer.ratios)
    assert np.array_equal(calls[0], images)


def test_a_cache_is_applied_anew_for_every_call(plain: Plain) -> None:
    pipe, _ = plain["glyphs-dit"]
    with parse_peer("first-block-cache").applied(pipe, STEPS):
        sample(pipe)
        with pytest.raises(PeerUnavailableError, match="not applied anew"):
            sample(pipe)


def test_branches_without_a_name_are_refused() -> None:
    tiny = TINY_PIPELINES["Lumina2Pipeline"]  # the two branches of guidance are two calls, and none is named
    pipe = tiny.build()
    images = tiny.sample(pipe)
    with parse_peer("pyramid-attention-broadcast").applied(pipe, 4), pytest.raises(PeerUnavailableError):
        tiny.sample(pipe)
    assert torch.equal(tiny.sample(pipe), images)


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxImg2ImgPipeline", "WanPipeline", "WanPipeline (two experts)"])
def test_models_with_the_cache_interface_are_enabled_by_it(name: str) -> None:
    # FluxImg2Img opens no context, Wan one for each branch.
    tiny = TINY_PIPELINES[name]
    pipe = tiny.build()
    plain = tiny.sample(pipe, steps=6)
    denoisers = [getattr(pipe, name) for name in tiny.denoisers]
    with parse_peer("first-block-cache:threshold=10").applied(pipe, 6):
        assert all(denoiser.is_cache_enabled for denoiser in denoisers)
        accelerated = tiny.sample(pipe, steps=6)
    assert not any(denoiser.is_cache_enabled for denoiser in denoisers)
    assert not torch.equal(accelerated, plain)
    assert torch.equal(tiny.sample(pipe, steps=6), plain)


def test_ranges_of_timesteps_are_training_timesteps_where_the_denoiser_takes_another_unit() -> None:
    tiny = TINY_PIPELINES["FluxPipeline"]
    pipe = tiny.build()
    plain = tiny.sample(pipe, steps=6)
    for inside in (False, True):
        timesteps = "[1,1001]" if inside else "[-1,1]"
        with parse_peer(f"pyramid-attention-broadcast:timesteps={timesteps}").applied(pipe, 6):
            assert torch.equal(tiny.sample(pipe, steps=6), plain) != inside
