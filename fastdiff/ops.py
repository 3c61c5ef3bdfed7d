"""Fused operations: Triton kernels on GPUs that have them, the same in plain torch everywhere else.

Every function takes tensors on any device and of any floating-point dtype, and lets gradients through.
``FASTDIFF_KERNELS`` chooses between kernels and plain torch (`fastdiff.kernels.dispatch`).
"""

from __future__ import annotations

from fastdiff.kernels.dispatch import KernelInputError, KernelUnavailableError
from fastdiff.kernels.lincomb import lincomb

__all__ = ["KernelInputError", "KernelUnavailableError", "lincomb"]
