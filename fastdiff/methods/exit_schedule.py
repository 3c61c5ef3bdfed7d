"""Adaptive Score Estimation: a fixed map from timestep to the number of blocks that run.

Moon et al., "A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models", ICML 2024
(arXiv 2408.05927), section 3; the step family is the two-depth schedule of DuoDiff.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastdiff.errors import ConfigError
from fastdiff.methods.base import Method, PlanRequest, check_number, check_tuple
from fastdiff.plan import Action, ComputePlan

if TYPE_CHECKING:
    from fastdiff.backbones import Backbone
    from fastdiff.engine.clock import Grid

PRESETS: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "full": ((0,), (28,)),
    "ase-demo": (tuple(range(0, 1000, 100)), (28, 28, 24, 24, 20, 20, 16, 16, 12, 12)),
}
"""Named schedules: lower bin edges in training timesteps and depths for a model of 28 blocks."""

ORDERS = ("output", "middle", "exit")
"""Which blocks are left out first where long skips join the two halves of a denoiser."""


@dataclass(frozen=True)
class ExitSchedule(Method):
    """Run only the first ``S(t)`` blocks at timestep t; the model's own output layers read that hidden state.

    In a U-ViT every long skip is still merged, and blocks are left out of the second half only: a depth below
    the first half and the middle block is raised to them.

    Use it with a model fine-tuned under the same schedule: without that the output layers see features they were never
    trained on, and the result is experimental.

    Args:
        preset: ``"full"`` or ``"ase-demo"`` (the one schedule whose table is public), or None to give a table.
        bin_edges: lower edges of the bins, ascending; the first bin also catches what lies below, the last what lies
            above. Training timesteps from 0 (clean) up, or log signal-to-noise ratios from noisy to clean.
        depths: blocks to run in each bin, at least 1.
        full: number of blocks the depths are meant for; they are scaled to the model. None takes them as they are.
        space: what ``bin_edges`` measure, ``"timestep"`` or ``"logsnr"``.
        order: which blocks of a U-ViT are left out first: ``"output"``, those nearest to the output; ``"middle"``,
            those behind the middle block; ``"exit"``, all behind the depth, long skips with them, so that a depth may
            lie in the first half. Other denoisers are always left at the depth.
        heads: folder of trained exit heads (`fastdiff.engine.heads.ExitHeads.save_pretrained`), or None.

    Raises:
        ConfigError: for an unknown preset or a table that is no schedule.
    """

    preset: str | None = None
    bin_edges: tuple[float, ...] = ()
    depths: tuple[int, ...] = ()
    full: int | None = None
    space: str = "timestep"
    order: str = "output"
    heads: str | os.PathLike[str] | None = None
    _loaded_heads: dict[str, nn.Module] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tuple(self, "bin_edges", "numbers")
        check_tuple(self, "depths", "whole numbers")
        if self.preset is not None:
            self._take_preset()
        if isinstance(self.heads, os.PathLike):
            object.__setattr__(self, "heads", os.fspath(self.heads))
        if not isinstance(self.heads, (str, type(None))):
            raise ConfigError(f"ExitSchedule.heads is a folder; got {self.heads!r}.")
        if self.space not in ("timestep", "logsnr"):
            raise ConfigError(f"ExitSchedule.space is 'timestep' or 'logsnr'; got {self.space!r}.")
        if self.order not in ORDERS:
            raise ConfigError(f"ExitSchedule.order is {' or '.join(map(repr, ORDERS))}; got {self.order!r}.")
        edges, depths = self.bin_edges, self.depths
        if len(edges) != len(depths) or not edges:
            raise ConfigError(
                f"ExitSchedule needs one depth for each bin edge, at least one; got {len(edges)} edges and "
                f"{len(depths)} depths. Or name a preset: {', '.join(PRESETS)}."
            )
        numbers = all(isinstance(edge, (int, float)) and -math.inf < edge < math.inf for edge in edges)
        if not numbers or any(left >= right for left, right in pairwise(edges)):
            raise ConfigError(f"ExitSchedule.bin_edges are finite ascending numbers; got {edges}.")
        if self.full is not None:
            check_number(self, "full", 1, 10_000, whole=True)
        deepest = self.full or 10_000
        if not all(type(depth) is int and 1 <= depth <= deepest for depth in depths):
            raise ConfigError(f"ExitSchedule.depths are whole numbers from 1 to {deepest}; got {depths}.")

    def _take_preset(self) -> None:
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            raise ConfigError(f"There is no exit schedule {self.preset!r}; the presets are {', '.join(PRESETS)}.")
        edges, depths = PRESETS[self.preset]
        given = (self.bin_edges, self.depths, self.full)
        if given not in (((), (), None), (edges, depths, 28)) or self.space != "timestep":
            raise ConfigError(
                f"The preset {self.preset!r} brings its own table, in timesteps; give a preset or a table, not both."
            )
        for name, value in (("bin_edges", edges), ("depths", depths), ("full", 28)):
            object.__setattr__(self, name, value)

    @classmethod
    def linear(cls, full: int, d_min: int, training_steps: int = 1000, order: str = "output") -> ExitSchedule:
        """Depth falls evenly from ``full`` at timestep 0 to ``d_min`` at the noisy end.

        Raises:
            ConfigError: unless ``1 <= d_min <= full``.
        """
        depths = tuple(range(full, d_min - 1, -1))
        edges = tuple(training_steps * index / max(len(depths), 1) for index in range(len(depths)))
        return cls(bin_edges=edges, depths=depths, full=full, order=order)

    @classmethod
    def step(cls, full: int, t_switch: float, d_low: int, order: str = "output") -> ExitSchedule:
        """Full depth below timestep ``t_switch``, depth ``d_low`` from there on.

        Raises:
            ConfigError: unless ``1 <= d_low <= full`` and ``t_switch > 0``.
        """
        return cls(bin_edges=(0.0, float(t_switch)), depths=(full, d_low), full=full, order=order)

    @property
    def is_neutral(self) -> bool:
        """Whether every timestep has the full depth."""
        return self.full is not None and set(self.depths) == {self.full}

    def depth_at(self, noise: np.ndarray, blocks: int) -> np.ndarray:
        """Blocks to run at each timestep or log-SNR.

        Args:
            noise: values in this schedule's space, any shape.
            blocks: the model's number of blocks.

        Raises:
            ConfigError: if the schedule is deeper than the model.
        """
        bins = np.clip(np.searchsorted(self.bin_edges, noise, side="right") - 1, 0, None)
        depths = np.array(self.depths)[bins]
        if self.full is not None:
            return np.clip(np.floor(depths * blocks / self.full + 0.5).astype(int), 1, blocks)
        if max(self.depths) > blocks:
            raise ConfigError(
                f"The exit schedule runs up to {max(self.depths)} blocks, but the model has {blocks}. "
                f"Give full={max(self.depths)} to scale the schedule to the model, or smaller depths."
            )
        return depths

    def depths_for(self, backbone: Backbone, noise: np.ndarray) -> np.ndarray:
        """Blocks of a denoiser to run at each timestep or log-SNR, those that always run among them.

        Args:
            backbone: the denoiser's units.
            noise: values in this schedule's space, any shape.

        Raises:
            ConfigError: if depths that are not scaled are deeper than the model, or leave out what always runs.
        """
        depths = self.depth_at(noise, count_blocks(backbone))
        least = least_depth(backbone, self.order)
        if self.full is None and min(self.depths) < least:
            raise ConfigError(
                f"The exit schedule runs as few as {min(self.depths)} blocks, but of this {backbone.class_name} the "
                f"first {least} always run under order={self.order!r}. Give larger depths, full=... to scale them, or "
                "order='exit'."
            )
        return np.maximum(depths, least)

    def plan(self, request: PlanRequest) -> ComputePlan:
        """Each row leaves out what its timestep's depth says; where nothing runs to the end, it exits."""
        plan = request.full_plan(self)
        if self.is_neutral:
            return plan
        depths = self.depths_for(request.backbone, self._noise(request.grid))
        runs = running_units(request.backbone, depths, self.order)
        to_come = np.logical_or.accumulate(runs[:, ::-1], axis=1)[:, ::-1]
        table = np.where(runs, Action.COMPUTE, np.where(to_come, Action.SKIP, Action.EXIT))
        return ComputePlan(table, plan.units, plan.meta)

    def _noise(self, grid: Grid) -> np.ndarray:
        noise = grid.log_snr if self.space == "logsnr" else grid.timesteps
        if np.isnan(noise).any():
            raise ConfigError("This scheduler does not tell its signal-to-noise ratio; use space='timestep'.")
        if self.space == "timestep" and not grid.in_training_units:
            raise ConfigError("This scheduler's timesteps are not training timesteps (EDM); use space='logsnr'.")
        return noise

    def __str__(self) -> str:
        is_plain = self.preset and not self.heads and self.order == "output"
        return f"ExitSchedule({self.preset!r})" if is_plain else super().__str__()

    def exit_heads(self) -> Mapping[str, nn.Module]:
        """The trained heads, loaded when first asked for.

        Raises:
            ConfigError: if the folder holds none.
        """
        if self.heads is not None and not self._loaded_heads:
            from fastdiff.engine.heads import ExitHeads

            try:
                loaded = ExitHeads.from_pretrained(self.heads, use_safetensors=True, local_files_only=True)
            except (OSError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"ExitSchedule.heads is a folder written by ExitHeads.save_pretrained; got {self.heads!r}: {error}"
                ) from error
            self._loaded_heads.update(loaded.by_unit())
        return self._loaded_heads


def count_blocks(backbone: Backbone) -> int:
    """Number of a denoiser's blocks, of which units that only merge a long skip are none."""
    return sum(not unit.merges_skip for unit in backbone.units)


def least_depth(backbone: Backbone, order: str) -> int:
    """Number of blocks that always run."""
    merges = len(backbone.units) - count_blocks(backbone)
    return count_blocks(backbone) - merges if merges and order != "exit" else 1


def running_units(backbone: Backbone, depths: np.ndarray, order: str) -> np.ndarray:
    """Which units run at some depths; those that only merge a long skip go with the block behind them, or run always.

    Args:
        backbone: the denoiser's units.
        depths: blocks to run, shape ``(rows,)``, integers of at least `least_depth`.
        order: as in `ExitSchedule`.

    Returns:
        A boolean array of shape ``(rows, units)``.

    Raises:
        ConfigError: if the order is ``"middle"`` and there are no long skips.
    """
    merges = np.array([unit.merges_skip for unit in backbone.units])
    block = np.cumsum(~merges) - ~merges  # of a unit that merges a skip, the number of the block behind it
    depths = depths[:, None]
    if order == "middle":
        if not merges.any():
            raise ConfigError(f"order='middle' is for denoisers with long skips; {backbone.class_name} has none.")
        first, left_out = least_depth(backbone, order), count_blocks(backbone) - depths
        return merges | (block < first) | (block >= first + left_out)
    always = merges if order == "output" else np.zeros_like(merges)
    return always | (block < depths)


@contextmanager
def exit_at_depths(denoiser: nn.Module, depths: torch.Tensor, order: str = "output") -> Iterator[None]:
    """Within the block, sample i of every forward of the denoiser runs only its first ``depths[i]`` blocks.

    This is the forward that ASE trains with (section 3.2): blocks deeper than a sample's depth neither see it nor get
    a gradient from it, and they are run on the remaining samples only.

    Args:
        denoiser: a supported denoiser, used directly and not through a pipeline.
        depths: blocks to run for each sample, shape ``(batch,)``, integers of at least 1.
        order: which blocks are left out first, as in `ExitSchedule`.

    Raises:
        ConfigError: if a depth is below 1, or below what a U-ViT always runs, if there is not one for each sample of a
            batch, or if the order is unknown.
        UnsupportedBackboneError: if the denoiser's units cannot be found.
    """
    from fastdiff.backbones import view
    from fastdiff.engine.hooks import Cell, InstalledHooks

    if depths.ndim != 1 or (depths < 1).any():
        raise ConfigError(f"depths is a vector with a depth of at least 1 for each sample; got {depths.tolist()}.")
    if order not in ORDERS:
        raise ConfigError(f"order is {' or '.join(map(repr, ORDERS))}; got {order!r}.")
    backbone = view(denoiser)
    least = least_depth(backbone, order)
    if (depths < least).any():
        raise ConfigError(
            f"Of this {backbone.class_name} the first {least} blocks always run under order={order!r}; got depths "
            f"{depths.tolist()}."
        )
    first = backbone.units[0]
    streams = first.io
    if streams is None:
        raise ConfigError(f"{backbone.class_name} changes shape on the way, so that its samples cannot exit early.")
    hooks = InstalledHooks(backbone)

    def check_batch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples = streams.read(args, kwargs)[0].shape[0]
        if samples != len(depths):
            raise ConfigError(
                f"{len(depths)} depths were given, but {first.name} takes {samples} rows, not one a depth."
            )

    check = first.module.register_forward_pre_hook(check_batch, with_kwargs=True)
    try:
        runs = torch.from_numpy(running_units(backbone, depths.cpu().numpy(), order)).to(depths.device)
        active = [rows.nonzero().flatten() for rows in runs.T]
        hooks.set_cells([Cell(rows=rows if len(rows) < len(depths) else None) for rows in active])
        yield
    finally:
        check.remove()
        hooks.remove()
