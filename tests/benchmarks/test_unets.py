"""The benchmark of UNet methods from end to end on a tiny random model: rows, resumption, tables and pictures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import unets
import unets_report
from diffusers import DDIMScheduler
from PIL import Image

from fastdiff.cli.comparison import Row
from fastdiff.cli.contenders import FULL, Contender
from fastdiff.cli.sampler import Ran, Sampler
from fastdiff.eval import Ratio
from fastdiff.eval.glyphs import Score
from fastdiff.methods.skip_tuning import RHO_BY_EVALUATIONS
from fastdiff.plan import ComputePlan
from fastdiff.zoo import export, training_unet
from fastdiff.zoo.reader import GlyphReader

RHOS = (0.9,)


def make_sections() -> dict[str, unets.Section]:
    """Few steps and a sweep of few factors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unets, "RHOS", RHOS)
        return {
            "quick": unets.solver_section("quick", "DDIM", DDIMScheduler, 8, 4),
            "skip": unets.skip_section(2),
        }


SECTIONS = make_sections()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline and a random reader."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    export.export_unconditional(training_unet.build_pixel_unet((8, 16, 32)), folder / "tiny")
    GlyphReader(channels=(8, 8, 8), feature_dim=8).save_pretrained(folder / "reader")
    return folder


def run(models: Path, folder: Path, *words: object) -> dict[str, Any]:
    """Run the command; returns the sections that it wrote, by title."""
    places = [f"--{name}={folder / name}" for name in ("work", "out", "pictures")]
    sizes = ["--batch=2", "--timing-batch=2", "--rounds=2", "--renders=20"]
    arguments = [f"--model={models / 'tiny'}", f"--reader={models / 'reader'}", *places, *sizes, *map(str, words)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unets, "sections", lambda *_: SECTIONS)
        patch.setattr(sys, "argv", ["unets.py", *arguments])
        unets.main()
    written = json.loads((folder / "out/unets_tiny.json").read_text())
    return {section["section"]: section for section in written["sections"]}


@pytest.fixture(scope="module")
def done(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, run(models, folder)


def test_every_row_is_measured(done: tuple[Path, dict[str, Any]]) -> None:
    solver, skip = done[1].values()
    rows = {row["key"]: row for row in solver["rows"]}
    assert {contender.key for contender in SECTIONS["quick"].contenders} <= set(rows)
    assert rows[FULL]["psnr"] is None
    for key, row in rows.items():
        assert row["samples"] == 4
        assert row["speedup"]["pairs"] == row["speedup_single"]["pairs"] == 2
        assert (row["macs_share"] == 1) == (key == FULL)
        assert ("verdict" in row) == bool(row["methods"])
    swept = {float(row["methods"][0].partition("rho=")[2]) for row in skip["rows"] if row["methods"]}
    assert swept == {*RHOS, *(RHO_BY_EVALUATIONS[evaluations] for evaluations in unets.EVALUATIONS)}
    assert {row["num_inference_steps"] for row in skip["rows"]} == set(unets.EVALUATIONS)


def test_every_method_has_a_plain_row_of_the_same_time(done: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["key"]: row for row in next(iter(done[1].values()))["rows"]}
    for row in rows.values():
        if row["methods"]:
            match = rows[row["same_time"]]
            assert not match["methods"]
            expected = row["fid"] - match["fid"]
            assert row["fid_change_to_it"]["value"] == pytest.approx(expected)


def test_tables_hold_the_numbers(done: tuple[Path, dict[str, Any]]) -> None:
    folder, sections = done
    text = (folder / "out/unets_tiny.md").read_text()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    for row in next(iter(sections.values()))["rows"]:
        line = lines[row["label"]]
        assert f"{row['speedup']['median']:.2f}×" in line
        assert f"{row['macs_share']:.1%}" in line
        assert line.endswith(f"| {row.get('verdict', '')} |")
    assert len(re.findall(r"^\| (?:9|19|39) \|", text, re.MULTILINE)) == 9
    assert "no guidance" in text


def test_pictures_are_drawn(done: tuple[Path, dict[str, Any]]) -> None:
    pictures = sorted(path.name for path in (done[0] / "pictures").iterdir())
    assert pictures == ["unets-tiny-quick-samples.png", "unets-tiny-quick.png", "unets-tiny-skip.png"]
    for name in pictures:
        assert np.asarray(Image.open(done[0] / "pictures" / name)).std() > 0


def test_what_is_there_is_not_measured_again(
    models: Path, done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = done
    store = unets.Store(folder / "work/tiny/quick")
    kept = store.read("deepcache-2", "quality")
    (store.folder / "deepcache-2.quality.json").unlink()
    sampled = []
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, row, *rest: sampled.append(row.key) or sample(self, row, *rest))

    assert run(models, folder) == before
    assert set(sampled) == {"deepcache-2"}
    assert store.read("deepcache-2", "quality") == kept
    sampled.clear()
    assert run(models, folder, "--render") == before
    assert not sampled


def test_rows_of_other_settings_are_not_mixed(models: Path, done: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match=r"another seed.*--work"):
        run(models, done[0], "--seed=7")


def test_rendering_says_what_is_missing(models: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="full was not timed"):
        run(models, tmp_path, "--render")


# -- what is compared --------------------------------------------------------------------------------------------------


def keep_times(store: unets.Store, key: str, seconds: list[float], full: list[float]) -> None:
    times = {size: {"seconds": seconds, "full": full} for size in ("2", "1")}
    store.write(key, "time", {"batch": 2, "times": times, "environment": {}})


@pytest.mark.parametrize(("share", "steps"), [(0.5, 4), (0.31, 2), (0.05, 1), (1.2, 8), (0.74, 6)])
def test_matches_take_the_same_time(share: float, steps: int, tmp_path: Path) -> None:
    section, store = SECTIONS["quick"], unets.Store(tmp_path)
    for row in section.contenders:
        taken = share if row.methods else row.steps / section.steps
        # A slow minute of the machine slows both of a pair.
        keep_times(store, row.key, [taken, 3 * taken, taken], [1.0, 3.0, 1.0])
    matches = unets.find_matches(section, store)
    assert matches == {row.key: steps for row in section.contenders if row.methods}


def make_row(fid: float, read: tuple[float, float], psnr: float) -> Row:
    score = Score(100, fid, fid + np.array([-1.0, 0.0, 1.0]), 90, *read)
    ran, ratio = Ran(ComputePlan.full(1, ["unit"]), 1.0), Ratio(1, 1, 1, 1)
    return Row(Contender("key", "label", "group", 8), np.zeros(0), [], [], ran, 1.0, score, psnr, ratio, ratio)


@pytest.mark.parametrize(
    ("fid", "read", "psnr", "expected"),
    [
        (10.0, (0.8, 0.9), 30.0, "level"),
        (9.0, (0.8, 0.9), 30.2, "wins"),
        (11.0, (0.8, 0.9), 29.8, "loses"),
        (11.0, (0.95, 0.99), 30.0, "mixed"),
        (10.0, (0.5, 0.7), 30.0, "loses"),
        (10.0, (0.85, 0.95), 31.0, "wins"),
        (10.0, (0.85, 0.95), 29.0, "loses"),
    ],
)
def test_a_verdict_counts_all_three_measures(fid: float, read: tuple[float, float], psnr: float, expected: str) -> None:
    # The resampled distances move together, so that any difference of the distances is beyond noise.
    assert unets_report.verdict(make_row(fid, read, psnr), make_row(10.0, (0.8, 0.9), 30.0)) == expected


def test_a_distance_within_noise_counts_for_nothing() -> None:
    row, match = make_row(9.0, (0.8, 0.9), 30.0), make_row(10.0, (0.8, 0.9), 30.0)
    row.score.resampled[:] = row.score.resampled[::-1]
    assert unets_report.verdict(row, match) == "level"
