"""Two evaluations compared: what is noise, what is a regression, and what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdiff.cli.main import main
from fastdiff.errors import ConfigError
from fastdiff.eval import Ratio
from fastdiff.eval.compare import Difference, compare, told
from fastdiff.eval.points import Point
from fastdiff.eval.results import as_data, load_results
from tiny.results import BATCH, distance, field, per_image, results, row


def data(points: list[Point] | None = None, **header: Any) -> dict[str, Any]:
    """Results as they are read from a file."""
    found: dict[str, Any] = json.loads(json.dumps(as_data(results(field() if points is None else points, **header))))
    return found


def changed(key: str, **quality: Any) -> list[Point]:
    """The rows, one of them with other numbers."""
    points = field()
    return [replace(p, quality={**(p.quality or {}), **quality}) if p.key == key else p for p in points]


def with_speedup(ratio: Ratio) -> list[Point]:
    def of(point: Point) -> Point:
        timings = {batch: replace(timing, speedup=ratio) for batch, timing in point.timings.items()}
        return replace(point, timings=timings) if point.key == "better" else point

    return list(map(of, field()))


def test_the_same_twice_has_no_differences() -> None:
    comparison = compare(data(), data(), 0.0)
    assert comparison.differences == comparison.regressions == comparison.unlike == comparison.new == []
    assert comparison.compared == 6 * 2 + 5 * 2  # criteria of all rows, two timings of all but full sampling
    assert "22 numbers compared: 0 differ beyond noise, 0 regression(s)" in told(comparison)


@pytest.mark.parametrize(
    ("fid", "word"), [(8.0, "better"), (12.5, "REGRESSION"), (10.9, "")], ids=["improved", "regressed", "noise"]
)
def test_a_distance_that_changes(fid: float, word: str) -> None:
    comparison = compare(data(), data(changed("better", fid=distance(fid))), 0.02)
    assert len(comparison.differences) == bool(word)
    assert bool(comparison.regressions) == (word == "REGRESSION")
    if word:
        assert f"{word:10}  skipping: share=0.5: FID 10.1 → {fid:.4g}" in told(comparison)


def test_what_is_worse_beyond_noise_may_be_within_the_tolerance() -> None:
    after = data(changed("better", psnr=per_image(34.0, spread=0.1)))
    before = data(changed("better", psnr=per_image(35.0, spread=0.1)))
    assert compare(before, after, 0.05).regressions == []
    assert "worse       skipping: share=0.5: PSNR" in told(compare(before, after, 0.05))
    assert compare(before, after, 0.02).regressions == ["skipping: share=0.5: PSNR"]


def test_noise_is_no_regression_whatever_the_tolerance() -> None:
    noisy = Difference("way", "FID", 10.0, 11.0, error=0.6, better=-1, tolerance=0.0)
    assert noisy.is_noise
    assert not noisy.is_regression
    assert replace(noisy, error=0.4).is_regression
    assert not replace(noisy, error=0.4, better=1).is_regression


def test_a_deviation_over_subsets_counts_as_noise() -> None:
    before, after = ({"value": value, "spread": 0.1} for value in (1.0, 1.2))
    assert not compare(data(changed("better", kid=before)), data(changed("better", kid=after)), 0.0).differences
    after = {"value": 1.4, "spread": 0.1}
    assert compare(data(changed("better", kid=before)), data(changed("better", kid=after)), 0.0).regressions


@pytest.mark.parametrize(
    ("ratio", "regressions"),
    [
        (Ratio(1.5, 1.48, 1.52, 7), 2),
        (Ratio(1.97, 1.95, 1.99, 7), 0),  # as much as pairs differ
        (Ratio(1.5, 0.9, 2.1, 3), 0),
        (Ratio(1.0, 1.0, 1.0, 1), 0),  # one pair knows nothing of noise
        (Ratio(2.5, 2.48, 2.52, 7), 0),
    ],
)
def test_speed(ratio: Ratio, regressions: int) -> None:
    comparison = compare(data(), data(with_speedup(ratio)), 0.02)
    names = {f"skipping: share=0.5: speedup, {batch} at a time" for batch in (1, BATCH)}
    assert set(comparison.regressions) == (names if regressions else set())


def test_ways_that_came_and_went() -> None:
    fewer = [point for point in field() if point.key != "cache"]
    comparison = compare(data(), data([*fewer, row("steps-5", label="5 steps")]), 0.1)
    assert comparison.missing == comparison.regressions == ["cache"]
    assert comparison.new == ["5 steps"]
    assert "REGRESSION  cache: could not be sampled any more" in told(comparison)
    unable = [row("cache", fid=None, speedup=None, group="cache", peer="cache")]
    assert compare(data(), data([*fewer, *unable]), 0.1).missing == ["cache"]


def test_unlike_settings_are_named() -> None:
    judged = {**data()["judged"], "features": "net@2", "reference_digest": "of another machine"}
    environment = {**data()["environment"], "device": "another"}
    after = data(num_samples=50, judged=judged, environment=environment)
    found = compare(data(), after, 0.0).unlike
    assert [line.partition(":")[0] for line in found] == ["num_samples", "judged", "device"]
    assert found[0] == "num_samples: 40 before, 50 after"
    assert compare(data(), data(judged={**data()["judged"], "reference_digest": "e"}), 0.0).unlike == []


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(("fid", "status"), [(12.5, 1), (10.2, 0), (8.0, 0)])
def test_the_command_ends_with_1_on_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fid: float, status: int
) -> None:
    write(tmp_path / "results.json", data())
    after = write(tmp_path / "after.json", data(changed("better", fid=distance(fid))))
    assert main(["eval", "compare", str(tmp_path), str(after), "--tolerance", "0.05"]) == status
    assert ("REGRESSION" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 99, "points": []}', '{"schema_version": 1}'])
def test_what_holds_no_results_is_a_typed_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match="results"):
        load_results(write(tmp_path / "results.json", content))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_results(tmp_path / "nothing.json")


def test_a_tolerance_below_0_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "results.json", data())
    assert main(["eval", "compare", str(tmp_path), str(tmp_path), "--tolerance", "-0.1"]) == 2
    assert "--tolerance" in capsys.readouterr().err
