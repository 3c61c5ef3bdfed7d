"""Measuring what acceleration gains and what it costs: sample quality, paired timing, and where numbers come from."""

from __future__ import annotations

from fastdiff.eval.features import (
    FeatureNet,
    FeatureWeightsError,
    ImageDataError,
    MissingLibraryError,
    extract,
    load_feature_net,
)
from fastdiff.eval.metrics import (
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    SetQuality,
    measure_set,
)
from fastdiff.eval.paired import ClipScorer, Lpips, PerImage, latent_error, load_clip, load_lpips, measure_pairs
from fastdiff.eval.provenance import describe_environment
from fastdiff.eval.quality import FeatureStatistics, fid, psnr, resample_fid, wilson_interval
from fastdiff.eval.reference import Reference, ReferenceSetError, load_reference
from fastdiff.eval.speed import Ratio, paired_ratio, time_interleaved

__all__ = [
    "ClipScorer",
    "FeatureNet",
    "FeatureStatistics",
    "FeatureWeightsError",
    "FrechetDistance",
    "ImageDataError",
    "InceptionScore",
    "KernelDistance",
    "Lpips",
    "MissingLibraryError",
    "PerImage",
    "PrecisionRecall",
    "Ratio",
    "Reference",
    "ReferenceSetError",
    "SetQuality",
    "describe_environment",
    "extract",
    "fid",
    "latent_error",
    "load_clip",
    "load_feature_net",
    "load_lpips",
    "load_reference",
    "measure_pairs",
    "measure_set",
    "paired_ratio",
    "psnr",
    "resample_fid",
    "time_interleaved",
    "wilson_interval",
]
