"""The numbers of a calibration's report, on data whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.cases import build
from torchmetrics.functional import spearman_corrcoef

from fastdiff import ComputePlan, UncertaintyExit
from fastdiff.eval.tasks import make_task
from fastdiff.methods import Method
from fastdiff.uem import Calibration, calibrate
from fastdiff.uem.calibration_report import _spread, as_markdown, rank_correlations, save
from tiny.uncertainty import random_modules


@pytest.fixture(scope="module")
def found() -> Calibration:
    pipe = build("DiTPipeline")
    method = UncertaintyExit.of(random_modules(pipe.transformer))
    settings: dict[str, Any] = {"num_samples": 6, "batch_size": 3, "num_inference_steps": 10, "bins": 3}
    task = make_task(pipe, class_labels=[0, 1, 2])
    return calibrate(pipe, method, 0.7, task=task, tolerance=0.03, frozen=True, progress=False, **settings)


# -- rank correlations -------------------------------------------------------------------------------------------------


def test_rank_correlations_are_spearmans() -> None:
    draw = np.random.default_rng(0)
    found = draw.normal(size=(4, 5, 7))
    true = np.round(found + draw.normal(size=found.shape), 0)  # with ties
    members = np.array([0, 0, 1, 1])
    numbers = rank_correlations(found, true, members)
    for number in (0, 1):
        samples, exits = [], []
        for row in np.flatnonzero(members == number):
            left, right = torch.tensor(found[row]), torch.tensor(true[row])
            samples.append(spearman_corrcoef(left.T, right.T).numpy())
            exits.append(spearman_corrcoef(left, right).mean())
        assert numbers["across_samples_by_bin_and_exit"][number] == pytest.approx(np.mean(samples, 0), abs=1e-5)
        assert numbers["across_exits_by_bin"][number] == pytest.approx(np.mean(exits), abs=1e-5)


def test_the_two_correlations_do_not_mix() -> None:
    exits, samples = np.arange(5.0)[:, None], np.arange(7.0)[None]
    members = np.zeros(3, int)
    # Certain of the same exits, and of the opposite samples.
    found = np.broadcast_to(10 * exits + samples, (3, 5, 7))
    numbers = rank_correlations(found, np.broadcast_to(10 * exits - samples, (3, 5, 7)), members)
    assert numbers["across_exits"] == 1
    assert numbers["across_samples"] == -1
    # What says the same of all samples knows nothing of them.
    blind = rank_correlations(np.broadcast_to(exits, (3, 5, 7)), np.broadcast_to(exits + samples, (3, 5, 7)), members)
    assert blind["across_exits"] == 1
    assert blind["across_samples"] == 0
    assert rank_correlations(found[:, :1], found[:, :1], members)["across_exits"] is None


# -- depths ------------------------------------------------------------------------------------------------------------


def test_the_spread_is_between_samples_at_one_evaluation() -> None:
    schedule = np.repeat([[2], [8]], 4, 1)
    assert _spread(schedule)["between_samples"] == 0
    assert _spread(schedule)["std"] == 0
    mixed = np.array([[2, 2, 8, 8], [8, 8, 2, 2]])
    assert _spread(mixed) == {"mean": 5, "std": 3, "quartiles": [2, 5, 8], "between_samples": 1}
    assert _spread(np.full((2, 3), 4))["between_samples"] is None


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_hold_what_was_found(found: Calibration, tmp_path: Path) -> None:
    numbers = save(found, tmp_path, "fastdiff calibrate somewhere")
    assert json.loads((tmp_path / "calibration.json").read_text()) == numbers
    assert numbers["calibration"]["share"] == found.share
    assert numbers["tried"][-1] == {"level": found.level, "share": found.share}
    depths = found.held_out["dynamic"].depths
    assert [row["mean"] for row in numbers["depth_by_evaluation"]] == pytest.approx(depths.mean(1))
    assert numbers["depth"]["mean"] == pytest.approx(depths.mean())
    images = {name: run.images for name, run in found.held_out.items()}
    for name in ("dynamic", "frozen"):
        error = np.square(images[name] - images["full"]).mean()
        assert numbers["held_out"][name]["psnr"]["value"] == pytest.approx(-10 * np.log10(error), abs=1e-4)
        assert numbers["held_out"][name]["psnr"]["margin"] > 0
    method = Method.from_dict(json.loads((tmp_path / "uncertainty_exit.json").read_text())).located(tmp_path)
    assert isinstance(method, UncertaintyExit)
    assert method.thresholds == found.method.thresholds
    for name, value in found.method.modules().state_dict().items():
        assert torch.equal(value, method.modules().state_dict()[name])
    assert ComputePlan.load(tmp_path / "frozen_plan.json") == found.frozen_plan


def test_the_text_has_a_line_for_every_bin_and_way(found: Calibration, tmp_path: Path) -> None:
    numbers = save(found, tmp_path)
    text = as_markdown(numbers, "fastdiff calibrate somewhere")
    for edge, depth in zip(numbers["bin_edges"], numbers["depth_by_bin"], strict=True):
        assert f"| {edge:g} | {depth['mean']:.2f} | {depth['std']:.2f} |" in text
    for name, cost in numbers["held_out"].items():
        assert f"| held out, {name} | {cost['share']:.2%} |" in text
    assert "    fastdiff calibrate somewhere\n" in text
