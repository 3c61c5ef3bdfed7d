"""What is made of a sweep's points: order, matches, domination, and one point of several sets of seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiff.eval.points import Point
from fastdiff.eval.results import as_data, collect, group_of, kind_of, name_of, provenance
from fastdiff.eval.sampling import Samples
from fastdiff.eval.speed import Turn
from fastdiff.eval.store import Store
from fastdiff.eval.ways import Way, parse_ways, plain
from tiny.results import distance, field, per_image, results, row

FULL = plain(8, is_baseline=True)


def store(folder: Path, ways: list[Way], quality: dict[str, dict[str, Any]], *, batches: tuple[int, ...] = ()) -> Store:
    """The folder of a sweep that has finished with these numbers."""
    kept = Store(folder)
    kept.open({"num_inference_steps": 8})
    for way in (FULL, *ways):
        kept.add(way)
        kept.add_batch(way.key, 0, Samples(np.zeros((2, 8, 8, 3), np.uint8)))
        if way.key in quality:
            kept.set_quality(way.key, {}, quality[way.key])
    for batch in batches:
        for _ in range(2):
            turns = {way.key: Turn(batch * way.num_inference_steps) for way in (FULL, *ways)}
            kept.add_round(batch, turns, {})
    return kept


def found(points: Any) -> dict[str, Point]:
    return {point.key: point for point in points}


# -- collecting --------------------------------------------------------------------------------------------------------


def test_only_what_was_asked_for_is_collected(tmp_path: Path) -> None:
    ways = [plain(4), plain(2)]
    quality = {way.key: {"fid": distance(10.0)} for way in (FULL, *ways)}
    kept = store(tmp_path, ways, quality, batches=(2, 16))
    assert [point.key for point in collect([kept], {}).points] == ["steps-8", "steps-4", "steps-2"]
    assert collect([kept], {}).batch == 16
    some = collect([kept], {}, keys={"steps-8", "steps-2"}, batch=2)
    assert [point.key for point in some.points] == ["steps-8", "steps-2"]
    assert some.batch == 2
    assert some.speedup(some.point("steps-2")) == 4


def test_sets_of_seeds_make_one_point(tmp_path: Path) -> None:
    ways = [plain(4), plain(2)]
    sets = [
        store(tmp_path / str(index), ways, {way.key: {"fid": distance(fid)} for way in (FULL, *ways[: 2 - index])})
        for index, fid in enumerate((9.0, 11.0))
    ]
    sets[1].set_error("steps-2", {"kind": "BadImageError", "message": "black"})
    points = found(collect(sets, {}).points)
    assert points["steps-4"].quality is not None
    assert points["steps-4"].quality["fid"]["value"] == 10
    # Judged on one set of two, its numbers are none of those beside it.
    assert points["steps-2"].quality is None
    assert points["steps-2"].error == {"kind": "BadImageError", "message": "black"}


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    quality = {FULL.key: {"fid": distance(10.0), "kid": {"value": float("nan"), "spread": 1.0}}}
    assert collect([store(tmp_path, [], quality)], {}).criteria == ["fid"]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("cannot import x from y (/home/someone/venv/lib/y/__init__.py)", "cannot import x from y (__init__.py)"),
        ("see '/data/a b' or C:\\Users\\me\\model.bin", "see 'a b' or model.bin"),
        ("https://example.org/a/b/c and 3/4 of a/b", "https://example.org/a/b/c and 3/4 of a/b"),
    ],
)
def test_errors_tell_nothing_of_the_disk(tmp_path: Path, message: str, told: str) -> None:
    kept = store(tmp_path, [plain(4)], {})
    kept.set_error("steps-4", {"kind": "ImportError", "message": message})
    assert found(collect([kept], {}).points)["steps-4"].error == {"kind": "ImportError", "message": told}


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_ordered_by_kind_group_and_speed(tmp_path: Path) -> None:
    ways = [*parse_ways(["deepcache", "layer-skipping:speedup={2,1.5}", "layer-skipping:speedup=3"], 8), plain(4)]
    copies = [*parse_ways(["layer-skipping:speedup=2"], 8, model="tuned"), plain(8, model="tuned", is_baseline=True)]
    points = collect([store(tmp_path, [*ways, *copies], {})], {}).points
    assert [(kind_of(point), group_of(point)) for point in points] == [
        ("baseline", "Full sampling"),
        ("baseline", "Full sampling, tuned"),
        *[("fastdiff", "Layer skipping")] * 3,
        ("fastdiff", "Layer skipping, tuned"),
        ("peer", "deepcache"),
        ("steps", "Fewer steps"),
    ]
    assert [name_of(point.way) for point in points][1::4] == ["tuned: 8 steps", "tuned: layer-skipping speedup=2"]


def test_verdicts_are_against_plain_sampling_in_the_same_time() -> None:
    rows = results(field())
    assert {point.key: rows.verdict(point) for point in rows.points} == {
        "full": None,
        "better": "better",
        "worse": "worse",
        "cache": "mixed",
        "unable": None,
        "steps-25": None,
        "steps-10": None,
    }
    gone = [point for point in field() if point.key != "steps-25"]
    assert results(gone).verdict(results(gone).point("better")) is None


def test_dominated_points_are_beaten_in_both() -> None:
    rows = results([*field(), row("untimed", speedup=None, fid=1.0)])
    # "cache" is faster and nearer than all but 10 steps, which are faster, and nobody is as near as the untimed one.
    assert rows.dominated("fid") == {"full", "better", "worse", "steps-25"}
    assert rows.dominated("psnr") == {"worse"}
    twins = results([row("a", speedup=2.0), row("b", speedup=2.0)])
    assert twins.dominated("fid") == set()


# -- as data -----------------------------------------------------------------------------------------------------------


def test_data_hold_every_row_with_its_differences_and_no_details() -> None:
    rows = results(field())
    data = as_data(rows)
    assert data["schema_version"] == 1
    assert data["timing_batch"] == rows.batch
    points = {point["key"]: point for point in data["points"]}
    assert list(points) == [point.key for point in rows.points]
    better = points["better"]
    assert better["changes_to_same_time"]["fid"]["value"] == pytest.approx(-0.9)
    assert better["changes_to_full"]["fid"]["value"] == pytest.approx(0.1)
    assert better["changes_to_full"]["psnr"] == {"value": -65.0, "error": pytest.approx(0)}
    assert (better["same_time"], better["verdict"]) == ("steps-25", "better")
    assert not {"values", "resampled"} & {name for p in points.values() for q in p["quality"].values() for name in q}
    assert points["unable"]["error"]["message"] == "it <refuses>"


def test_the_recorded_command_can_be_pasted() -> None:
    told = provenance(["fastdiff", "eval", "m", "--method", "skip-tuning:rho={0.8,0.9}", "--prompts", "my file"])
    assert told["command"] == "fastdiff eval m --method 'skip-tuning:rho={0.8,0.9}' --prompts 'my file'"
    assert told["commit"] is None or "/" not in told["commit"]


def test_equal_to_full_is_no_place_in_a_plot_and_no_number_in_a_table() -> None:
    from fastdiff.eval.report.plots import is_drawn
    from fastdiff.eval.report.tables import as_markdown

    rows = field()
    rows[1] = replace(rows[1], same_time="full", quality={"fid": distance(10.0), "psnr": per_image(100.0, spread=0)})
    made = results(rows)
    assert not is_drawn(made, made.point("better"), "psnr")
    assert is_drawn(made, made.point("worse"), "psnr")
    assert not is_drawn(made, made.point("unable"), "fid")
    line = next(line for line in as_markdown(made).splitlines() if "share=0.5" in line)
    assert line.count("equal") == 2


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("steps:9", "9 steps"),
        ("preset:fast", "preset fast"),
        ("layer-skipping:speedup=2", "layer-skipping speedup=2"),
        ("skip-tuning:rho=0.9+layer-skipping", "skip-tuning rho=0.9 + layer-skipping"),
    ],
)
def test_a_name_says_its_group_once(spec: str, name: str) -> None:
    (way,) = parse_ways([spec], 20)
    assert name_of({"label": way.label, "group": way.group, "plain": way.is_plain, "model": way.model}) == name


def test_a_label_that_says_nothing_of_its_group_stands_behind_it() -> None:
    assert name_of({"label": "half", "group": "skipping", "plain": False, "model": "tuned"}) == "tuned: skipping: half"
