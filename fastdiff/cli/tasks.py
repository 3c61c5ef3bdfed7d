"""What glyph pipelines are asked for: how each is called, and what every image is to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.errors import UnsupportedPipelineError
from fastdiff.pipelines.calling import call_parameters
from fastdiff.zoo.captions import caption_sequence
from fastdiff.zoo.data import BOLD_DIGITS, CHARACTERS, Subset

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class Task:
    """Images to sample, each with its own request.

    Args:
        requests: arguments of the pipeline's call that hold one value for each image, over and over; empty if nothing
            can be asked.
        shared: arguments that all calls have in common.
        asked: what each image is to show, as `fastdiff.eval.glyphs.GlyphJudge.score` takes it.
        subset: all that the model knows; None for everything.
    """

    requests: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    asked: np.ndarray | None = None
    subset: Subset | None = None

    def arguments(self, indices: range) -> dict[str, Any]:
        """The arguments of a call that makes these images."""
        given: dict[str, Any] = {
            name: [values[index % len(values)] for index in indices] for name, values in self.requests.items()
        }
        return (given or {"batch_size": len(indices)}) | dict(self.shared)

    @property
    def questions(self) -> int:
        """How many of `fastdiff.zoo.reader.QUESTIONS` an image has to answer right."""
        return 0 if self.asked is None else self.asked.reshape(len(self.asked), -1).shape[1]

    @property
    def renders(self) -> str:
        """What samples are held against."""
        if self.subset is None:
            return "held-out renders"
        return f"held-out renders of {self.subset.characters} in {', '.join(self.subset.fonts)}"

    def label(self, index: int) -> str:
        """A short name of an image: the character it is to show, else its number."""
        return str(index) if self.asked is None else CHARACTERS[int(self.asked[index].flat[0])]


def glyph_task(pipe: DiffusionPipeline, count: int, *, seed: int, guidance_scale: float) -> Task:
    """All characters in turn, by class label or caption; or whatever comes, where a pipeline cannot be asked.

    Args:
        pipe: the pipeline.
        count: number of images.
        seed: of the colours in captions.
        guidance_scale: classifier-free guidance, where the pipeline knows it.

    Raises:
        UnsupportedPipelineError: if the pipeline takes neither labels nor prompts nor a number of images.
    """
    parameters = call_parameters(pipe)
    shared = {"guidance_scale": guidance_scale} if "guidance_scale" in parameters else {}
    if "class_labels" in parameters:
        characters = np.arange(count) % len(CHARACTERS)
        return Task({"class_labels": characters.tolist()}, shared, characters)
    if "prompt" in parameters:
        captions, asked = caption_sequence(count, seed)
        return Task({"prompt": captions}, shared, asked)
    if "batch_size" in parameters:
        return Task({}, shared, subset=BOLD_DIGITS)
    raise UnsupportedPipelineError(
        f"{type(pipe).__name__} cannot be asked for glyphs: it takes neither class_labels nor prompt nor batch_size, "
        f"but {', '.join(parameters)}."
    )
