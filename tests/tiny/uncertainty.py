"""Uncertainty modules with random weights, which find samples to be of different certainty."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdiff.backbones import view
from fastdiff.uem import UncertaintyModules, make_modules

from .models import TINY_MODELS


def random_modules(denoiser: nn.Module, **settings: Any) -> UncertaintyModules:
    """Returns modules for every exit of a tiny transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = make_modules(denoiser, TINY_MODELS[view(denoiser).class_name].inputs(1, 0), **settings)
        for module in modules.uncertainty:
            nn.init.normal_(module.probe.weight)
        for head in modules.exit_heads:
            for parameter in head.parameters():
                nn.init.normal_(parameter, std=0.1)
    return modules.eval()
