"""How a diffusers denoiser is seen as a sequence of units; one file per family of backbones."""

from __future__ import annotations

from torch import nn

from fastdiff.backbones.base import Backbone, BlockIO, SkipSite, Unit
from fastdiff.backbones.transformer import register_block, transformer_backbone
from fastdiff.backbones.unet import control_backbone, is_control, is_unet, unet_backbone
from fastdiff.errors import ConfigError

__all__ = [
    "LEVELS",
    "Backbone",
    "BlockIO",
    "SkipSite",
    "Unit",
    "is_compiled",
    "is_control",
    "register_block",
    "unwrap",
    "view",
]

LEVELS = ("layer", "branch")
"""How finely a denoiser can be seen; transformers are seen by blocks at either."""


def unwrap(denoiser: nn.Module) -> nn.Module:
    """The module under `torch.compile`'s wrapper, or the module itself."""
    return getattr(denoiser, "_orig_mod", denoiser)


def is_compiled(denoiser: nn.Module) -> bool:
    """Whether a module is compiled as a whole, which blocks that are compiled one by one do not make it."""
    return unwrap(denoiser) is not denoiser or getattr(denoiser, "_compiled_call_impl", None) is not None


def view(denoiser: nn.Module, level: str = "layer") -> Backbone:
    """See a denoiser as a sequence of units.

    Args:
        denoiser: a diffusers transformer, UNet or ControlNet, or any module whose blocks are known (see
            `register_block`).
        level: how finely a UNet is seen: ``"layer"`` or ``"branch"``.

    Raises:
        UnsupportedBackboneError: naming the class and what is missing.
        ConfigError: for another level.
    """
    if level not in LEVELS:
        raise ConfigError(f"A denoiser is seen at the level {' or '.join(map(repr, LEVELS))}; got {level!r}.")
    module = unwrap(denoiser)
    if is_control(module):
        return control_backbone(module)
    if is_unet(module):
        return unet_backbone(module, level)
    return transformer_backbone(module)
