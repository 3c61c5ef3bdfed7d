"""Quality metrics against values known from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.errors import ConfigError
from fastdiff.eval import FeatureStatistics, fid, psnr, resample_fid, wilson_interval
from fastdiff.eval.quality import mean_interval


def gaussian(count: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim))


def whitened(count: int, dim: int) -> np.ndarray:
    """Samples whose mean is exactly 0 and covariance exactly the identity."""
    features = gaussian(count, dim)
    features -= features.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
    return features @ (vectors / np.sqrt(values)) @ vectors.T


def test_fid_of_a_set_with_itself_is_zero() -> None:
    features = gaussian(300, 24)
    assert fid(features, FeatureStatistics.of(features)) == pytest.approx(0, abs=1e-8)


def test_fid_of_a_set_with_itself_is_zero_when_samples_are_fewer_than_dimensions() -> None:
    features = gaussian(10, 24)
    assert fid(features, FeatureStatistics.of(features)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 2.0), (1.5, 0.25)])
def test_fid_of_two_gaussians_is_the_analytic_value(shift: float, scale: float) -> None:
    # Equal covariances up to a factor: |m1 - m2|^2 + tr(S) (1 - s)^2, with S the identity of 16 dimensions.
    reference = whitened(500, 16)
    expected = 16 * shift**2 + 16 * (1 - scale) ** 2
    assert fid(reference * scale + shift, FeatureStatistics.of(reference)) == pytest.approx(expected, rel=1e-9)


def test_fid_equals_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 12

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    mixing = gaussian(12, 12, seed=3)
    real, fake = gaussian(400, 12) @ mixing, 1.3 * gaussian(150, 12, seed=1) @ mixing.T + 0.4
    metric = FrechetInceptionDistance(feature=Features())
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    assert fid(fake, FeatureStatistics.of(real)) == pytest.approx(metric.compute().item(), rel=1e-9)


def standard_error(features: np.ndarray, reference: FeatureStatistics) -> float:
    return float(resample_fid(features, reference).std(ddof=1))


def test_fid_standard_error_falls_with_the_number_of_samples() -> None:
    reference = FeatureStatistics.of(gaussian(2000, 4))
    few, many = (standard_error(gaussian(count, 4, seed=1) + 1, reference) for count in (50, 1600))
    assert few / many == pytest.approx(math.sqrt(1600 / 50), rel=0.35)


def test_fid_standard_error_is_that_of_fresh_samples() -> None:
    reference = FeatureStatistics.of(gaussian(4000, 4))
    fresh = np.std([fid(gaussian(200, 4, seed=seed) + 1, reference) for seed in range(2, 102)])
    assert standard_error(gaussian(200, 4, seed=1) + 1, reference) == pytest.approx(fresh, rel=0.35)


def test_resampling_repeats_with_its_seed() -> None:
    features, reference = gaussian(40, 4), FeatureStatistics.of(gaussian(100, 4, seed=1))
    first, again, other = (resample_fid(features, reference, 20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("count", [12, 60], ids=["fewer samples than dimensions", "more"])
def test_resampled_distances_are_the_distances_of_the_resampled_sets(count: int) -> None:
    features, reference = 1.2 * gaussian(count, 24) + 0.3, FeatureStatistics.of(gaussian(300, 24, seed=1))
    draws = np.random.default_rng(5).integers(0, count, (10, count))
    expected = [fid(features[draw], reference) for draw in draws]
    np.testing.assert_allclose(resample_fid(features, reference, 10, seed=5), expected, rtol=1e-6)


def test_statistics_from_moments_are_those_of_the_features() -> None:
    features, other = gaussian(50, 6) + 2, FeatureStatistics.of(gaussian(40, 6, seed=1))
    known = FeatureStatistics.from_moments(features.mean(axis=0), np.cov(features, rowvar=False))
    assert known.count is None
    assert fid(gaussian(40, 6, seed=1), known) == pytest.approx(fid(features, other), rel=1e-9)


def test_mean_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).exponential(size=(300, 100))
    covered = [low <= 1 <= high for low, high in map(mean_interval, draws)]
    assert np.mean(covered) == pytest.approx(0.94, abs=0.04)


def test_the_error_of_a_difference_is_that_of_fresh_pairs_and_smaller_than_either() -> None:
    reference = FeatureStatistics.of(gaussian(4000, 4))

    def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
        features = gaussian(200, 4, seed=seed) + 1
        return features, features * 1.05

    fresh = np.std([fid(b, reference) - fid(a, reference) for a, b in map(pair, range(2, 102))])
    first, second = (resample_fid(features, reference) for features in pair(1))
    paired = (second - first).std(ddof=1)
    assert paired == pytest.approx(fresh, rel=0.35)
    assert paired < 0.5 * first.std(ddof=1)


@pytest.mark.parametrize(
    "features", [np.zeros((5, 3)), np.zeros((1, 4)), np.zeros(4), np.full((5, 4), np.nan)], ids=str
)
def test_fid_of_unusable_features_is_a_typed_error(features: np.ndarray) -> None:
    with pytest.raises(ConfigError):
        fid(features, FeatureStatistics.of(gaussian(10, 4)))


def test_psnr_is_infinite_for_equal_and_20_db_for_a_tenth() -> None:
    image = np.full((2, 4, 4, 3), 0.5)
    assert psnr(image, image) == math.inf
    assert psnr(image + 0.1, image) == pytest.approx(20)


def test_psnr_of_different_shapes_is_a_typed_error() -> None:
    with pytest.raises(ConfigError, match="shape"):
        psnr(np.zeros((2, 4)), np.zeros((1, 4)))


def test_wilson_interval_is_the_published_one() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(trials=st.integers(1, 500), data=st.data())
def test_wilson_interval_surrounds_the_share(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 4), (5, 4), (0, 0)])
def test_wilson_interval_of_impossible_counts_is_a_typed_error(successes: int, trials: int) -> None:
    with pytest.raises(ConfigError):
        wilson_interval(successes, trials)
