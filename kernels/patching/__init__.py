"""Models of diffusers with fastdiff's operations in place of their own: `optimize`, `restore`."""

from __future__ import annotations

from fastdiff.kernels.patching.optimizing import optimize, restore
from fastdiff.kernels.patching.report import OptimizeReport

__all__ = ["OptimizeReport", "optimize", "restore"]
