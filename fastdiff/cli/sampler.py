"""How contenders sample: the pipelines, what is enabled on them, and what a call of theirs really ran."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

import fastdiff
from fastdiff.backbones.unet import is_unet
from fastdiff.cli.contenders import Contender
from fastdiff.cli.tasks import glyph_task
from fastdiff.errors import UnsupportedPipelineError
from fastdiff.pipelines.calling import load, refusals_explained
from fastdiff.plan import ComputePlan
from fastdiff.zoo.reader import GlyphReader

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.cli.comparison import Settings

IMAGE_SHAPE = (32, 32, 3)


@dataclass(frozen=True)
class Ran:
    """What a contender's calls run.

    Args:
        plan: for plain sampling a plan that computes everything.
        macs: of the denoiser for one image.
    """

    plan: ComputePlan
    macs: float


class Sampler:
    """The pipelines, and how a contender samples images with them.

    Args:
        settings: the models, and what to ask of them.

    Raises:
        UnsupportedPipelineError: if a model is no pipeline that samples 32×32 glyphs.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pipes = {False: self._load(settings.model)}
        if settings.finetuned is not None:
            self._pipes[True] = self._load(settings.finetuned)
        self.task = glyph_task(
            self._pipes[False], settings.count, seed=settings.seed, guidance_scale=settings.guidance_scale
        )

    def _load(self, model: str) -> DiffusionPipeline:
        pipe = load(model, self._settings.device, self._settings.dtype, preset="off")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def pipes(self) -> tuple[DiffusionPipeline, ...]:
        """All pipelines."""
        return tuple(self._pipes.values())

    @property
    def has_unet(self) -> bool:
        """Whether the denoiser is a UNet."""
        return any(isinstance(part, nn.Module) and is_unet(part) for part in self._pipes[False].components.values())

    def pipe(self, contender: Contender) -> DiffusionPipeline:
        """The pipeline that a contender samples with."""
        return self._pipes[contender.finetuned]

    def prepare(self, contender: Contender) -> None:
        """Enable the contender's methods; plain contenders get the plain pipeline."""
        pipe = self.pipe(contender)
        if contender.methods:
            fastdiff.enable(pipe, contender.methods)
        else:
            fastdiff.disable(pipe)

    def planned_share(self, contender: Contender) -> float:
        """Share of full sampling's cells that the contender is going to compute."""
        if not contender.methods:
            return contender.steps / self._settings.steps
        self.prepare(contender)
        plan = self.pipe(contender).fastdiff.plan(contender.steps)
        return plan.share * contender.steps / self._settings.steps

    def sample(self, contender: Contender, indices: range) -> np.ndarray:
        """The images of these indices, uint8 of shape ``(len(indices), 32, 32, 3)``; `prepare` comes first."""
        settings = self._settings
        with refusals_explained(f"{settings.model} does not sample as the comparison needs it"):
            images = self.pipe(contender)(
                **self.task.arguments(indices),
                num_inference_steps=contender.steps,
                # On the CPU, so that a seed gives the same noise on every device.
                generator=[torch.Generator("cpu").manual_seed(settings.seed + index) for index in indices],
                output_type="np",
            ).images
        if images.shape != (len(indices), *IMAGE_SHAPE):
            raise UnsupportedPipelineError(
                f"RGB glyphs of 32×32 pixels are read here; {settings.model} made images of shape {images.shape[1:]}."
            )
        return np.rint(images * 255).astype(np.uint8)

    def look(self, contender: Contender) -> Ran:
        """What the contender's last call ran, with its cost; that call made a batch of images."""
        pipe, batch = self.pipe(contender), self._settings.batch
        if contender.methods:
            (record,) = (record for record in pipe.fastdiff.last_run.denoisers.values() if record.calls)
            return Ran(record.plan, record.macs / batch)
        # Plain sampling leaves no record: a neutral method in one more evaluation tells units, grid and price.
        fastdiff.enable(pipe, fastdiff.FeatureInheritance(interval=1))
        self.sample(replace(contender, steps=1), range(batch))
        (record,) = (record for record in pipe.fastdiff.last_run.denoisers.values() if record.calls)
        plan = pipe.fastdiff.plan(contender.steps)
        return Ran(plan, plan.evaluations * record.measure().total_macs / batch)


def load_reader(settings: Settings) -> GlyphReader:
    """The reader that judges.

    Raises:
        UnsupportedPipelineError: if the folder holds none.
    """
    from fastdiff import zoo

    name = settings.reader
    folder = zoo.path(name) if name.startswith("zoo:") else name
    try:
        return GlyphReader.from_pretrained(folder).to(settings.device)
    except (OSError, ValueError) as error:
        raise UnsupportedPipelineError(f"{name!r} cannot be loaded as a reader of glyphs: {error}") from error
