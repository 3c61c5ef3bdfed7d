"""The catalogue of tiny UNets: one for every UNet class of diffusers, and for every kind of block and embedding."""

from __future__ import annotations

import diffusers

from . import unet_condition, unet_unconditional, unet_video
from .base import TinyModel

ENTRIES = (*unet_unconditional.ENTRIES, *unet_condition.ENTRIES, *unet_video.ENTRIES)
TINY_UNETS: dict[str, TinyModel] = {entry.name: entry for entry in ENTRIES if entry.available}
"""Class name, with a word on the variant where there are several, to tiny UNet."""

_REASONS = {
    "MotionAdapter": "a collection of motion modules that UNetMotionModel is made with",
    "UVit2DModel": "predicts the tokens of a vector-quantised image and has no skips from an encoder to a decoder",
}
UNETS_NOT_COVERED: dict[str, str] = {name: why for name, why in _REASONS.items() if hasattr(diffusers, name)}
"""Class name to the reason why the catalogue has no model for it."""
