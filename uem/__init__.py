"""Uncertainty estimation modules, which tell for each sample where sampling may stop early."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastdiff.uem.modules import ExitNorm, UncertaintyModule, UncertaintyModules, load_modules
from fastdiff.uem.readout import ExitOutputs, ExitReadout, make_modules

_LAZY = {
    "BudgetError": "fastdiff.uem.calibration",
    "Calibration": "fastdiff.uem.calibration",
    "TrainConfig": "fastdiff.uem.config",
    "calibrate": "fastdiff.uem.calibration",
}
"""Names whose modules take long to import, and where they live."""

__all__ = [
    "BudgetError",
    "Calibration",
    "ExitNorm",
    "ExitOutputs",
    "ExitReadout",
    "TrainConfig",
    "UncertaintyModule",
    "UncertaintyModules",
    "calibrate",
    "load_modules",
    "make_modules",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastdiff.uem' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
