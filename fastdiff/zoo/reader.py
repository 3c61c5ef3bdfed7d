"""A small network that reads glyph images: which character, which font, which colours.

It is the judge of the zoo's samples, and its features stand in for Inception's when distances between sets of glyph
images are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from .data import CHARACTERS, COLORS, FONTS, color_pairs

QUESTIONS = ("character", "foreground", "background")
"""What a model may be asked to draw, in the order in which it is asked."""

LEGIBLE_PROBABILITY = 0.99
"""Certainty about the character from which an image counts as legible; what it lets pass is in ``docs/zoo.md``."""


@dataclass
class GlyphReaderOutput(BaseOutput):
    """Logits of the four questions, each (batch, answers)."""

    character: torch.Tensor
    font: torch.Tensor
    foreground: torch.Tensor
    background: torch.Tensor

    def as_asked(self, asked: torch.Tensor | None) -> torch.Tensor:
        """Which images show what was asked for.

        Args:
            asked: int64 (batch, questions): the right answers to the first so many of ``QUESTIONS``, or (batch,)
                for the character only. An image of which nothing was asked (None) has to be legible.

        Returns:
            bool (batch,), true where every question is answered right.
        """
        if asked is None:
            return self.legible()
        columns = asked.reshape(len(asked), -1).T
        answers = [self[name].argmax(1) for name in QUESTIONS[: len(columns)]]
        return (torch.stack(answers) == columns).all(0)

    def legible(self) -> torch.Tensor:
        """Which images show some character beyond doubt, in a pair of contrasting colours: bool (batch,)."""
        certain = self.character.softmax(1).amax(1) >= LEGIBLE_PROBABILITY
        contrasting = torch.zeros(len(COLORS), len(COLORS), dtype=torch.bool, device=certain.device)
        contrasting[tuple(zip(*color_pairs(), strict=True))] = True
        return certain & contrasting[self.foreground.argmax(1), self.background.argmax(1)]


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(inplace=True)
    )


class GlyphReader(ModelMixin, ConfigMixin):
    """Convolutional classifier with four heads over shared features.

    Args:
        channels: width of each resolution, from 16x16 down to 4x4.
        feature_dim: length of the feature vector.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (32, 64, 96), feature_dim: int = 96):
        super().__init__()
        stages, inputs = [], 3
        for width in channels:
            stages += [_stage(inputs, width, stride=2), _stage(width, width, stride=1)]
            inputs = width
        self.stages = nn.Sequential(*stages)
        side = 32 // 2 ** len(channels)
        self.project = nn.Linear(inputs * side * side, feature_dim)
        answers = {"character": CHARACTERS, "font": FONTS, "foreground": COLORS, "background": COLORS}
        self.heads = nn.ModuleDict({name: nn.Linear(feature_dim, len(values)) for name, values in answers.items()})

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the heads see.

        Args:
            images: float (batch, 3, 32, 32) in [-1, 1].

        Returns:
            (batch, feature_dim), of the model's dtype.
        """
        return nn.functional.silu(self.project(self.stages(images).flatten(1)))

    def answer(self, features: torch.Tensor) -> GlyphReaderOutput:
        """What the features of images, (batch, feature_dim), say."""
        return GlyphReaderOutput(**{name: head(features) for name, head in self.heads.items()})

    def forward(self, images: torch.Tensor) -> GlyphReaderOutput:
        """Reads images, float (batch, 3, 32, 32) in [-1, 1]."""
        return self.answer(self.features(images))

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """The most likely character of each image: int64 (batch,), indices into ``CHARACTERS``."""
        parts = [self(part).character.argmax(1) for part in images.split(batch_size)]
        return torch.cat(parts)
