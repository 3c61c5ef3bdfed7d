"""Small trained models that ship with fastdiff, so that everything can be tried and measured offline.

`path` gives the folder of a model; pipelines are plain diffusers folders that `DiffusionPipeline.from_pretrained` loads
without fastdiff, but for the U-ViTs, which `fastdiff.models.UViTPipeline` loads. How they were made and how well they
do is in ``docs/zoo.md``.
"""

from __future__ import annotations

from pathlib import Path

from fastdiff.errors import FastDiffError

__all__ = ["UnknownZooModelError", "names", "path"]

_PREFIX = "zoo:"
_MODELS = {
    "glyphs-dit": "class-conditional latent DiT of digits and capital letters, 14 blocks",
    "glyphs-dit-ase": "the same, fine-tuned to exit early under the schedule 'ase-demo'",
    "glyphs-dit-uem": "the same, fine-tuned with uncertainty modules and exit heads, which are in its folder uem",
    "glyphs-uvit": "class-conditional latent U-ViT of digits and capital letters, 13 blocks with long skips",
    "glyphs-uvit-ase": "the same, fine-tuned to exit early under the schedule 'ase-demo'",
    "glyphs-uvit-uem": "the same, fine-tuned with uncertainty modules and exit heads, which are in its folder uem",
    "glyphs-sd": "text-to-image StableDiffusionPipeline of digits and capital letters in two colours",
    "glyphs-ddpm": "unconditional DDPMPipeline of digits on pixels",
    "glyphs-cnn": "reads character, font and colours of a glyph image; its features serve for distances",
}


class UnknownZooModelError(FastDiffError, KeyError):
    """A name that is no model of the zoo."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0])


def names() -> tuple[str, ...]:
    """The names of the shipped models."""
    return tuple(_MODELS)


def path(name: str) -> Path:
    """The folder of a shipped model.

    Args:
        name: a name from `names`, with or without the prefix ``zoo:``.

    Raises:
        UnknownZooModelError: if there is no such model.
    """
    known = name.removeprefix(_PREFIX)
    if known not in _MODELS:
        raise UnknownZooModelError(f"The zoo has no model {name!r}. It has: {', '.join(_MODELS)}.")
    return Path(__file__).parent / "weights" / known
