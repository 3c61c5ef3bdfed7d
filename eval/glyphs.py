"""Judging glyph samples: distance to held-out renders, and whether they show the character that was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fastdiff.eval.quality import FeatureStatistics, fid, resample_fid, wilson_interval
from fastdiff.zoo.check import HELD_OUT_SEED
from fastdiff.zoo.data import render_many, to_tensor
from fastdiff.zoo.reader import GlyphReader

BATCH = 256


@dataclass(frozen=True)
class Score:
    """How good a set of glyph images is.

    Args:
        samples: number of images.
        fid: Fréchet distance of the reader's features to the reference renders; depends on the number of samples.
        resampled: the same distance of resampled sets (`fastdiff.eval.resample_fid`).
        correct: images that the reader takes for the character they were to show.
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
    """

    def __init__(self, reader: GlyphReader, renders: int = 2000, seed: int = HELD_OUT_SEED) -> None:
        self._reader = reader.eval()
        self.renders = renders
        self.seed = seed
        features, _ = self._look(render_many(seed, 0, renders)[0])
        self._reference = FeatureStatistics.of(features)

    def score(self, images: np.ndarray, characters: np.ndarray) -> Score:
        """Score images.

        Args:
            images: uint8 of shape ``(samples, 32, 32, 3)``.
            characters: what each was to show, indices into `fastdiff.zoo.data.CHARACTERS`.

        Raises:
            ConfigError: if there are fewer than two images.
        """
        features, read = self._look(images)
        correct = int((read == np.asarray(characters)).sum())
        return Score(
            len(images),
            fid(features, self._reference),
            resample_fid(features, self._reference),
            correct,
            *wilson_interval(correct, len(images)),
        )

    def score_renders(self, count: int) -> Score:
        """The score of renders that are not in the reference: what perfect samples of this number would get."""
        images, labels = render_many(self.seed, self.renders, count)
        return self.score(images, labels[:, 0])

    @torch.no_grad()
    def _look(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features of shape ``(samples, dim)`` and the character read in each image."""
        features, read = [], []
        for batch in torch.from_numpy(images).split(BATCH):
            pixels = to_tensor(batch).to(self._reader.device, self._reader.dtype)
            seen = self._reader.features(pixels)
            features.append(seen.float().cpu().numpy())
            read.append(self._reader.heads["character"](seen).argmax(dim=1).cpu().numpy())
        return np.concatenate(features), np.concatenate(read)
