"""Glyphs as an evaluation asks for them, and whether samples show what was asked for.

What was asked of a set of images is one array, as `fastdiff.zoo.captions.caption_sequence` returns it: the character,
or the character, foreground and background of each image; or None where nothing was asked and an image only has to be
legible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastdiff.eval.tasks import Task, make_task
from fastdiff.pipelines.calling import call_parameters
from fastdiff.zoo.captions import caption_sequence
from fastdiff.zoo.check import HELD_OUT_SEED
from fastdiff.zoo.data import BOLD_DIGITS, CHARACTERS, LABELS, Subset, render_many, to_tensor
from fastdiff.zoo.reader import QUESTIONS, GlyphReader

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BATCH = 256

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
