"""UNets and transformers of published models, called alike, with random weights and conditions."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import nn

import architectures
from fastdiff.backbones import Backbone, view
from fastdiff.cost import UnitCosts, count_macs, count_shortcut_macs

GUIDANCE = 5.0
DISTILLED_GUIDANCE = 3.5
FLOW_SHIFT = 3.0


@dataclass(frozen=True)
class Published:
    """A denoiser as published.

    Args:
        name: what it is called in tables, with the size of its images.
        text_tokens: length of its prompts; 0 for labels of classes.
        flow: whether it was trained by flow matching.
        guided: whether every image is two rows, without and with its condition.
        side: tokens in a row of the image, for the one whose latents are packed and whose configuration does not say.
    """

    name: str
    text_tokens: int
    flow: bool = False
    guided: bool = True
    side: int = 0


PUBLISHED = {
    "dit-xl-2-256": Published("DiT-XL/2 256", 0),
    "pixart-sigma-1024": Published("PixArt-Sigma 1024", 300),
    "sd-1.5": Published("SD1.5 512", architectures.TEXT_TOKENS),
    "sdxl-1.0": Published("SDXL 1024", architectures.TEXT_TOKENS),
    "sd3-medium": Published("SD3-medium 1024", 333, flow=True),
    "flux.1-dev": Published("Flux 1024", 512, flow=True, guided=False, side=64),
}
"""By key; the configuration is the JSON file of that name."""

SMALL = {
    "DiTTransformer2DModel": {"sample_size": 8},
    "PixArtTransformer2DModel": {"sample_size": 8, "cross_attention_dim": 32, "caption_channels": 32},
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "pos_embed_max_size": 8,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
    },
    "FluxTransformer2DModel": {
        "num_layers": 2,
        "num_single_layers": 2,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
    },
}
"""What small copies of transformers have less of, beside `SMALL_BLOCKS`."""

SMALL_BLOCKS = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16}
SMALL_TOKENS, SMALL_SIDE = 8, 4


class Denoiser:
    """A denoiser with all that its calls are given.

    Args:
        key: of `PUBLISHED`.
        small: the same layout with fewer blocks, channels and tokens.
        device: where its weights are made; on ``"meta"`` it has shapes only.
        dtype: of its weights.
    """

    def __init__(
        self,
        key: str,
        *,
        small: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.published = PUBLISHED[key]
        settings = config(key, small=small)
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # the largest would not fit in float32 first
        try:
            with torch.device(device):
                made = getattr(diffusers, settings["_class_name"]).from_config(settings)
        finally:
            torch.set_default_dtype(default)
        self.module: ModelMixin = nn.Module.to(made, device, dtype).eval()
        if isinstance(made, DiTTransformer2DModel):
            _embed_alike(made)
        self.text_tokens = min(SMALL_TOKENS, self.published.text_tokens) if small else self.published.text_tokens
        self._side = SMALL_SIDE if small else self.published.side

    def twin(self) -> ModelMixin:
        """Another module with the same tensors, to be compiled or patched by itself."""
        tensors = chain(self.module.parameters(), self.module.buffers())
        return copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors})

    def rows(self, images: int) -> int:
        """Rows of an evaluation."""
        return 2 * images if self.published.guided else images

    def latents(self, images: int) -> torch.Tensor:
        """Random latents, shape ``(images, channels, size, size)``, or ``(images, tokens, channels)`` where packed."""
        settings = self.module.config
        if self.published.side:
            return self._random(images, self._side**2, settings.in_channels)
        return self._random(images, settings.in_channels, settings.sample_size, settings.sample_size)

    def conditions(self, rows: int) -> dict[str, Any]:
        """What a call takes beside latents and timestep."""
        settings = self.module.config
        made = {
            "UNet2DConditionModel": lambda: architectures.conditions(self.module, rows),
            "DiTTransformer2DModel": lambda: {
                "class_labels": torch.arange(rows, device=self.module.device) % settings.num_embeds_ada_norm
            },
            "PixArtTransformer2DModel": lambda: {
                "encoder_hidden_states": self._random(rows, self.text_tokens, settings.caption_channels),
                "encoder_attention_mask": torch.ones(rows, self.text_tokens, device=self.module.device),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
            "SD3Transformer2DModel": lambda: self._joint(rows),
            "FluxTransformer2DModel": lambda: self._joint(rows) | self._places(rows),
        }
        return made[type(self.module).__name__]()

    def arguments(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        first = "sample" if "UNet" in type(self.module).__name__ else "hidden_states"
        # Flux is given the share of noise, the others are given what their schedulers count.
        time = timestep / 1000 if self.published.side else timestep
        return {first: latents, "timestep": time.expand(latents.shape[0])} | conditions

    def scheduler(self) -> Any:
        """DDIM, or Euler's steps of a flow."""
        return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT) if self.published.flow else DDIMScheduler()

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.module.device, dtype=self.module.dtype)

    def _joint(self, rows: int) -> dict[str, Any]:
        settings = self.module.config
        return {
            "encoder_hidden_states": self._random(rows, self.text_tokens, settings.joint_attention_dim),
            "pooled_projections": self._random(rows, settings.pooled_projection_dim),
        }

    def _places(self, rows: int) -> dict[str, Any]:
        """Guidance, and where on the image every token is."""
        like = {"device": self.module.device, "dtype": self.module.dtype}
        side = torch.arange(self._side, **like)
        image = torch.zeros(self._side, self._side, 3, **like)
        image[..., 1], image[..., 2] = side[:, None], side[None, :]
        return {
            "guidance": torch.full((rows,), DISTILLED_GUIDANCE, **like),
            "img_ids": image.flatten(0, 1),
            "txt_ids": torch.zeros(self.text_tokens, 3, **like),
        }


def _embed_alike(model: DiTTransformer2DModel) -> None:
    """Give the blocks of a DiT one embedding's weights, as they have in converted checkpoints."""
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())


def config(key: str, *, small: bool = False) -> dict[str, Any]:
    """The configuration of a denoiser.

    Args:
        key: of `PUBLISHED`.
        small: the same layout with fewer blocks, channels and pixels.
    """
    if key in architectures.TITLES:
        return architectures.config(key, small=small)
    text = (Path(__file__).parent / f"{key}.json").read_text(encoding="utf-8")
    published: dict[str, Any] = json.loads(text)
    return published | SMALL_BLOCKS | SMALL[published["_class_name"]] if small else published


def counted(key: str, *, small: bool = False) -> tuple[Denoiser, Backbone, UnitCosts]:
    """A denoiser without weights, its units, and their MACs for one row, counted without computing.

    Latency is taken to be as the MACs are.
    """
    denoiser = Denoiser(key, small=small, device="meta")
    backbone = view(denoiser.module)
    timestep = torch.zeros((), device="meta")
    arguments = denoiser.arguments(denoiser.latents(1), timestep, denoiser.conditions(1))
    macs, rest = count_macs(backbone, arguments)
    return (
        denoiser,
        backbone,
        UnitCosts(backbone.names, macs, rest, macs, rest, count_shortcut_macs(backbone, arguments)),
    )
