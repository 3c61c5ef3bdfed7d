"""Fused operations: Triton kernels on GPUs that have them, the same in plain torch everywhere else.

Every function takes tensors on any device and of any floating-point dtype, and lets gradients through.
``FASTDIFF_KERNELS`` chooses between kernels and plain torch (`fastdiff.kernels.dispatch`).
"""

from __future__ import annotations

from fastdiff.kernels.dispatch import KernelInputError, KernelUnavailableError
from fastdiff.kernels.exit_head import exit_head
from fastdiff.kernels.geglu import geglu, gelu_tanh
from fastdiff.kernels.group_norm_act import group_norm_act
from fastdiff.kernels.lincomb import lincomb
from fastdiff.kernels.qk_norm_rope import qk_norm_rope
from fastdiff.kernels.residual_norm_modulate import residual_norm_modulate
from fastdiff.kernels.rows import gather_rows, scatter_rows
from fastdiff.kernels.skip_shortcut import skip_shortcut
from fastdiff.kernels.uncertainty_score import uncertainty_score

__all__ = [
    "KernelInputError",
    "KernelUnavailableError",
    "exit_head",
    "gather_rows",
    "geglu",
    "gelu_tanh",
    "group_norm_act",
    "lincomb",
    "qk_norm_rope",
    "residual_norm_modulate",
    "scatter_rows",
    "skip_shortcut",
    "uncertainty_score",
]
