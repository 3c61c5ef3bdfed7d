"""Measuring what acceleration gains and what it costs: sample quality, paired timing, and where numbers come from."""

from __future__ import annotations

from fastdiff.eval.provenance import describe_environment
from fastdiff.eval.quality import FeatureStatistics, fid, psnr, resample_fid, wilson_interval
from fastdiff.eval.speed import Ratio, paired_ratio, time_interleaved

__all__ = [
    "FeatureStatistics",
    "Ratio",
    "describe_environment",
    "fid",
    "paired_ratio",
    "psnr",
    "resample_fid",
    "time_interleaved",
    "wilson_interval",
]
