"""Distances between sets: held to the libraries' own calls, to the formula in float64, and to what is known."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastdiff.errors import ConfigError
from fastdiff.eval.features import FeatureNet, MissingLibraryError, clean_resize, extract
from fastdiff.eval.metrics import (
    FrechetDistance,
    frechet_distance,
    inception_score,
    kernel_distance,
    measure_set,
    precision_recall,
)
from fastdiff.eval.quality import FeatureStatistics
from fastdiff.eval.reference import Reference, ReferenceSetError, load_reference


class SmallNet(nn.Module):
    """Features of a kind that depends on the resizing: two convolutions with fixed random weights."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 5, stride=4), nn.Conv2d(8, 16, 3, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = self.second(self.first(images.float() / 127.5 - 1).relu()).relu()
        return 20 * seen.mean((2, 3))


def small_net(library: str = "torchmetrics") -> FeatureNet:
    module = SmallNet().eval()
    if library == "clean-fid":
        return FeatureNet("small-clean", 16, module, prepare=clean_resize, library="clean-fid")
    return FeatureNet("small", 16, module)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of smooth random images, the second darker and with less blue."""
    made = []
    for index, tint in enumerate([(255, 255, 255), (215, 220, 160)]):
        folder = tmp_path_factory.mktemp(f"set{index}")
        rng = np.random.default_rng(index)
        for number in range(40 - 8 * index):
            coarse = (rng.random((6, 6, 3)) * tint).astype(np.uint8)
            Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
        made.append(folder)
    return made[0], made[1]


def our_fid(folders: tuple[Path, Path], net: FeatureNet, tmp_path: Path) -> FrechetDistance:
    reference, samples = (load_reference(folder, net, cache=tmp_path) for folder in folders)
    assert samples.features is not None
    return measure_set(samples.features, reference, net, resamples=10).fid


def test_fid_of_two_folders_is_torchmetrics_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=SmallNet())
    for folder, real in zip(folders, (True, False), strict=True):
        pictures = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
        with torch.no_grad():
            metric.update(torch.from_numpy(pictures).movedim(3, 1), real=real)
    ours = our_fid(folders, small_net(), tmp_path)
    assert ours.value > 0.1
    assert ours.value == pytest.approx(metric.compute().item(), rel=1e-4)
    assert (ours.samples, ours.reference_samples, ours.library) == (32, 40, "torchmetrics")


@pytest.mark.filterwarnings("ignore:.*disp. argument:DeprecationWarning", "ignore:Matrix is singular")
def test_fid_of_two_folders_is_clean_fids_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean = pytest.importorskip("cleanfid.fid")
    theirs = clean.compute_fid(
        *map(str, folders),
        mode="clean",
        custom_feat_extractor=SmallNet().eval(),
        num_workers=0,
        device=torch.device("cpu"),
        verbose=False,
    )
    ours = our_fid(folders, small_net("clean-fid"), tmp_path)
    assert ours.value == pytest.approx(theirs, rel=1e-4)
    assert ours.library == "clean-fid"
    # The check would not notice a missing resize if resizing made no difference.
    assert our_fid(folders, small_net(), tmp_path).value != pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("library", ["torchmetrics", "clean-fid"])
def test_identical_folders_are_at_no_distance(folders: tuple[Path, Path], tmp_path: Path, library: str) -> None:
    if library == "clean-fid":
        pytest.importorskip("cleanfid")
    assert our_fid((folders[0], folders[0]), small_net(library), tmp_path).value == pytest.approx(0, abs=1e-3)


def gaussian(count: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def reference_of(features: np.ndarray, network: str = "stored") -> Reference:
    return Reference("made", network, FeatureStatistics.of(features), features)


def stored_net(dim: int, logits: Callable[[torch.Tensor], torch.Tensor] | None = None) -> FeatureNet:
    return FeatureNet("stored", dim, lambda features: features, logits=logits)


@pytest.mark.parametrize("shift", [0.25, 3.0])
def test_a_known_shift_in_feature_space_gives_the_analytic_fid(shift: float) -> None:
    features = gaussian(200, 12)
    measured = measure_set(features + np.float32(shift), reference_of(features), stored_net(12), resamples=10)
    assert measured.fid.value == pytest.approx(12 * shift**2, rel=1e-4)


def square_root_trace(first: np.ndarray, second: np.ndarray, package: str) -> float:
    """Trace of the square root of a product of covariances, in float64."""
    if package == "scipy":
        return float(np.real(np.trace(pytest.importorskip("scipy.linalg").sqrtm(first @ second))))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values) @ vectors.T
    return float(np.sqrt(np.linalg.eigvalsh(root @ second @ root)).sum())


def float64_fid(features: np.ndarray, real: np.ndarray, package: str) -> float:
    """The formula as published."""
    ours, theirs = (np.asarray(part, np.float64) for part in (features, real))
    first, second = (np.cov(part, rowvar=False) for part in (ours, theirs))
    shift = ours.mean(axis=0) - theirs.mean(axis=0)
    return float(shift @ shift + np.trace(first + second) - 2 * square_root_trace(first, second, package))


@pytest.mark.parametrize("package", ["numpy", "scipy"])
@pytest.mark.parametrize("library", ["torchmetrics", "clean-fid"])
def test_fid_is_that_of_numpy_and_scipy_in_float64(library: str, package: str) -> None:
    if library == "clean-fid":
        pytest.importorskip("cleanfid")
    mixing = gaussian(24, 24, seed=3)
    real, features = gaussian(300, 24) @ mixing, 1.3 * gaussian(150, 24, seed=1) @ mixing.T + 0.4
    expected = float64_fid(features, real, package)
    statistics = FeatureStatistics.of(real)
    # clean-fid takes the mean of float32 features in float32.
    features, real = (part.astype(np.float64) for part in (features, real))
    for known in (real, None):
        measured = frechet_distance(features, statistics, known, library, resamples=2)
        assert measured.value == pytest.approx(expected, rel=1e-6)


def test_the_interval_surrounds_the_value_and_narrows_with_samples() -> None:
    reference = reference_of(gaussian(1000, 4))
    few, many = (measure_set(gaussian(n, 4, seed=1) + 1, reference, stored_net(4)).fid for n in (50, 800))
    for measured in (few, many):
        assert measured.low < measured.value < measured.high
    assert (few.high - few.low) > 2 * (many.high - many.low)


def test_a_change_is_known_better_than_either_distance() -> None:
    reference, features = reference_of(gaussian(3000, 4)), gaussian(200, 4, seed=1) + 1
    parts = (features, features * np.float32(1.05))
    first, second = (measure_set(part, reference, stored_net(4)).fid for part in parts)
    change, error = second.change(first)
    assert change == pytest.approx(second.value - first.value)
    assert 1.96 * error < 0.5 * (first.value - first.low)
    with pytest.raises(ConfigError, match="paired"):
        first.change(measure_set(features[:100], reference, stored_net(4)).fid)


def test_kid_is_torchmetrics_own_and_repeats_with_its_seed() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, features = gaussian(300, 8), gaussian(200, 8, seed=1) + np.float32(0.5)
    module = nn.Identity()
    module.num_features = 8
    metric = KernelInceptionDistance(feature=module, subsets=100, subset_size=200)
    metric.update(torch.from_numpy(real).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    mean, std = metric.compute()
    ours = kernel_distance(features, real)
    assert ours.subset_size == 200
    assert ours.mean == pytest.approx(mean.item(), abs=4 * std.item() / 10)
    assert ours.std == pytest.approx(std.item(), rel=0.5)
    assert ours == kernel_distance(features, real)
    assert ours != kernel_distance(features, real, seed=1)


@pytest.mark.parametrize("library", ["torchmetrics", "clean-fid"])
def test_kid_leaves_the_global_generators_alone(library: str) -> None:
    if library == "clean-fid":
        pytest.importorskip("cleanfid")
    np.random.seed(3)  # noqa: NPY002 - the generator that clean-fid draws from
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1:3]  # noqa: NPY002
    kernel_distance(gaussian(20, 4), gaussian(20, 4, seed=1), library)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_equal(np.random.get_state()[1:3], numpy_before)  # noqa: NPY002


def test_kid_of_one_distribution_is_zero_within_its_noise_and_far_from_it_of_two() -> None:
    same = kernel_distance(gaussian(400, 8), gaussian(400, 8, seed=1))
    other = kernel_distance(gaussian(400, 8) + np.float32(0.5), gaussian(400, 8, seed=1))
    assert abs(same.mean) < 0.02 < 0.2 < other.mean


def test_kid_is_clean_fids_own() -> None:
    clean = pytest.importorskip("cleanfid.fid")
    real, features = gaussian(300, 8), gaussian(200, 8, seed=1) + np.float32(0.5)
    np.random.seed(7)  # noqa: NPY002
    theirs = clean.kernel_distance(real, features, num_subsets=100, max_subset_size=1000)
    assert kernel_distance(features, real, "clean-fid", seed=7).mean == pytest.approx(theirs, rel=1e-6)


def test_inception_score_of_certain_and_of_undecided_classifiers() -> None:
    certain = 50 * nn.functional.one_hot(torch.arange(400) % 8, 8).float()
    assert inception_score(certain).mean == pytest.approx(8, rel=0.1)
    assert inception_score(torch.zeros(400, 8)).mean == pytest.approx(1)
    assert inception_score(certain) == inception_score(certain)
    few = inception_score(certain[:4])
    assert few.splits == 2
    assert np.isfinite([few.mean, few.std]).all()


def test_precision_and_recall_tell_missing_modes_from_bad_samples() -> None:
    pytest.importorskip("torch_fidelity")
    modes = np.repeat(np.eye(4, dtype=np.float32) * 100, 50, axis=0)
    real = modes + gaussian(200, 4)
    half = modes[:100] + gaussian(100, 4, seed=1)
    missing = precision_recall(half, real)
    assert missing.precision > 0.8
    assert 0.4 < missing.recall < 0.55
    bad = precision_recall(np.concatenate([real, gaussian(200, 4, seed=2) - 500]), real)
    assert bad.precision == pytest.approx(0.5, abs=0.01)
    assert bad.recall == 1


def test_a_set_is_measured_by_everything_that_applies() -> None:
    features, real = gaussian(60, 6), gaussian(80, 6, seed=1)
    measured = measure_set(features, reference_of(real), stored_net(6, logits=lambda seen: seen), resamples=5)
    assert measured.kid is not None
    assert measured.inception_score is not None
    assert set(measured.absent) <= {"precision_recall"}  # only where torch-fidelity is missing
    assert json.loads(json.dumps(dataclasses.asdict(measured), allow_nan=False))["fid"]["samples"] == 60


def test_what_is_left_out_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = Reference("published", None, FeatureStatistics.of(gaussian(80, 6)))
    measured = measure_set(gaussian(60, 6), statistics, stored_net(6), resamples=5)
    assert measured.kid is None
    assert "statistics only" in measured.absent["kid"]
    assert "no classifier" in measured.absent["inception_score"]
    monkeypatch.setattr("fastdiff.eval.metrics.KID_BESIDE_BELOW", 60)
    many = measure_set(gaussian(60, 6), reference_of(gaussian(3, 6)), stored_net(6), resamples=2)
    assert "below 60 samples" in many.absent["kid"]
    assert "more than 3 samples" in many.absent["precision_recall"]


def test_without_torch_fidelity_only_precision_and_recall_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    measured = measure_set(gaussian(60, 6), reference_of(gaussian(80, 6)), stored_net(6), resamples=5)
    assert list(measured.absent) == ["precision_recall", "inception_score"]
    assert "pip install" in measured.absent["precision_recall"]


def test_without_torchmetrics_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(MissingLibraryError, match="torchmetrics"):
        measure_set(gaussian(60, 6), reference_of(gaussian(80, 6)), stored_net(6), resamples=5)


def test_a_reference_of_another_network_is_refused() -> None:
    with pytest.raises(ReferenceSetError, match="other-net"):
        measure_set(gaussian(9, 6), reference_of(gaussian(9, 6), "other-net"), stored_net(6))
    unnamed = Reference("published", None, FeatureStatistics.of(gaussian(80, 5)))
    with pytest.raises(ReferenceSetError, match="5 features"):
        measure_set(gaussian(9, 6), unnamed, stored_net(6))


def test_unusable_features_are_a_typed_error() -> None:
    for features in (gaussian(1, 6), np.full((5, 6), np.nan, np.float32)):
        with pytest.raises(ConfigError):
            measure_set(features, reference_of(gaussian(80, 6)), stored_net(6))


@pytest.mark.gpu
def test_features_on_a_gpu_are_those_on_the_cpu() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (20, 48, 48, 3), dtype=np.uint8)
    cpu, gpu = (
        extract(FeatureNet("small", 16, SmallNet().eval().to(device), device), pictures) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(gpu, cpu, rtol=5e-3, atol=1e-3)
