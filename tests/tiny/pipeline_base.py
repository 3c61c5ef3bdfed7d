"""What a tiny pipeline is, and how the arguments of its calls are drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import BaseOutput

import fastdiff.models

from .base import HEIGHT, TEXT_DIM, TEXT_TOKENS, WEIGHT_SEED, Draw, build

PIXELS = 8 * HEIGHT
CLASSES = 10
POOLED_DIM = 24
PROMPT_SEED = 1000
"""Added to a call's seed for its prompts, which would otherwise equal its noise."""


@dataclass(frozen=True)
class TinyPipeline:
    """One pipeline at a size that samples in well under a second on a CPU.

    Attributes:
        name: Key in `TINY_PIPELINES`; the class name, with a word on the variant where there are several.
        build: Returns the pipeline: seeded, float32, CPU, progress bar off.
        inputs: `(batch=1, steps=4, guidance=True, seed=0, **overrides)` to the keyword arguments of a call. They
            hold a fresh generator, so draw them anew for every call.
        denoisers: Names of the components that predict noise.
        ignores: Those of the arguments of `inputs` that the pipeline has no use for.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    inputs: Callable[..., dict[str, Any]]
    denoisers: tuple[str, ...]
    ignores: frozenset[str] = frozenset()

    def sample(self, pipe: DiffusionPipeline, **arguments: Any) -> torch.Tensor:
        """Returns the images, videos or latents of one call; the arguments are those of `inputs`."""
        torch.manual_seed(0)  # DiTPipeline does not hand its generator to the scheduler
        result = pipe(**self.inputs(**arguments), return_dict=False)
        while isinstance(result, (tuple, BaseOutput)):  # images come first, before flags, depth maps and the like
            result = result[0]
        return torch.stack([torch.as_tensor(item) for item in result])


@dataclass(frozen=True)
class Call:
    """What the arguments of one pipeline call are drawn for."""

    draw: Draw
    batch: int
    guidance: bool

    def text(self, scale: float = 7.5) -> dict[str, Any]:
        """Returns prompts in words, and negative ones where guidance is on."""
        return {name: self.words() for name in self.named("prompt")} | self.scale(scale)

    def words(self) -> list[str]:
        """Returns a few random words per item."""
        letters = self.draw.ints(26, self.batch, 2, 3).tolist()
        return [" ".join("".join(chr(ord("a") + letter) for letter in word) for word in words) for words in letters]

    def scale(self, scale: float) -> dict[str, Any]:
        """Returns a guidance scale that is 1 where guidance is off."""
        return {"guidance_scale": scale if self.guidance else 1.0}

    def embeds(self, *shape: int) -> torch.Tensor:
        """Returns one conditioning tensor per item, of shape `(batch, *shape)`."""
        return self.draw(self.batch, *shape)

    def named(self, *names: str) -> list[str]:
        """Returns the names and, where guidance is on, their `negative_` counterparts."""
        prefixes = ("", "negative_") if self.guidance else ("",)
        return [prefix + name for prefix in prefixes for name in names]

    def prompt(self, scale: float, argument: str = "guidance_scale") -> dict[str, Any]:
        """Returns prompt embeddings, and negative ones where guidance is on."""
        embeds = {name: self.embeds(TEXT_TOKENS, TEXT_DIM) for name in self.named("prompt_embeds")}
        return embeds | {argument: scale if self.guidance else 1.0}

    def pooled(self) -> dict[str, Any]:
        """Returns pooled prompt embeddings, and negative ones where guidance is on."""
        return {name: self.embeds(POOLED_DIM) for name in self.named("pooled_prompt_embeds")}

    def masks(self, *names: str, tokens: int = TEXT_TOKENS) -> dict[str, Any]:
        """Returns all-ones masks: the named ones and, where guidance is on, their `negative_` counterparts."""
        return {name: torch.ones(self.batch, tokens) for name in self.named(*names)}

    def image(self, size: int = PIXELS, channels: int = 3) -> torch.Tensor:
        """Returns images in `[0, 1]`, of shape `(batch, channels, size, size)`."""
        return self.embeds(channels, size, size).sigmoid()

    def mask(self, size: int = PIXELS) -> torch.Tensor:
        """Returns masks that are 1 in the left half, of shape `(batch, 1, size, size)`."""
        mask = torch.zeros(self.batch, 1, size, size)
        mask[..., : size // 2] = 1
        return mask


def pipeline(
    class_name: str,
    components: Callable[[], dict[str, Any]],
    arguments: Callable[[Call], dict[str, Any]],
    variant: str = "",
    denoisers: tuple[str, ...] = ("transformer",),
    ignores: Collection[str] = (),
) -> TinyPipeline:
    """Returns the entry of a diffusers pipeline class.

    Args:
        class_name: Name of the class.
        components: Returns the constructor's arguments; required ones that it leaves out are None.
        arguments: The call's arguments beside steps, generator and output type.
        variant: Distinguishes several entries of one class.
        denoisers: Names of the components that predict noise.
        ignores: Those of batch, steps, guidance and seed that the pipeline has no use for.
    """

    def build_pipeline() -> DiffusionPipeline:
        cls = _class_of(class_name)
        parameters = inspect.signature(cls.__init__).parameters
        absent = dict.fromkeys([name for name, p in parameters.items() if p.default is p.empty and name != "self"])
        if "requires_safety_checker" in parameters:
            absent["requires_safety_checker"] = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(WEIGHT_SEED)  # some pipelines make a model of their own
            pipe = cls(**(absent | components()))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def inputs(
        batch: int = 1, steps: int = 4, guidance: bool = True, seed: int = 0, **overrides: Any
    ) -> dict[str, Any]:
        call = {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
        }
        taken = inspect.signature(_class_of(class_name).__call__).parameters
        prompts = Draw(PROMPT_SEED + seed)
        own = {name: value for name, value in call.items() if name in taken}
        return own | arguments(Call(prompts, batch, guidance)) | overrides

    name = f"{class_name} ({variant})" if variant else class_name
    return TinyPipeline(name, build_pipeline, inputs, denoisers, frozenset(ignores))


def _class_of(name: str) -> type[DiffusionPipeline]:
    """Returns a pipeline class of diffusers, or one of ours."""
    return getattr(diffusers, name, None) or getattr(fastdiff.models, name)


def vae(halvings: int = 3, **changes: Any) -> AutoencoderKL:
    """Returns an autoencoder of 4 latent channels that halves an image a few times."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * (halvings + 1),
        "up_block_types": ("UpDecoderBlock2D",) * (halvings + 1),
        "block_out_channels": (4,) * (halvings + 1),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "sample_size": PIXELS,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    return build(AutoencoderKL, config | changes)
