"""Tiny pipelines of UNets: seeded random weights, tokenizers of their own, nothing downloaded."""

from __future__ import annotations

import diffusers

from . import (
    further_pipelines,
    guided_pipelines,
    pixel_pipelines,
    sd_pipelines,
    sdxl_pipelines,
    staged_pipelines,
    video_pipelines,
)
from .pipeline_base import TinyPipeline

_MODULES = (
    sd_pipelines,
    sdxl_pipelines,
    guided_pipelines,
    pixel_pipelines,
    video_pipelines,
    staged_pipelines,
    further_pipelines,
)
UNET_PIPELINES: dict[str, TinyPipeline] = {
    entry.name: entry
    for module in _MODULES
    for entry in module.ENTRIES
    if hasattr(diffusers, entry.name.partition(" (")[0])
}
"""Name to tiny pipeline, for the classes that the installed diffusers has."""
