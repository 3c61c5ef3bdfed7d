"""How a diffusers denoiser is seen as a sequence of units; one file per family of backbones."""

from __future__ import annotations

from torch import nn

from fastdiff.backbones.base import Backbone, BlockIO, Unit
from fastdiff.backbones.transformer import register_block, transformer_backbone

__all__ = ["Backbone", "BlockIO", "Unit", "register_block", "unwrap", "view"]


def unwrap(denoiser: nn.Module) -> nn.Module:
    """The module under `torch.compile`'s wrapper, or the module itself."""
    return getattr(denoiser, "_orig_mod", denoiser)


def view(denoiser: nn.Module) -> Backbone:
    """See a denoiser as a sequence of units.

    Args:
        denoiser: a diffusers transformer, or any module whose blocks are known (see `register_block`).

    Raises:
        UnsupportedBackboneError: naming the class and what is missing.
    """
    return transformer_backbone(unwrap(denoiser))
