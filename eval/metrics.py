"""How far a set of samples is from a reference set: FID, KID, Inception score, improved precision and recall.

Every value comes from a library's public interface (torchmetrics, torch-fidelity or clean-fid, as said beside it) on
features that were taken once. What is added here is what makes the values comparable: the number of samples, an
interval, and the network's name. `docs/metrics.md` says what each number means and how it is biased.

The results are dataclasses of plain numbers: ``dataclasses.asdict`` gives what JSON can hold.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fastdiff.errors import ConfigError
from fastdiff.eval.features import FeatureNet, MissingLibraryError, needs_library
from fastdiff.eval.quality import FeatureStatistics, resample_fid
from fastdiff.eval.reference import Reference

KID_BESIDE_BELOW = 10_000
"""Below this number of samples the FID's bias is large enough that KID, which has none, is shown beside it."""

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3


@dataclass(frozen=True)
class FrechetDistance:
    """FID with what it takes to compare it.

    Args:
        value: the library's.
        low: lower end of the 95 % interval, from the bootstrap over the samples; the reference set counts as fixed.
        high: its upper end.
        samples: number of samples; compare equal numbers only.
        reference_samples: number of samples of the reference set, or None where its statistics do not say.
        library: that computed the value.
        resampled: the distances of resampled sets.
    """

    value: float
    low: float
    high: float
    samples: int
    reference_samples: int | None
    library: str
    resampled: tuple[float, ...] = field(repr=False)

    def change(self, baseline: FrechetDistance) -> tuple[float, float]:
        """The distance less a baseline's, and that difference's standard error, for samples of the same seeds.

        Raises:
            ConfigError: if the two were not resampled alike.
        """
        if self.samples != baseline.samples or len(self.resampled) != len(baseline.resampled):
            raise ConfigError(
                f"Distances of {self.samples} and {baseline.samples} samples, resampled {len(self.resampled)} and "
                f"{len(baseline.resampled)} times, cannot be paired; measure both alike."
            )
        differences = np.subtract(self.resampled, baseline.resampled)
        return self.value - baseline.value, float(differences.std(ddof=1))


@dataclass(frozen=True)
class KernelDistance:
    """KID: mean and standard deviation over random subsets of both sets, and the library that computed them."""

    mean: float
    std: float
    subsets: int
    subset_size: int
    library: str


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over the splits of the samples."""

    mean: float
    std: float
    splits: int


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of the samples inside the reference's manifold, and of the reference inside the samples'."""

    precision: float
    recall: float
    neighbours: int


@dataclass(frozen=True)
class SetQuality:
    """What a set of samples scores against a reference set.

    Args:
        network: name of the feature network.
        reference: name of the reference set.
        fid: always there.
        kid: or None, and the reason in ``absent``; likewise the two that follow.
        inception_score: of the samples alone.
        precision_recall: improved precision and recall.
        absent: metric to reason.
    """

    network: str
    reference: str
    fid: FrechetDistance
    kid: KernelDistance | None = None
    inception_score: InceptionScore | None = None
    precision_recall: PrecisionRecall | None = None
    absent: dict[str, str] = field(default_factory=dict)


def measure_set(
    features: np.ndarray, reference: Reference, net: FeatureNet, *, resamples: int = 100, seed: int = 0
) -> SetQuality:
    """All metrics of a set of samples.

    KID is left out from 10,000 samples on, where FID says enough.

    Args:
        features: of the samples, float32 (n, dim), as `fastdiff.eval.features.extract` returns them.
        reference: of the same network.
        net: the network.
        resamples: sets drawn for FID's interval.
        seed: of everything that is drawn: resamples, subsets, splits.

    Raises:
        ReferenceSetError: if the reference is another network's.
        ConfigError: if there are fewer than two samples, or a feature is not finite.
        MissingLibraryError: if torchmetrics, or the network's library, is not installed. Without torch-fidelity, only
            precision and recall are left out.
    """
    reference.check_network(net)
    fid = frechet_distance(features, reference.statistics, reference.features, net.library, resamples, seed)
    absent: dict[str, str] = {}
    kid = precision = score = None
    real = reference.features
    if real is None:
        absent = dict.fromkeys(("kid", "precision_recall"), "the reference set holds statistics only, no features")
    else:
        if len(features) < KID_BESIDE_BELOW:
            kid = kernel_distance(features, real, net.library, seed)
        else:
            absent["kid"] = f"shown below {KID_BESIDE_BELOW} samples only"
        if min(len(features), len(real)) <= NEIGHBOURS:
            absent["precision_recall"] = f"needs more than {NEIGHBOURS} samples in both sets"
        else:
            try:
                precision = precision_recall(features, real)
            except MissingLibraryError as error:
                absent["precision_recall"] = str(error)
    if net.logits is None:
        absent["inception_score"] = f"{net.name} has no classifier"
    else:
        with torch.no_grad():
            score = inception_score(net.logits(torch.from_numpy(features).to(net.device)), seed)
    return SetQuality(net.name, reference.name, fid, kid, score, precision, absent)


def frechet_distance(
    features: np.ndarray,
    statistics: FeatureStatistics,
    real: np.ndarray | None = None,
    library: str = "torchmetrics",
    resamples: int = 100,
    seed: int = 0,
) -> FrechetDistance:
    """FID of features (n, dim) to a reference set of which the statistics, or also the features, are known."""
    resampled = resample_fid(features, statistics, resamples, seed)
    real = _sigma_points(statistics) if real is None else real
    value = (_clean_fid if library == "clean-fid" else _torchmetrics_fid)(features, real)
    half = 1.96 * float(resampled.std(ddof=1))
    return FrechetDistance(
        value,
        max(0.0, value - half),
        value + half,
        len(features),
        statistics.count,
        library,
        tuple(resampled.tolist()),
    )


def kernel_distance(
    features: np.ndarray, real: np.ndarray, library: str = "torchmetrics", seed: int = 0
) -> KernelDistance:
    """KID between features (n, dim) and those of a reference set, over subsets of at most 1000."""
    size = min(KID_SUBSET_SIZE, len(features), len(real))
    compute = _clean_kid if library == "clean-fid" else _torchmetrics_kid
    mean, std = compute(features, real, size, seed)
    return KernelDistance(mean, std, KID_SUBSETS, size, library)


def inception_score(logits: torch.Tensor, seed: int = 0) -> InceptionScore:
    """Inception score of class logits (n, classes), by torchmetrics, in ten splits or fewer where samples are few."""
    with needs_library("torchmetrics"):
        from torchmetrics.image.inception import InceptionScore as Metric

    # A split of one sample always scores 1, and one split has no deviation.
    splits = max(2, min(10, len(logits) // 2))
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metric = Metric(feature=_Stored(logits.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(logits.double().cpu())
        mean, std = metric.compute()
    return InceptionScore(float(mean), float(std), splits)


def precision_recall(features: np.ndarray, real: np.ndarray) -> PrecisionRecall:
    """Improved precision and recall, by torch-fidelity, in the space of the given features (n, dim)."""
    with needs_library("torch-fidelity 0.4 or later"):
        import torch_fidelity
        from torch_fidelity import KEY_METRIC_PRECISION, KEY_METRIC_RECALL

    measured = torch_fidelity.calculate_metrics(
        input1=_Rows(features),
        input2=_Rows(real),
        prc=True,
        prc_neighborhood=NEIGHBOURS,
        feature_extractor=_stored_extractor(),
        feature_layer_prc="stored",
        batch_size=4096,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    return PrecisionRecall(float(measured[KEY_METRIC_PRECISION]), float(measured[KEY_METRIC_RECALL]), NEIGHBOURS)


class _Stored(nn.Module):
    """Stands for a feature network where the features are at hand: torchmetrics takes them as the images.

    The metrics on it are told not to synchronise: one process judges while the others wait for it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class _Rows(torch.utils.data.Dataset):
    """Features as a data set of vectors."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = torch.from_numpy(np.ascontiguousarray(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._rows[index]


@functools.cache
def _stored_extractor() -> str:
    """The name under which torch-fidelity knows an extractor that passes features through."""
    import torch_fidelity

    class Stored(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)

        def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor]:
            return (rows,)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("stored",)

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    name = "fastdiff-stored"
    torch_fidelity.register_feature_extractor(name, Stored)
    return name


def _sigma_points(statistics: FeatureStatistics) -> np.ndarray:
    """Points (2 dim, dim) whose mean and covariance are the given ones, for libraries that take features only."""
    dim = len(statistics.mean)
    steps = math.sqrt((2 * dim - 1) / 2) * statistics.root
    return np.concatenate([statistics.mean + steps, statistics.mean - steps])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchmetrics' warning that features are kept, which they are anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features", category=UserWarning)
        yield


def _torchmetrics_fid(features: np.ndarray, real: np.ndarray) -> float:
    with needs_library("torchmetrics"):
        from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Stored(features.shape[1]), sync_on_compute=False)
    metric.update(torch.from_numpy(np.asarray(real, np.float64)), real=True)
    metric.update(torch.from_numpy(np.asarray(features, np.float64)), real=False)
    return float(metric.compute())


def _torchmetrics_kid(features: np.ndarray, real: np.ndarray, size: int, seed: int) -> tuple[float, float]:
    with needs_library("torchmetrics"):
        from torchmetrics.image.kid import KernelInceptionDistance

    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_Stored(features.shape[1]), subsets=KID_SUBSETS, subset_size=size, sync_on_compute=False
        )
        metric.update(torch.from_numpy(np.asarray(real, np.float64)), real=True)
        metric.update(torch.from_numpy(np.asarray(features, np.float64)), real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def _clean_fid(features: np.ndarray, real: np.ndarray) -> float:
    with needs_library("clean-fid"):
        from cleanfid.fid import fid_from_feats

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`disp` argument", category=DeprecationWarning)
        try:
            return float(fid_from_feats(features, real))
        except TypeError as error:
            # clean-fid passes an argument to scipy.linalg.sqrtm that SciPy 1.18 drops.
            raise MissingLibraryError(
                f"This clean-fid cannot use this SciPy ({error}); install 'scipy<1.18'."
            ) from error


def _clean_kid(features: np.ndarray, real: np.ndarray, size: int, seed: int) -> tuple[float, float]:
    with needs_library("clean-fid"):
        from cleanfid.fid import kernel_distance as clean_kernel_distance

    state = np.random.get_state()  # noqa: NPY002 - clean-fid draws its subsets from numpy's global generator
    try:
        np.random.seed(seed)  # noqa: NPY002
        values = [clean_kernel_distance(real, features, 1, size) for _ in range(KID_SUBSETS)]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return float(np.mean(values)), float(np.std(values))
