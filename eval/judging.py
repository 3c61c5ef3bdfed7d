"""What samples are judged by: the criteria, their intervals, and when a difference is more than noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastdiff.errors import ConfigError
from fastdiff.eval.features import FeatureNet, check_images, extract
from fastdiff.eval.metrics import SetQuality, measure_set
from fastdiff.eval.paired import PSNR_LIMIT, ClipScorer, Lpips, PerImage, measure_pairs
from fastdiff.eval.quality import wilson_interval
from fastdiff.eval.reference import Reference
from fastdiff.eval.sampling import Samples

Z = 1.96
"""Standard errors in half a 95 % interval."""

REFERENCE_DIGEST = "reference_digest"
"""Stands for the content of a reference set where a judge is described; its name alone may not change with it."""


@dataclass(frozen=True)
class Criterion:
    """A number that samples are judged by.

    Args:
        title: for a table's head.
        unit: what it is measured in, or how it is to be read.
        better: 1 where more is better, -1 where less is.
        scale: shown as this many times the value, 100 for percent.
        decimals: shown; None for as many as the interval leaves, or for three digits where there is none.
        noticeable: less of a difference counts as none, even beyond noise.
        decides: whether verdicts are made on it; the others are shown beside.
    """

    title: str
    unit: str
    better: int
    scale: float = 1.0
    decimals: int | None = None
    noticeable: float = 0.0
    decides: bool = False


CRITERIA: dict[str, Criterion] = {
    "fid": Criterion("FID", "", -1, decides=True),
    "read": Criterion("Read correctly", "%", 1, 100, 1, decides=True),
    "clip_score": Criterion("CLIP score", "", 1, decimals=2, decides=True),
    "psnr": Criterion("PSNR", "dB to full", 1, decimals=1, noticeable=0.5, decides=True),
    "lpips": Criterion("LPIPS", "to full", -1, decimals=3, noticeable=0.005, decides=True),
    "ssim": Criterion("SSIM", "to full", 1, decimals=3),
    "latent_error": Criterion("Latent error", "% of full", -1, 100, 1),
    "kid": Criterion("KID", "", -1),
    "precision": Criterion("Precision", "%", 1, 100, 1),
    "recall": Criterion("Recall", "%", 1, 100, 1),
    "inception_score": Criterion("Inception score", "", 1, decimals=2),
}

Reading = Callable[[np.ndarray], np.ndarray]
"""uint8 images (n, height, width, 3) to whether each shows what was asked for, bool (n,)."""


class Judge:
    """Judges a way's samples against a reference set, and against full sampling's from the same seeds.

    Args:
        net: the feature network.
        reference: the reference set, of this network.
        lpips: adds the learned perceptual distance to full sampling's images.
        clip: adds the agreement with captions.
        captions: one for each image, over and over.
        reading: adds the share of images that show what was asked for.
        said: what else tells this judge from others, JSON-compatible.
    """

    def __init__(
        self,
        net: FeatureNet,
        reference: Reference,
        *,
        lpips: Lpips | None = None,
        clip: ClipScorer | None = None,
        captions: Sequence[str] = (),
        reading: Reading | None = None,
        said: Mapping[str, Any] | None = None,
    ) -> None:
        if clip is not None and not captions:
            raise ConfigError("A CLIP score compares images with captions; give prompts.")
        self._net = net
        self._reference = reference
        self._lpips = lpips
        self._clip = clip
        self._captions = captions
        self._reading = reading
        self._said = dict(said or {})

    def describe(self) -> dict[str, Any]:
        """What tells this judge from others, JSON-compatible."""
        extras = {"lpips": self._lpips, "clip": self._clip}
        return {
            "features": self._net.name,
            "reference": self._reference.name,
            "reference_samples": self._reference.statistics.count,
            REFERENCE_DIGEST: _digest(self._reference.statistics.mean),
            **{name: part.name for name, part in extras.items() if part is not None},
            **self._said,
        }

    def __call__(self, samples: Samples, full: Samples) -> dict[str, Any]:
        """All criteria of some samples, JSON-compatible.

        Args:
            samples: what is judged.
            full: full sampling's of the same seeds.

        Raises:
            FastDiffError: if the samples cannot be judged so: the wrong size, no images, a library that is missing.
        """
        latents = None
        if samples.latents is not None and full.latents is not None:
            latents = samples.latents, full.latents
        pairs = measure_pairs(samples.images, full.images, latents=latents, lpips=self._lpips)
        return self.score(samples.images) | {name: _per_image(metric) for name, metric in pairs.items()}

    def check(self, images: np.ndarray) -> None:
        """Refuse images that cannot be judged for their size.

        Args:
            images: uint8 of shape ``(n, height, width, 3)``.

        Raises:
            FastDiffError: if the reference's images, or those that the network takes, have another size.
        """
        self._reference.check_size(images)
        check_images(images, self._net.image_size)

    def score(self, images: np.ndarray, *, reading: Reading | None = None) -> dict[str, Any]:
        """The criteria that need no full sampling, JSON-compatible.

        Args:
            images: uint8 of shape ``(n, height, width, 3)``.
            reading: in place of this judge's own.
        """
        self.check(images)
        quality = measure_set(extract(self._net, images), self._reference, self._net)
        criteria = _of_set(quality)
        if reading := reading or self._reading:
            criteria["read"] = _share(reading(images))
        if self._clip is not None:
            captions = [self._captions[index % len(self._captions)] for index in range(len(images))]
            criteria["clip_score"] = _per_image(self._clip(images, captions))
        return criteria


def _digest(mean: np.ndarray) -> str:
    """Of the mean features, rounded: the last bits differ from machine to machine."""
    return hashlib.sha256(np.round(mean, 3).astype(np.float32).tobytes()).hexdigest()[:12]


def _of_set(quality: SetQuality) -> dict[str, Any]:
    # What is not there, and why, is kept beside what always is.
    criteria: dict[str, Any] = {"fid": {**asdict(quality.fid), "absent": quality.absent}}
    if quality.kid is not None:
        criteria["kid"] = {"value": quality.kid.mean, "spread": quality.kid.std, **asdict(quality.kid)}
    if quality.inception_score is not None:
        score = quality.inception_score
        criteria["inception_score"] = {"value": score.mean, "spread": score.std, "splits": score.splits}
    if (shares := quality.precision_recall) is not None:
        for name, count in (("precision", quality.fid.samples), ("recall", quality.fid.reference_samples or 1)):
            share = getattr(shares, name)
            low, high = wilson_interval(round(share * count), count)
            criteria[name] = {"value": share, "low": low, "high": high, "neighbours": shares.neighbours}
    return criteria


def _per_image(metric: PerImage) -> dict[str, Any]:
    told = asdict(metric)
    return {"value": told.pop("mean"), **told}


def _share(right: np.ndarray) -> dict[str, Any]:
    count = int(right.sum())
    low, high = wilson_interval(count, len(right))
    return {"value": count / len(right), "low": low, "high": high, "values": right.astype(float).tolist()}


# -- differences -------------------------------------------------------------------------------------------------------


def standard_error(told: Mapping[str, Any]) -> float | None:
    """Of a criterion's value; None if it is not known, as of a distance that is a mean over subsets."""
    if told.get("resampled"):
        return float(np.std(told["resampled"], ddof=1))
    if len(told.get("values") or ()) > 1:
        return float(np.std(told["values"], ddof=1) / math.sqrt(len(told["values"])))
    if told.get("low") is not None and told.get("high") is not None:
        return float(told["high"] - told["low"]) / (2 * Z)
    return None


def change(ours: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float | None]:
    """A criterion's value less another's, and the standard error of that; None if that is not known.

    Where both come from the same seeds and the details are there, the error is that of the paired difference, which is
    much smaller than that of either.
    """
    difference = ours["value"] - other["value"]
    for name, scale in (("resampled", 1.0), ("values", math.sqrt(len(ours.get("values") or "1")))):
        mine, others = ours.get(name), other.get(name)
        if mine and others and len(mine) == len(others) > 1:
            return difference, float(np.std(np.subtract(mine, others), ddof=1)) / scale
    errors = standard_error(ours), standard_error(other)
    return difference, None if None in errors else math.hypot(*errors)  # type: ignore[arg-type]


def verdict(ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Whether samples are ``"better"`` or ``"worse"`` than others by the deciding criteria that both have.

    ``"mixed"`` is better in one and worse in another, ``"level"`` is neither beyond noise.
    """
    signs = {_sign(name, ours[name], other[name]) for name in CRITERIA if name in ours and name in other}
    if signs >= {-1, 1}:
        return "mixed"
    return "better" if 1 in signs else "worse" if -1 in signs else "level"


def _sign(name: str, ours: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """1 where the difference is an improvement beyond noise, -1 where it is the opposite, else 0."""
    criterion = CRITERIA[name]
    difference, error = change(ours, other)
    if not criterion.decides or error is None or abs(difference) <= max(Z * error, criterion.noticeable):
        return 0
    return criterion.better if difference > 0 else -criterion.better


# -- several sets of seeds ---------------------------------------------------------------------------------------------


def pooled(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The criteria over several sets of samples, from seeds of their own.

    Distances are the mean over the sets, so that they stay those of one set's number of samples; what is measured of
    each image is taken over all images.
    """
    if len(parts) == 1:
        return dict(parts[0])
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: {**_pooled(name, [part[name] for part in parts]), "sets": len(parts)} for name in names}


def _pooled(name: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if name == "read":
        return _share(np.array([value for part in parts for value in part["values"]], dtype=bool))
    told: dict[str, Any] = {**parts[0], "value": float(np.mean([part["value"] for part in parts]))}
    if parts[0].get("resampled"):
        told["resampled"] = np.mean([part["resampled"] for part in parts], axis=0).tolist()
    if parts[0].get("values"):
        told["values"] = [value for part in parts for value in part["values"]]
        told["worst"] = (min if told["higher_is_better"] else max)(part["worst"] for part in parts)
    if "spread" in told:
        told["spread"] = float(np.mean([part["spread"] for part in parts]))
    if "low" in told:
        half = Z * _pooled_error(told, parts)
        told |= {"low": told["value"] - half, "high": told["value"] + half}
        if parts[0]["low"] >= 0:  # distances and shares have no negative ones
            told["low"] = max(0.0, told["low"])
    return told


def _pooled_error(told: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> float:
    """Standard error of a mean over sets: from the pooled details, or where there are none from each set's error."""
    if told.get("resampled") or told.get("values"):
        return standard_error(told) or 0.0
    return math.hypot(*(standard_error(part) or 0.0 for part in parts)) / len(parts)


def is_equal_to_full(told: Mapping[str, Any]) -> bool:
    """Whether a PSNR is that of images that equal full sampling's."""
    return bool(told["value"] >= PSNR_LIMIT)
