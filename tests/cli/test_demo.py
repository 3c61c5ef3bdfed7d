"""The demo: an evaluation in which everything is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdiff.cli.demo import TRANSFORMER_WAYS, TUNED_WAY, UNET_WAYS
from fastdiff.cli.main import main
from fastdiff.eval.ways import parse_ways

from .conftest import Command

STEPS = 9
SIZES = ("--num-samples", 4, "--batch-size", 4, "--num-inference-steps", STEPS)


def points(folder: Path) -> dict[str, dict[str, Any]]:
    results = json.loads((folder / "results.json").read_text())
    return {point["key"]: point for point in results["points"]}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo writes about the model that it is for, with little of everything."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main([str(word) for word in ("demo", *SIZES, "--seed", 3, "--out", folder)]) == 0
    return folder


def test_every_way_of_the_shipped_model_is_measured(shipped: Path) -> None:
    rows = points(shipped)
    ways = [*parse_ways(TRANSFORMER_WAYS, STEPS), *parse_ways([TUNED_WAY.partition("@")[2]], STEPS, model="tuned")]
    assert {way.key for way in ways} <= set(rows)
    assert all(point["error"] is None and point["quality"] and point["timings"] for point in rows.values())
    assert {point["num_inference_steps"] for point in rows.values() if point["plain"]} >= {2, 3, 4, STEPS}


def test_only_the_report_is_left(shipped: Path) -> None:
    assert [path.name for path in shipped.parent.iterdir()] == ["out"]
    assert {path.name for path in shipped.iterdir()} >= {"report.html", "results.csv", "results.md", "samples.png"}
    assert not (shipped / "sweeps").exists()


def test_the_settings_are_those_that_were_given(shipped: Path) -> None:
    results = json.loads((shipped / "results.json").read_text())
    assert (results["num_samples"], results["seeds"], results["timing_batch"]) == (4, [3], 2)
    assert results["model"] == "zoo:glyphs-dit"
    assert results["copies"] == {"tuned": "zoo:glyphs-dit-ase"}
    assert results["asked"] == "guidance 4"


def test_another_demo_takes_the_place_of_the_first(tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    for seed in (0, 1):
        status, shown, _ = command("demo", "--model", tiny_dit, *SIZES, "--seed", seed, "--out", tmp_path / "out")
        assert status == 0
    assert "With nothing but the default preset, sampling took" in shown
    assert f"Open {tmp_path / 'out' / 'report.html'}" in shown
    assert json.loads((tmp_path / "out/results.json").read_text())["seeds"] == [1]
    assert not any(key.startswith("tuned") for key in points(tmp_path / "out"))


@pytest.mark.parametrize("model", ["tiny_sd", pytest.param("tiny_ddpm", marks=pytest.mark.slow)])
def test_every_way_of_a_unet_is_measured(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    words = ("demo", "--model", request.getfixturevalue(model), *SIZES, "--out", tmp_path / "out")
    assert main([str(word) for word in words]) == 0
    rows = points(tmp_path / "out")
    for way in parse_ways(UNET_WAYS, STEPS):
        assert rows[way.key]["error"] is None
        assert 0.2 < rows[way.key]["macs_share"] < 1


def test_an_interrupt_leaves_nothing(
    tiny_dit: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    # After sampling and after most files were written.
    monkeypatch.setattr("fastdiff.eval.report.render", interrupted)
    status, _, complaint = command("demo", "--model", tiny_dit, *SIZES, "--out", tmp_path / "out")
    assert status == 130
    assert "interrupted" in complaint
    assert not list(tmp_path.iterdir())
