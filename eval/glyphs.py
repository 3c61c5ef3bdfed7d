"""Judging glyph samples: distance to held-out renders, and whether they show what was asked for.

What was asked of a set of images is one array, as `fastdiff.zoo.captions.caption_sequence` returns it: the character,
or the character, foreground and background of each image; or None where nothing was asked and an image only has to be
legible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fastdiff.eval.quality import FeatureStatistics, fid, resample_fid, wilson_interval
from fastdiff.zoo.check import HELD_OUT_SEED
from fastdiff.zoo.data import LABELS, Subset, render_many, to_tensor
from fastdiff.zoo.reader import QUESTIONS, GlyphReader

BATCH = 256


@dataclass(frozen=True)
class Score:
    """How good a set of glyph images is.

    Args:
        samples: number of images.
        fid: Fréchet distance of the reader's features to the reference renders; depends on the number of samples.
        resampled: the same distance of resampled sets (`fastdiff.eval.resample_fid`).
        correct: images that the reader reads as they were asked for (`GlyphReaderOutput.as_asked`).
        read_low: lower end of the 95 % Wilson interval of that share.
        read_high: its upper end.
    """

    samples: int
    fid: float
    resampled: np.ndarray = field(repr=False, compare=False)
    correct: int
    read_low: float
    read_high: float

    @property
    def read_share(self) -> float:
        """Share of images read correctly."""
        return self.correct / self.samples

    @property
    def fid_error(self) -> float:
        """Standard error of the distance."""
        return float(self.resampled.std(ddof=1))

    def fid_change(self, baseline: Score) -> tuple[float, float]:
        """The distance less a baseline's, and the standard error of that, for samples of the same seeds."""
        return self.fid - baseline.fid, float((self.resampled - baseline.resampled).std(ddof=1))

    @property
    def fid_interval(self) -> tuple[float, float]:
        """95 % interval of the distance."""
        return max(0.0, self.fid - 1.96 * self.fid_error), self.fid + 1.96 * self.fid_error


class GlyphJudge:
    """Scores sets of images against renders that no model was trained on.

    Args:
        reader: the network whose features and readings count.
        renders: number of reference renders.
        seed: the stream they come from.
        subset: what the renders show; everything by default. For ``glyphs-ddpm``, `fastdiff.zoo.data.BOLD_DIGITS`.
    """

    def __init__(
        self, reader: GlyphReader, renders: int = 2000, seed: int = HELD_OUT_SEED, subset: Subset | None = None
    ) -> None:
        self._reader = reader.eval()
        self.renders = renders
        self.seed = seed
        self.subset = subset
        features, _ = self._look(render_many(seed, 0, renders, subset)[0], None)
        self._reference = FeatureStatistics.of(features)

    def score(self, images: np.ndarray, asked: np.ndarray | None = None) -> Score:
        """Score images.

        Args:
            images: uint8 of shape ``(samples, 32, 32, 3)``.
            asked: what each was to show: characters of shape ``(samples,)``, indices into
                `fastdiff.zoo.data.CHARACTERS`; or characters, foregrounds and backgrounds of shape ``(samples, 3)``,
                the latter two indices into `fastdiff.zoo.data.COLORS`; or None if nothing was asked.

        Raises:
            ConfigError: if there are fewer than two images.
        """
        features, read = self._look(images, asked)
        correct = int(read.sum())
        return Score(
            len(images),
            fid(features, self._reference),
            resample_fid(features, self._reference),
            correct,
            *wilson_interval(correct, len(images)),
        )

    def score_renders(self, count: int, questions: int = 1) -> Score:
        """The score of renders that are not in the reference: what perfect samples of this number would get.

        Args:
            count: number of renders.
            questions: how many of `fastdiff.zoo.reader.QUESTIONS` to ask of each; none means that it is to be legible.
        """
        images, labels = render_many(self.seed, self.renders, count, self.subset)
        asked = labels[:, [LABELS.index(name) for name in QUESTIONS[:questions]]]
        return self.score(images, asked if questions else None)

    @torch.no_grad()
    def _look(self, images: np.ndarray, asked: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Features of shape ``(samples, dim)`` and whether each image is read as asked."""
        features, read = [], []
        for start in range(0, len(images), BATCH):
            chosen = slice(start, start + BATCH)
            pixels = to_tensor(images[chosen]).to(self._reader.device, self._reader.dtype)
            seen = self._reader.features(pixels)
            features.append(seen.float().cpu().numpy())
            wanted = None if asked is None else torch.as_tensor(asked[chosen], device=seen.device)
            read.append(self._reader.answer(seen).as_asked(wanted).cpu().numpy())
        return np.concatenate(features), np.concatenate(read)
