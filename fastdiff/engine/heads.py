"""Exit heads: small trained corrections that turn an early hidden state into one for the model's own output layers."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


class ExitHead(nn.Module):
    """A low-rank correction, ``h + up(down(norm(h)))``; the identity until trained.

    Args:
        width: channels of the hidden state.
        rank: channels of the correction.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Correct a hidden state of shape ``(..., width)``; keeps its dtype."""
        correction = self.norm(hidden_states.to(self.up.weight.dtype))
        return hidden_states + self.up(self.down(correction)).to(hidden_states.dtype)


class StageHead(nn.Module):
    """What a UNet's output layers are given of a sample that stopped between two up stages.

    The hidden state and the first long skip, each linearly projected, the former repeated to the latter's resolution;
    and a low-rank correction of their sum, ``h + up(down(silu(norm(h))))``, nothing until trained. The skip brings the
    noise of single pixels, which no smaller hidden state has.

    Args:
        width: channels of the hidden state.
        read_width: channels of what the output layers read, and of the skip.
        rank: channels of the correction.
    """

    def __init__(self, width: int, read_width: int, rank: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(width, read_width, 1)
        self.carry = nn.Conv2d(read_width, read_width, 1)
        self.norm = nn.GroupNorm(math.gcd(read_width, 32), read_width)
        self.down = nn.Conv2d(read_width, rank, 3, padding=1)
        self.up = nn.Conv2d(rank, read_width, 1)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor, first_skip: torch.Tensor) -> torch.Tensor:
        """Make of a hidden state what the output layers read.

        Args:
            hidden_states: shape ``(batch, width, height, width)`` of any stage.
            first_skip: what the first convolution made, shape ``(batch, read_width, height, width)``.

        Returns:
            Of the skip's shape, and of the hidden state's dtype.
        """
        dtype = self.up.weight.dtype
        projected = self.project(hidden_states.to(dtype))
        read = F.interpolate(projected, first_skip.shape[2:]) + self.carry(first_skip.to(dtype))
        corrected: torch.Tensor = read + self.up(self.down(F.silu(self.norm(read))))
        return corrected.to(hidden_states.dtype)


class ExitHeads(ModelMixin, ConfigMixin):
    """One `ExitHead` for each unit before which a row may exit.

    Args:
        units: names of the first units that do not run, e.g. ``["transformer_blocks.6"]``.
        width: channels of the hidden state.
        rank: channels of each correction.
    """

    @register_to_config
    def __init__(self, units: list[str], width: int, rank: int = 32) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ExitHead(width, rank) for _ in units)

    def by_unit(self) -> dict[str, nn.Module]:
        """The heads by the name of the unit they stand before."""
        return dict(zip(self.config["units"], self.heads, strict=True))
