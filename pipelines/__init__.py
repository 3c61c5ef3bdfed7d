"""Accelerated diffusers pipelines: `FastDiffPipeline`, `enable`, `disable` and `disabled`."""

from __future__ import annotations

from fastdiff.pipelines.pipeline import FastDiffPipeline, disable, disabled, enable, is_enabled

__all__ = ["FastDiffPipeline", "disable", "disabled", "enable", "is_enabled"]
