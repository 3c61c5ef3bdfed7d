"""Criteria, differences beyond noise, and several sets of seeds, on numbers that are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastdiff.errors import ConfigError
from fastdiff.eval import FeatureNet, FeatureStatistics, ImageDataError, Reference, ReferenceSetError
from fastdiff.eval.judging import REFERENCE_DIGEST, Judge, change, pooled, standard_error, verdict
from fastdiff.eval.quality import wilson_interval
from fastdiff.eval.sampling import Samples
from tiny.results import SAMPLES, distance, per_image

SIZE = 16


def net(**changes: Any) -> FeatureNet:
    """Features are the means of six patches."""

    def features(images: Any) -> Any:
        return images.float().reshape(len(images), 6, -1).mean(dim=2)

    return replace(FeatureNet("patches@0", 6, features), **changes)


def images(seed: int, count: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def reference(size: int = SIZE, seed: int = 1) -> Reference:
    features = np.random.default_rng(seed).normal(127, 5, (50, 6)).astype(np.float32)
    return Reference("set", "patches@0", FeatureStatistics.of(features), features, (size, size))


# -- the judge ---------------------------------------------------------------------------------------------------------


def test_a_judge_measures_the_set_the_pairs_and_what_is_read() -> None:
    samples, full = (
        Samples(images(0), np.ones((24, 4), np.float32)),
        Samples(images(2), np.full((24, 4), 2, np.float32)),
    )
    said = Judge(net(), reference(), reading=lambda shown: shown[:, 0, 0, 0] < 128, said={"reader": "r"})
    found = said(samples, full)
    assert {"fid", "kid", "psnr", "ssim", "latent_error", "read"} <= set(found)
    right = int((samples.images[:, 0, 0, 0] < 128).sum())
    assert found["read"]["value"] == right / 24
    assert (found["read"]["low"], found["read"]["high"]) == wilson_interval(right, 24)
    assert found["latent_error"]["value"] == pytest.approx(0.5)
    assert found["psnr"]["value"] == pytest.approx(np.mean(found["psnr"]["values"]))
    assert found["fid"]["low"] < found["fid"]["value"] < found["fid"]["high"]
    assert "no classifier" in found["fid"]["absent"]["inception_score"]
    assert said(full, full)["psnr"]["value"] == 100


def test_a_judge_is_told_by_the_content_of_its_reference() -> None:
    told = Judge(net(), reference(), said={"reader": "r"}).describe()
    assert told == Judge(net(), reference(), said={"reader": "r"}).describe()
    assert told["features"] == "patches@0"
    assert told["reader"] == "r"
    other = Judge(net(), reference(seed=2), said={"reader": "r"}).describe()
    assert {name for name in told if told[name] != other[name]} == {REFERENCE_DIGEST}


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ReferenceSetError, match="32x32"):
        Judge(net(), reference(size=32)).check(images(0))
    with pytest.raises(ImageDataError, match="8x8"):
        Judge(net(image_size=(8, 8)), reference()).check(images(0))


def test_a_clip_score_without_captions_is_refused() -> None:
    clip: Any = lambda *_: None  # noqa: E731
    with pytest.raises(ConfigError, match="captions"):
        Judge(net(), reference(), clip=clip)


# -- differences -------------------------------------------------------------------------------------------------------


def test_standard_errors_come_from_what_is_known() -> None:
    assert standard_error(distance(10.0, error=0.5)) == pytest.approx(0.5, rel=0.02)
    assert standard_error(per_image(30.0)) == pytest.approx(1 / np.sqrt(SAMPLES), rel=0.02)
    assert standard_error({"value": 0.5, "low": 0.402, "high": 0.598}) == pytest.approx(0.05)
    assert standard_error({"value": 0.1, "spread": 0.02}) is None


def test_a_difference_from_the_same_seeds_is_known_better_than_either_value() -> None:
    ours, other = distance(11.0, own=0.01), distance(10.0, own=0.01)
    difference, error = change(ours, other)
    assert difference == pytest.approx(1)
    assert error == pytest.approx(0.01 * np.sqrt(2), rel=0.3)
    light = [{name: value for name, value in told.items() if name != "resampled"} for told in (ours, other)]
    assert change(*light)[1] == pytest.approx(0.5 * np.sqrt(2), rel=0.05)
    paired = change(per_image(31.0), per_image(30.0))
    assert paired == (1.0, pytest.approx(0.0))
    assert change({"value": 2.0}, ours)[1] is None


def quality(fid: float, psnr: float = 30.0, **more: Any) -> dict[str, Any]:
    return {"fid": distance(fid, own=0.01), "psnr": per_image(psnr), **more}


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        (quality(9.0), quality(10.0), "better"),
        (quality(11.0), quality(10.0), "worse"),
        (quality(10.0, psnr=35.0), quality(10.0), "better"),
        (quality(9.0, psnr=20.0), quality(10.0), "mixed"),
        (quality(10.001), quality(10.0), "level"),
        (quality(10.0, psnr=30.4), quality(10.0), "level"),  # too little to be noticed
        # What does not decide does not.
        (quality(10.0, ssim=per_image(0.9, spread=0)), quality(10.0, ssim=per_image(0.1, spread=0)), "level"),
        (quality(9.0, kid={"value": 2.0, "spread": 0.1}), quality(10.0, kid={"value": 1.0, "spread": 0.1}), "better"),
    ],
)
def test_verdicts(ours: dict[str, Any], other: dict[str, Any], expected: str) -> None:
    assert verdict(ours, other) == expected
    opposite = {"better": "worse", "worse": "better"}
    assert verdict(other, ours) == opposite.get(expected, expected)


# -- several sets of seeds ---------------------------------------------------------------------------------------------


def share(right: int) -> dict[str, Any]:
    low, high = wilson_interval(right, SAMPLES)
    return {"value": right / SAMPLES, "low": low, "high": high, "values": [1.0] * right + [0.0] * (SAMPLES - right)}


def test_sets_of_seeds_are_pooled() -> None:
    sets: list[dict[str, Any]] = [
        {
            "fid": {**distance(value), "resampled": (value + np.random.default_rng(seed).normal(size=100)).tolist()},
            "psnr": per_image(psnr),
            "read": share(right),
            "kid": {"value": value / 10, "spread": 0.1},
            "precision": {"value": value / 20, "low": value / 20 - 0.098, "high": value / 20 + 0.098},
        }
        for seed, (value, psnr, right) in enumerate([(9.0, 29.0, 40), (10.0, 30.0, 40), (11.0, 33.0, 40)])
    ]
    found = pooled(sets)
    assert found["fid"]["value"] == pytest.approx(10)
    assert standard_error(found["fid"]) == pytest.approx(1 / np.sqrt(3), rel=0.2)
    assert found["fid"]["high"] - found["fid"]["low"] == pytest.approx(2 * 1.96 * standard_error(found["fid"]))  # type: ignore[operator]
    assert len(found["psnr"]["values"]) == 3 * SAMPLES
    assert found["psnr"]["value"] == pytest.approx(92 / 3)
    assert found["psnr"]["worst"] == 28
    assert (found["read"]["low"], found["read"]["high"]) == wilson_interval(3 * SAMPLES, 3 * SAMPLES)
    assert found["kid"] == {"value": pytest.approx(1), "spread": pytest.approx(0.1), "sets": 3}
    assert found["precision"]["high"] - found["precision"]["low"] == pytest.approx(2 * 0.098 / np.sqrt(3))
    assert {told["sets"] for told in found.values()} == {3}


def test_one_set_is_left_as_it_is_and_only_what_all_sets_have_is_pooled() -> None:
    assert pooled([quality(9.0)]) == quality(9.0)
    assert sorted(pooled([quality(9.0, kid={"value": 1.0, "spread": 0.1}), quality(9.0)])) == ["fid", "psnr"]
    assert pooled([quality(0.05), quality(0.05)])["fid"]["low"] == 0
