"""Ways of sampling as text."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.errors import ConfigError
from fastdiff.eval.ways import MAIN, Way, expand, merge, parse_ways, plain
from fastdiff.methods import EncoderPropagation, ExitSchedule, FeatureInheritance, LayerSkipping, SkipTuning
from fastdiff.pipelines.acceleration import PRESETS
from fastdiff.plan import ComputePlan
from tiny.pipelines import TINY_PIPELINES


def one(spec: str, steps: int = 50, **options: object) -> Way:
    (way,) = parse_ways([spec], steps, **options)  # type: ignore[arg-type]
    return way


# -- one way -----------------------------------------------------------------------------------------------------------


def test_fewer_steps() -> None:
    way = one("steps:25")
    assert (way.num_inference_steps, way.methods, way.peer, way.is_plain) == (25, (), None, True)
    assert (way.key, way.label, way.group) == ("steps-25", "25 steps", "fewer-steps")


def test_a_method_takes_the_steps_of_full_sampling() -> None:
    way = one("encoder-propagation:keys=3")
    assert way.num_inference_steps == 50
    assert way.methods == (EncoderPropagation(3),)
    assert way.key == "steps-50+encoder-propagation-keys=3"
    assert (way.label, way.group) == ("encoder-propagation keys=3", "encoder-propagation")


def test_several_together() -> None:
    way = one("skip-tuning:rho=0.8 + layer-skipping:speedup=1.5 + steps:10")
    assert way.num_inference_steps == 10
    assert way.methods == (SkipTuning(rho=0.8), LayerSkipping(speedup=1.5))
    assert (way.label, way.group) == (
        "skip-tuning rho=0.8 + layer-skipping speedup=1.5 + 10 steps",
        "skip-tuning + layer-skipping",
    )


def test_exponents_are_no_plus_between_parts() -> None:
    assert one("skip-tuning:rho=1e+0+steps:3").methods == (SkipTuning(rho=1.0),)


def test_presets() -> None:
    assert one("preset:fast").methods == PRESETS["fast"]
    assert one("preset:off").is_plain


def test_kernels() -> None:
    way = one("kernels")
    assert (way.kernels, way.methods, way.is_plain) == ("auto", (), False)
    assert (way.key, way.label, way.group) == ("steps-50+kernels-auto", "kernels", "kernels")
    both = one("encoder-propagation:keys=3 + kernels:torch + steps:10")
    assert (both.num_inference_steps, both.methods, both.kernels) == (10, (EncoderPropagation(3),), "torch")
    assert both.label == "encoder-propagation keys=3 + 10 steps + kernels torch"
    assert parse_ways([both.spec], 50) == (both,)
    with pytest.raises(ConfigError, match="auto, triton, torch"):
        one("kernels:fast")
    with pytest.raises(ConfigError, match="kernels once"):
        one("kernels+kernels:torch")


@pytest.mark.parametrize("mode", [None, "explain"])
def test_kernels_are_on_a_pipeline_while_it_samples(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode is None:
        monkeypatch.delenv("FASTDIFF_KERNELS", raising=False)
    else:
        monkeypatch.setenv("FASTDIFF_KERNELS", mode)
    tiny = TINY_PIPELINES["DiTPipeline"]
    pipe = tiny.build()

    def latents(way: Way) -> torch.Tensor:
        torch.manual_seed(0)
        with way.applied(pipe):
            return torch.as_tensor(pipe(**tiny.inputs(), return_dict=False)[0])

    plain, same, other = (latents(one(spec)) for spec in ("steps:4", "kernels", "kernels:torch"))
    assert torch.equal(plain, same)  # no kernel runs on a CPU
    assert not torch.equal(plain, other)
    torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-4)
    assert os.environ.get("FASTDIFF_KERNELS") == mode
    assert fastdiff.restore(pipe) == 0


def test_a_saved_plan(tmp_path: Path) -> None:
    paths = [ComputePlan.full(rows, ["a", "b"]).save(tmp_path / f"{rows}.json") for rows in (3, 4)]
    ways = [one(f"plan:{path}") for path in paths]
    assert len({way.key for way in ways}) == 2
    assert str(tmp_path) not in "".join(way.key for way in ways)


def test_an_exit_schedule_by_its_least_depth() -> None:
    assert one("exit-schedule:d-min=4", units=14).methods == (ExitSchedule.linear(14, 4),)
    assert one("exit-schedule:d_min=4,full=28").methods == (ExitSchedule.linear(28, 4),)
    assert one("exit-schedule:t-switch=500,d-low=4,full=28").methods == (ExitSchedule.step(28, 500, 4),)
    with pytest.raises(ConfigError, match="full=NUMBER"):
        one("exit-schedule:d-min=4")


def test_deep_features_of_a_unet() -> None:
    assert one("feature-inheritance:interval=3,branch=0").methods == (FeatureInheritance.deepcache(3),)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nonsense:x=1", "no way of sampling 'nonsense'.*encoder-propagation"),
        ("steps:0", "whole number from 1"),
        ("steps:many", "whole number from 1"),
        ("steps:2+steps:3", "One number of steps"),
        ("preset:warp", "no preset 'warp'"),
        ("encoder-propagation:kees=3", "no field 'kees'"),
        ("exit-schedule:d-min=40,full=28", "one depth"),
        ("exit-schedule:d-min=few,full=28", "numbers for full, d-min"),
        ("exit-schedule:d-min=4,full=28,odd=1", "numbers for full, d-min"),
        ("", "no way of sampling ''"),
    ],
)
def test_what_cannot_be_read_is_a_typed_error(spec: str, says: str) -> None:
    pytest.importorskip("fastdiff.eval.peers")
    with pytest.raises(ConfigError, match=says):
        one(spec)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_are_counted(steps: object) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        Way(steps)  # type: ignore[arg-type]


# -- several ways ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expanded"),
    [
        ("a", ["a"]),
        ("a:b=4..6", ["a:b=4", "a:b=5", "a:b=6"]),
        ("a:b=4..9..2,c=1", ["a:b=4,c=1", "a:b=6,c=1", "a:b=8,c=1"]),
        ("a:b=-1..1", ["a:b=-1", "a:b=0", "a:b=1"]),
        ("a:b=0.7..0.9..0.1", ["a:b=0.7", "a:b=0.8", "a:b=0.9"]),
        ("a:b={2,3}+steps:10..20..10", [f"a:b={b}+steps:{s}" for b in (2, 3) for s in (10, 20)]),
        ("a:b={[0,5],[0,9]}", ["a:b=[0,5]", "a:b=[0,9]"]),
        ('a:b="{1,2}"', ['a:b="{1,2}"']),
        ("plan:../x.json", ["plan:../x.json"]),
        ("preset:{quality,fast}", ["preset:quality", "preset:fast"]),
    ],
)
def test_ranges_and_lists(spec: str, expanded: list[str]) -> None:
    assert expand(spec) == expanded


@pytest.mark.parametrize(
    "spec",
    ["a:b=9..4", "a:b=1..2..0", "a:b=0.5..0.9", "a:b={}", "a:b={1,,2}", "a:b=0..9999999999", "a:b=1..99,c=1..99"],
)
def test_what_makes_no_ways_or_too_many_is_a_typed_error(spec: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(spec)):
        expand(spec)


def test_equal_ways_are_merged_and_the_first_keeps_its_name() -> None:
    preset = "feature-inheritance:interval=3,order=2,min-evaluations=9"
    ways = parse_ways(["preset:balanced", "steps:5", preset, "steps:5", "layer-skipping:speedup={2,2.0}"], 20)
    assert [way.label for way in ways] == ["preset balanced", "5 steps", "layer-skipping speedup=2"]


def test_ways_of_different_pipelines_are_different() -> None:
    ways = merge([plain(5), plain(5, model="tuned"), plain(5, is_baseline=True)])
    assert [way.key for way in ways] == ["steps-5", "tuned+steps-5"]
    assert ways[1].baseline(20) == plain(20, model="tuned")
    assert ways[0].model == MAIN


# -- keys --------------------------------------------------------------------------------------------------------------

MANY = ["exit-schedule:d-min=1..14", "feature-inheritance:interval=2..9,order={0,1,2}", "steps:1..50", "skip-tuning"]
MANY += ['exit-schedule:preset=full,heads="/a/B"', "exit-schedule:preset=full,heads=/a/b", "skip-tuning:rho={0.5,0.55}"]


def test_keys_name_files_and_differ() -> None:
    ways = parse_ways(MANY, 50, units=14)
    assert len(ways) == 14 + 24 + 50 + 1 + 2 + 2
    assert len({way.key.lower() for way in ways}) == len(ways)
    assert all(re.fullmatch(r"[a-z0-9.,=+-]{1,100}", way.key) for way in ways)


def test_keys_are_the_same_in_another_process() -> None:
    script = (
        "import json, sys; from fastdiff.eval.ways import parse_ways\n"
        "print(json.dumps([way.key for way in parse_ways(json.loads(sys.argv[1]), 50, units=14)]))"
    )
    run = subprocess.run([sys.executable, "-c", script, json.dumps(MANY)], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [way.key for way in parse_ways(MANY, 50, units=14)]


def test_the_name_for_a_person_is_not_in_the_key() -> None:
    way = plain(5)
    assert dataclasses.replace(way, label="five", group="few").key == way.key
    assert dataclasses.replace(way, label="five") == way


# -- at work -----------------------------------------------------------------------------------------------------------


def test_a_pipeline_samples_this_way_and_then_plainly_again() -> None:
    entry = TINY_PIPELINES["DiTPipeline"]
    pipe = entry.build()
    before = entry.sample(pipe, steps=6)
    with one("feature-inheritance:interval=2", 6).applied(pipe):
        accelerated = entry.sample(pipe, steps=6)
        assert pipe.fastdiff.last_run.skipped
    assert not fastdiff.is_enabled(pipe)
    assert not torch.equal(before, accelerated)
    assert torch.equal(before, entry.sample(pipe, steps=6))
    with pytest.raises(RuntimeError), one("layer-skipping", 6).applied(pipe):
        raise RuntimeError
    assert not fastdiff.is_enabled(pipe)
