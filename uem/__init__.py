"""Uncertainty estimation modules, which tell for each sample where sampling may stop early."""

from __future__ import annotations

from fastdiff.uem.modules import ExitNorm, UncertaintyModule, UncertaintyModules, load_modules
from fastdiff.uem.readout import ExitOutputs, ExitReadout, make_modules

__all__ = [
    "ExitNorm",
    "ExitOutputs",
    "ExitReadout",
    "UncertaintyModule",
    "UncertaintyModules",
    "load_modules",
    "make_modules",
]
