"""Long skip connections scaled as the decoder reads them: by how much in each evaluation, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff.errors import ConfigError
from fastdiff.kernels.concatenation import times
from fastdiff.kernels.steps import Steps

if TYPE_CHECKING:
    from fastdiff.methods.base import Method, PlanRequest

NO_KERNELS = Steps()

Scale = float | torch.Tensor | None
"""What a skip is multiplied with: nothing; a number; for several evaluations as one batch a tensor with one for each.

A compiler guards on the value of a number, so one that changes between evaluations is a tensor without dimensions.
"""

SKIP_CONTROL = ("down_block_additional_residuals", "controlnet_block_samples")
"""Names under which denoisers take what ControlNets add to their long skips, one tensor for each in their order."""


@dataclass(frozen=True)
class SkipScales:
    """By how much the decoder reads the long skips scaled.

    Args:
        table: factor of every skip in every evaluation, shape ``(evaluations, skips)``, float64; skips in the order in
            which the encoder makes them.
        scales_control: whether what ControlNets add to the skips is scaled with them.
    """

    table: np.ndarray
    scales_control: bool = True

    @classmethod
    def of(cls, methods: Iterable[Method], request: PlanRequest) -> SkipScales | None:
        """The product of what some methods ask for; None if none of them scales anything.

        Raises:
            ConfigError: if a method's table does not fit the call, or they disagree about ControlNets.
        """
        if request.backbone.is_control:
            return None
        asked = [(table, method) for method in methods if (table := method.skip_scales(request)) is not None]
        if not asked:
            return None
        shape = (len(request.grid), request.backbone.skips)
        for table, method in asked:
            if table.shape != shape:
                raise ConfigError(
                    f"{method} gives skip scales of shape {table.shape}; this call has (evaluations, skips) = {shape}."
                )
        if len(control := {method.scales_control for _, method in asked}) > 1:
            names = " and ".join(str(method) for _, method in asked)
            raise ConfigError(f"{names} differ in whether they scale what ControlNets add. Make exclude_control equal.")
        return cls(np.prod([table for table, _ in asked], axis=0), control.pop())

    def at(self, rows: Sequence[int], device: torch.device | None) -> tuple[Scale, ...] | None:
        """The scale of each skip for one evaluation, or for several as one batch; None if nothing is scaled."""
        if not len(rows) or max(rows) >= len(self.table):
            return None
        table = self.table[list(rows)]
        if (table == 1).all():
            return None
        constant = (self.table == self.table[0]).all(axis=0)
        scales: list[Scale] = []
        for skip, column in enumerate(table.T):
            if (column == 1).all():
                scales.append(None)
            elif constant[skip]:
                scales.append(float(column[0]))
            elif len(rows) == 1:  # on the host, where no transfer to the device is needed
                scales.append(torch.tensor(column[0], dtype=torch.float32))
            else:
                scales.append(torch.tensor(column, dtype=torch.float32, device=device))
        return tuple(scales)


def control_of(arguments: Mapping[str, Any]) -> Sequence[torch.Tensor] | None:
    """What a call adds to its long skips, in their order; None if nothing.

    Without a residual for the bottleneck, UNets that know T2I-Adapters take the others for an adapter's.
    """
    name = next((name for name in SKIP_CONTROL if arguments.get(name) is not None), None)
    if name is None or (name == SKIP_CONTROL[0] and arguments.get("mid_block_additional_residual") is None):
        return None
    return tuple(arguments[name])


def scaled(features: Any, scale: Scale, control: torch.Tensor | None = None, steps: Steps = NO_KERNELS) -> Any:
    """A skip times its scale, as a new tensor; the very same if there is nothing to scale.

    Args:
        features: what the encoder made, with what was added to it, shape ``(batch, ...)``.
        scale: the factor, or one for each of the evaluations that follow each other in the batch.
        control: what was added to it and is not to be scaled, same shape.
        steps: the operations that compute it.
    """
    if scale is None or features is None:
        return features
    if control is None:
        return steps.scaled(features, scale)
    return times(features, scale) + times(control, 1 - scale)
