"""Uncertainty modules with random weights, which find samples to be of different certainty."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdiff.backbones import view
from fastdiff.uem import UncertaintyModules


def width_of(denoiser: nn.Module) -> int:
    """Returns the channels of a tiny transformer's hidden state."""
    config: Any = denoiser.config
    return int(config.num_attention_heads * config.attention_head_dim)


def random_modules(denoiser: nn.Module, **settings: Any) -> UncertaintyModules:
    """Returns modules for every exit of a tiny transformer."""
    backbone = view(denoiser)
    exits = [unit.name for unit in backbone.units[1:] if unit.traits.can_exit]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = UncertaintyModules(
            backbone.class_name, len(backbone.units), exits, width_of(denoiser), outputs=16, **settings
        )
        for module in modules.uncertainty:
            nn.init.normal_(module.probe.weight)
        for head in modules.exit_heads:
            for parameter in head.parameters():
                nn.init.normal_(parameter, std=0.1)
    return modules.eval()
