"""Exit heads: small trained corrections that turn an early hidden state into one for the model's own output layers."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


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
