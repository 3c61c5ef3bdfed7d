"""The published UNets at their full size: what their parts cost, and that plans are priced by what runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
import unet_latency
import unet_macs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import EncoderPropagation, FeatureInheritance
from fastdiff.backbones import Backbone, view
from fastdiff.cost import UnitCosts, measure, price
from fastdiff.methods import Method

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
MODELS = pytest.mark.parametrize("key", [*architectures.TITLES])
STEPS = 8


@pytest.fixture(scope="module")
def full_size() -> dict[str, tuple[Backbone, UnitCosts]]:
    backbones = {key: view(architectures.unet(key, device="meta")) for key in architectures.TITLES}
    return {key: (backbone, unet_macs.costs_of(backbone)) for key, backbone in backbones.items()}


@pytest.mark.parametrize(("key", "parameters"), [("sd-1.5", 859_520_964), ("sdxl-1.0", 2_567_463_684)])
def test_the_unets_have_the_published_number_of_weights(
    key: str, parameters: int, full_size: dict[str, tuple[Backbone, UnitCosts]]
) -> None:
    assert sum(weight.numel() for weight in full_size[key][0].denoiser.parameters()) == parameters


@pytest.mark.parametrize(("key", "giga_macs", "encoder"), [("sd-1.5", 401.6, 0.325), ("sdxl-1.0", 3380.6, 0.434)])
def test_macs_and_the_encoders_share(
    key: str, giga_macs: float, encoder: float, full_size: dict[str, tuple[Backbone, UnitCosts]]
) -> None:
    backbone, costs = full_size[key]
    assert costs.total_macs / 1e9 == pytest.approx(giga_macs, abs=0.05)
    assert unet_macs.encoder_share(backbone, costs) == pytest.approx(encoder, abs=0.005)
    assert costs.fixed_macs < 1e-3 * costs.total_macs


@MODELS
def test_attention_is_counted(key: str, full_size: dict[str, tuple[Backbone, UnitCosts]]) -> None:
    backbone, costs = full_size[key]
    attention = sum(
        _attention_macs(unit.module, backbone.denoiser.config.sample_size, unit.name, len(levels))
        for levels in [backbone.denoiser.config.block_out_channels]
        for unit in backbone.units
        if ".attentions." in unit.name
    )
    assert {"sd-1.5": 0.16, "sdxl-1.0": 0.12}[key] == pytest.approx(attention / costs.total_macs, abs=0.005)


def _attention_macs(transformer: Any, size: int, name: str, levels: int) -> float:
    """By hand: two products of queries, keys and values for each of self- and cross-attention."""
    stage = name.split(".")
    halvings = levels - 1 if stage[0] == "mid_block" else int(stage[1])
    tokens = (size // 2 ** (levels - 1 - halvings if stage[0] == "up_blocks" else halvings)) ** 2
    width = transformer.transformer_blocks[0].attn1.to_q.out_features
    blocks = len(transformer.transformer_blocks)
    return float(2 * blocks * tokens * (tokens + architectures.TEXT_TOKENS) * width)


@pytest.mark.parametrize(
    ("key", "steps", "saved"), [("sd-1.5", 50, 0.267), ("sd-1.5", 20, 0.212), ("sdxl-1.0", 50, 0.356)]
)
def test_encoder_propagation_saves_what_its_paper_says(
    key: str, steps: int, saved: float, full_size: dict[str, tuple[Backbone, UnitCosts]]
) -> None:
    backbone, costs = full_size[key]
    plan = unet_macs.planned(backbone, costs, unet_macs.Setting("", EncoderPropagation(), steps))
    assert 1 - price(plan, costs).macs_share == pytest.approx(saved, abs=0.001)
    keys = len(EncoderPropagation().key_evaluations(steps))
    assert keys == {50: 9, 20: 7}[steps]
    encoder = unet_macs.encoder_share(backbone, costs)
    assert 1 - price(plan, costs).macs_share == pytest.approx(encoder * (steps - keys) / steps)


# -- predicted and counted ---------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize(
    "method",
    [
        EncoderPropagation(4, parallel=False),
        EncoderPropagation(4),
        EncoderPropagation(4, max_parallel=3),
        FeatureInheritance.deepcache(3),
        FeatureInheritance(2, order=2),
    ],
    ids=str,
)
def test_predicted_macs_are_those_that_a_sampling_loop_spends(key: str, method: Method) -> None:
    denoiser = architectures.unet(key, small=True)
    evaluation = {"sample": architectures.sample(denoiser, 2), "timestep": torch.tensor(999)}
    costs = measure(view(denoiser, method.view_level), evaluation | architectures.conditions(denoiser, 2), repeats=1)

    # Fused attention on the CPU has no formula in torch's counter; taken apart, it is two products of matrices.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        record = unet_latency.sampling(denoiser, batch=1, steps=STEPS, method=method)(0)
    counted = counter.get_total_flops() / 2

    (plan,) = record.plans
    assert plan.cost(costs).macs == pytest.approx(counted, rel=0.01)
    assert record.macs_share == pytest.approx(plan.cost(costs).macs_share)
    assert 0.2 < record.macs_share < 0.95
    assert bool(record.batches) == (isinstance(method, EncoderPropagation) and method.parallel)


# -- the committed tables ----------------------------------------------------------------------------------------------


def test_the_committed_macs_are_what_the_script_counts(full_size: dict[str, tuple[Backbone, UnitCosts]]) -> None:
    committed = json.loads((RESULTS / "unet_macs.json").read_text())["architectures"]
    assert [result["model"] for result in committed] == [*architectures.TITLES.values()]
    for result, (backbone, costs) in zip(committed, full_size.values(), strict=True):
        assert result["macs_per_evaluation"] == costs.total_macs
        shares = [
            unet_macs.planned(backbone, costs, setting).cost(costs).macs_share for setting in unet_macs.settings()
        ]
        assert [row["macs_share"] for row in result["rows"]] == pytest.approx(shares)
    assert (RESULTS / "unet_macs.md").read_text() == unet_macs.as_table(committed) + "\n"


def test_the_committed_latencies_are_written_by_the_script() -> None:
    committed = json.loads((RESULTS / "unet_latency.json").read_text())
    assert (RESULTS / "unet_latency.md").read_text() == unet_latency.as_table(committed) + "\n"
    assert {row["method"] for row in committed["rows"]} == set(unet_latency.METHODS)
    assert not committed["settings"]["small"]


# -- the latency benchmark ---------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["unet_latency.py", "--out", str(out), *map(str, words)])
    unet_latency.main()
    return json.loads(out.read_text())


def test_latency_is_measured_with_small_models_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latency.json"
    words = ["--small", "--device", "cpu", "--dtype", "float32", "--steps", 6, "--rounds", 2, "--model", "sd-1.5"]
    one = run(monkeypatch, out, *words, "--batch", 1)
    assert [row["method"] for row in one["rows"]] == [*unet_latency.METHODS]
    full, sequential, parallel, _ = one["rows"]
    assert [len(row["seconds"]) for row in one["rows"]] == [2] * 4
    for row in one["rows"]:
        ratios = np.divide(full["seconds"], row["seconds"])
        assert row["speedup"]["median"] == pytest.approx(np.median(ratios))
    assert parallel["batches"]
    assert not sequential["batches"]

    # What is there already is kept, what is new is added.
    more = run(monkeypatch, out, *words, "--batch", 1, 2)
    assert more["rows"][:4] == one["rows"]
    assert [row["batch"] for row in more["rows"]] == [1] * 4 + [2] * 4
    assert one["environment"]["processor"] in out.with_suffix(".md").read_text()
    assert unet_latency.NOT_MEASURED not in capsys.readouterr().out


def test_without_a_device_the_table_says_that_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "latency.json"
    results = run(monkeypatch, out, "--model", "sd-1.5", "--dtype", "float16")
    assert all(row["seconds"] is None for row in results["rows"])
    table = out.with_suffix(".md").read_text()
    assert table.count(unet_latency.NOT_MEASURED) == len(results["rows"]) == 2 * len(unet_latency.METHODS)
