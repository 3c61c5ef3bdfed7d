"""Judging glyph samples: distance to held-out renders, and whether they show what was asked for.

What was asked of a set of images is one array, as `fastdiff.zoo.captions.caption_sequence` returns it: the character,
or the character, foreground and background of each image; or None where nothing was asked and an image only has to be
legible.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastdiff.eval.quality import FeatureStatistics, fid, resample_fid, wilson_interval
from fastdiff.eval.tasks import Task, make_task
from fastdiff.pipelines.calling import call_parameters
from fastdiff.zoo.captions import caption_sequence
from fastdiff.zoo.check import HELD_OUT_SEED
from fastdiff.zoo.data import BOLD_DIGITS, CHARACTERS, LABELS, Subset, render_many, to_tensor
from fastdiff.zoo.reader import QUESTIONS, GlyphReader

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

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


# -- asking for glyphs -------------------------------------------------------------------------------------------------

READ = {
    0: "share that the reader takes for some character beyond doubt; nothing was asked for",
    1: "share that the reader takes for the character asked for",
    3: "share in which the reader sees the character and both colours asked for",
}
"""What counts as read correctly, by number of questions asked of each image."""


@dataclass(frozen=True, eq=False)
class GlyphTask:
    """Glyphs to sample.

    Args:
        task: what the pipeline is asked for.
        asked: what each image is to show, as `read_as_asked` takes it.
        reference: name of the renders to hold the samples against, see `fastdiff.eval.reference`.
        subset: what these show; None for everything.
    """

    task: Task
    asked: np.ndarray | None = None
    reference: str = "zoo:glyphs"
    subset: Subset | None = None

    @property
    def questions(self) -> int:
        """How many of `fastdiff.zoo.reader.QUESTIONS` an image has to answer right."""
        return 0 if self.asked is None else self.asked.reshape(len(self.asked), -1).shape[1]

    @property
    def read(self) -> str:
        """What counts as read correctly."""
        return READ[self.questions]

    def renders(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Renders as perfect samples, uint8 ``(count, 32, 32, 3)``, and what is to be read in them."""
        images, labels = render_many(HELD_OUT_SEED, start, count, self.subset)
        columns = [LABELS.index(name) for name in QUESTIONS[: self.questions]]
        return images, labels[:, columns] if columns else None


def glyph_task(pipe: DiffusionPipeline, count: int, *, seed: int = 0, guidance_scale: float | None = None) -> GlyphTask:
    """All characters in turn, by class label or caption; or whatever comes, where a pipeline cannot be asked.

    Args:
        pipe: the pipeline.
        count: number of images.
        seed: of the noise, and of the colours in captions.
        guidance_scale: classifier-free guidance, where the pipeline knows it.

    Raises:
        ConfigError: if the pipeline takes neither labels nor prompts nor a number of images.
    """
    parameters = call_parameters(pipe)
    scale = guidance_scale if "guidance_scale" in parameters else None
    if "class_labels" in parameters:
        characters = np.arange(count) % len(CHARACTERS)
        labels = characters.tolist()
        return GlyphTask(make_task(pipe, class_labels=labels, guidance_scale=scale, seed=seed), characters)
    if "prompt" in parameters:
        captions, asked = caption_sequence(count, seed)
        return GlyphTask(make_task(pipe, prompts=captions, guidance_scale=scale, seed=seed), asked)
    task = make_task(pipe, guidance_scale=scale, seed=seed)
    return GlyphTask(task, reference="zoo:glyphs:bold-digits", subset=BOLD_DIGITS)


@torch.no_grad()
def read_as_asked(reader: GlyphReader, images: np.ndarray, asked: np.ndarray | None) -> np.ndarray:
    """Whether each image shows what was asked for, bool ``(n,)``.

    Args:
        reader: judges.
        images: uint8 of shape ``(n, 32, 32, 3)``.
        asked: characters of shape ``(n,)``, indices into `fastdiff.zoo.data.CHARACTERS`; or characters, foregrounds
            and backgrounds of shape ``(n, 3)``, the latter two indices into `fastdiff.zoo.data.COLORS`; or None if
            nothing was asked and an image only has to be legible.
    """
    right = []
    for start in range(0, len(images), BATCH):
        chosen = slice(start, start + BATCH)
        seen = reader.features(to_tensor(images[chosen]).to(reader.device, reader.dtype))
        wanted = None if asked is None else torch.as_tensor(asked[chosen], device=seen.device)
        right.append(reader.answer(seen).as_asked(wanted).cpu().numpy())
    return np.concatenate(right)
