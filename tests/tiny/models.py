"""The catalogue: one tiny model for every denoising transformer class of diffusers."""

from __future__ import annotations

from . import image, joint
from .base import TinyModel

TINY_MODELS: dict[str, TinyModel] = {
    entry.name: entry for entry in (*image.ENTRIES, *joint.ENTRIES) if entry.available
}
"""Class name to tiny model, for the classes that the installed diffusers has."""

NOT_COVERED: dict[str, str] = {}
"""Class name to the reason why the catalogue has no model for it."""
