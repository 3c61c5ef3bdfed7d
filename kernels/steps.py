"""What fastdiff itself computes between blocks: forecasts, scaled skips, which samples stop one by one, and their rows.

These are torch's operations. On a model that `fastdiff.optimize` has treated, each is one kernel where that can run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastdiff.kernels import lincomb, rows, uncertainty_score
from fastdiff.kernels.concatenation import Factor, Skip, may_defer, times
from fastdiff.kernels.dispatch import fused
from fastdiff.kernels.residual_norm_modulate import Rounding

_ATTRIBUTE = "_fastdiff_rounding"


@dataclass(frozen=True)
class Steps:
    """The operations between blocks.

    Attributes:
        rounding: how kernels round; None where none may run.
    """

    rounding: Rounding | None = None

    def weighted_sum(
        self, weights: torch.Tensor, tensors: Sequence[torch.Tensor], start: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``start`` plus the sum of tensors, each times its weight.

        Args:
            weights: float32 on the host, shape ``(tensors,)``.
            tensors: of equal shape and dtype.
            start: of their shape.
        """
        # A kernel rounds once where torch rounds every product and sum.
        if self.rounding == "fused" and not torch.compiler.is_compiling():
            layout = lincomb.sample_layout(tensors[0])
            # A model's first hidden state may lie transposed in memory, and what was added to it may not.
            joined = start is not None and lincomb.sample_layout(start) == layout
            given = (*tensors, start) if start is not None and joined else tuple(tensors)
            coefficients = _on_device((*weights.tolist(), *[1.0] * joined), tensors[0].device)
            if fused("lincomb", lincomb.supported, coefficients, given, None):
                total = lincomb.lincomb(coefficients, *given)
                return total if start is None or joined else start + total
        total = sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
        return total if start is None else start + total

    def scaled(self, features: torch.Tensor, factor: Factor) -> torch.Tensor:
        """A long skip times a factor, by which operations that read it apart multiply on their own."""
        if self.rounding == "fused" and may_defer(features):
            return Skip(features, factor)
        return times(features, factor)

    def gather(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Some samples of a batch, ``x[index]``."""
        if self._copies(x) and fused("gather_rows", rows.supported, x):
            return rows.gather_rows(x, index)
        return x.index_select(0, index)

    def scatter(self, x: torch.Tensor, index: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A copy of a batch with some samples replaced, ``copy[index] = part``."""
        if self._copies(x, part) and fused("scatter_rows", rows.supported, x, part):
            return rows.scatter_rows(x.clone(), index, part)
        return x.index_copy(0, index, part)

    def score_at_once(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether `uncertainty_score` stands for a linear layer with sigmoid and mean.

        In torch's operations the layer gives numbers of its own dtype, and tokens are given that; the kernel computes
        with either as with float32.
        """
        if self.rounding != "fused" or torch.compiler.is_compiling():
            return False
        return fused("uncertainty_score", uncertainty_score.supported, tokens, weight, bias, None)

    def _copies(self, *tensors: torch.Tensor) -> bool:
        """Whether kernels may run, and read what lies in memory as these do."""
        if self.rounding is None or torch.compiler.is_compiling():
            return False
        return all(tensor.is_floating_point() and tensor[:1].is_contiguous() for tensor in tensors)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Coefficients where a kernel reads them: moved once, not at every step, and before a CUDA graph is recorded."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def steps_of(model: nn.Module) -> Steps:
    """The operations that fastdiff uses on a model."""
    return Steps(vars(model).get(_ATTRIBUTE))


def allow(model: nn.Module, rounding: Rounding) -> None:
    """Let fastdiff's own steps on a model run as kernels."""
    vars(model)[_ATTRIBUTE] = rounding


def forbid(model: nn.Module) -> None:
    """Take that back."""
    vars(model).pop(_ATTRIBUTE, None)
