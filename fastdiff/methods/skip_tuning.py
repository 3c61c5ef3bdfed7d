"""Skip-Tuning: the decoder reads the long skip connections attenuated, which repairs samplers of few evaluations.

Ma et al., "The Surprising Effectiveness of Skip-Tuning in Diffusion Sampling" (arXiv 2402.15170). It saves no work by
itself: a call of fewer evaluations comes closer to one of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fastdiff.backbones import Backbone, view
from fastdiff.errors import ConfigError
from fastdiff.methods.base import Method, PlanRequest, check_flag, check_number, check_tuple
from fastdiff.plan import ComputePlan

if TYPE_CHECKING:
    from fastdiff.engine.clock import Grid

RHO_BY_EVALUATIONS = {9: 0.68, 19: 0.78, 39: 0.85, 79: 0.9}
"""Constants by number of evaluations. Up to 39 the best ones found in the paper; 79 goes on with their trend."""

TIMES = ("constant", "increasing", "decreasing", "sigma-window")

FOLDABLE = ("SkipBlock", "UViTSkip")
"""Modules, by class name, that read a skip through nothing but a linear layer over ``[hidden state, skip]``."""


@dataclass(frozen=True)
class SkipTuning(Method):
    """Multiply the long skip connections with ``rho`` where the decoder reads them.

    Made for models of pixels or latents sampled without guidance in few evaluations; whether another pipeline gains
    anything has to be tried.

    Args:
        rho: the factor, from 0 to 2; or one for each skip, the deepest first, which the decoder reads first. By
            default as many evaluations as the call makes are looked up in `RHO_BY_EVALUATIONS`, linearly in the
            logarithm of their number, the ends held.
        rho_bottom: in place of ``rho``, the factor of the deepest skip; it changes linearly from skip to skip.
        rho_top: the factor of the shallowest skip, which the first convolution makes.
        literal: the paper's formula to the letter, whose last factor stays one step short of ``rho_top``.
        reverse: exchange the two ends.
        time: how much of ``1 - rho`` acts: ``"constant"``: all of it, always; ``"increasing"``: the factor grows with
            the noise, from ``rho`` at the last evaluation to 1 at the first; ``"decreasing"``: from 1 at the last
            to ``rho`` at the first; ``"sigma-window"``: all of it within ``window``, nothing outside.
        window: lowest and highest ratio of noise to signal, which are the sigmas of EDM.
        exclude_control: leave what ControlNets add to the skips as it is. T2I-Adapters add to the encoder itself, and
            are scaled with it.

    Raises:
        ConfigError: for a value out of range; when the plan is made, for a denoiser without long skips, a list of
            another length than their number, or a window on a scheduler of unknown noise levels.
    """

    rho: float | tuple[float, ...] | None = None
    rho_bottom: float | None = None
    rho_top: float | None = None
    literal: bool = False
    reverse: bool = False
    time: str = "constant"
    window: tuple[float, float] | None = None
    exclude_control: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("literal", "reverse", "exclude_control"):
            check_flag(self, name)
        self._check_rho()
        if self.time not in TIMES:
            raise ConfigError(f"SkipTuning.time is one of {', '.join(TIMES)}; got {self.time!r}.")
        if (self.window is None) == (self.time == "sigma-window"):
            raise ConfigError(f"SkipTuning.window and time='sigma-window' go together; got window={self.window!r}.")
        if self.window is not None:
            self._check_window(self.window)

    def _check_rho(self) -> None:
        ends = [name for name in ("rho_bottom", "rho_top") if getattr(self, name) is not None]
        if len(ends) == 1 or (ends and self.rho is not None):
            raise ConfigError(
                "SkipTuning takes either rho, or both rho_bottom and rho_top; got "
                f"rho={self.rho!r}, rho_bottom={self.rho_bottom!r}, rho_top={self.rho_top!r}."
            )
        if (self.literal or self.reverse) and not ends:
            raise ConfigError("SkipTuning.literal and reverse say how rho_bottom and rho_top are read; give these.")
        for name in ends:
            check_number(self, name, 0, 2)
        if isinstance(self.rho, tuple):
            if not self.rho or not all(_is_rho(rho) for rho in self.rho):
                raise ConfigError(f"SkipTuning.rho holds a number from 0 to 2 for each skip; got {self.rho!r}.")
        elif self.rho is not None:
            check_number(self, "rho", 0, 2)

    def _check_window(self, window: tuple[float, ...]) -> None:
        check_tuple(self, "window", "two ratios of noise to signal")
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in window)
        if len(window) != 2 or not numbers or not 0 <= window[0] <= window[1]:
            raise ConfigError(f"SkipTuning.window is (lowest, highest) ratio of noise to signal; got {window!r}.")

    @property
    def is_neutral(self) -> bool:
        """Whether every factor is 1."""
        given = self.rho if isinstance(self.rho, tuple) else (self.rho, self.rho_bottom, self.rho_top)
        return {rho for rho in given if rho is not None} == {1}

    @property
    def scales_control(self) -> bool:
        """Whether what ControlNets add to a long skip is scaled with it."""
        return not self.exclude_control

    def plan(self, request: PlanRequest) -> ComputePlan:
        """Everything is computed.

        Raises:
            ConfigError: if the denoiser has no long skips.
        """
        _check_skips(request.backbone)
        return request.full_plan(self)

    def skip_scales(self, request: PlanRequest) -> np.ndarray:
        """The factor of every long skip in every evaluation."""
        _check_skips(request.backbone)
        rho = self._rho(request.backbone.skips, len(request.grid))
        return 1 - self._weights(request.grid)[:, None] * (1 - rho)

    def _rho(self, skips: int, evaluations: int | None = None) -> np.ndarray:
        """The factor of each skip in the order in which they are made, shape ``(skips,)``: the deepest is last."""
        if self.rho_bottom is not None and self.rho_top is not None:
            rho = np.linspace(self.rho_bottom, self.rho_top, skips, endpoint=not self.literal)
            return rho if self.reverse else rho[::-1]
        if isinstance(self.rho, tuple):
            if len(self.rho) != skips:
                raise ConfigError(f"SkipTuning.rho lists {len(self.rho)} factors; this denoiser has {skips} skips.")
            return np.array(self.rho[::-1], dtype=np.float64)
        if self.rho is not None:
            return np.full(skips, self.rho, dtype=np.float64)
        if evaluations is None:
            raise ConfigError("SkipTuning.rho depends on the number of evaluations where it is not given; give it.")
        known = np.log(list(RHO_BY_EVALUATIONS))
        return np.full(skips, np.interp(np.log(evaluations), known, list(RHO_BY_EVALUATIONS.values())))

    def _weights(self, grid: Grid) -> np.ndarray:
        """How much of ``1 - rho`` acts in each evaluation, shape ``(evaluations,)``."""
        passed = np.linspace(0, 1, len(grid))
        if self.time == "increasing":
            return passed
        if self.time == "decreasing":
            return 1 - passed
        if self.window is None:
            return np.ones(len(grid))
        if np.isnan(grid.log_snr).any():
            raise ConfigError(
                "SkipTuning.window needs the noise level of each evaluation, which this scheduler does not tell. "
                "Use time='increasing' or 'decreasing', or another scheduler."
            )
        sigma = np.exp(-grid.log_snr / 2)
        return ((sigma >= self.window[0]) & (sigma <= self.window[1])).astype(np.float64)

    @contextmanager
    def fold(self, denoiser: nn.Module) -> Iterator[nn.Module]:
        """Put the factors into the weights that read the skips, for the length of a ``with`` block.

        The predictions are those of the scaled skips, and nothing is left to do in a call. The weights in use before
        are not written to and come back afterwards.

        Args:
            denoiser: a U-ViT, whose skips enter through a linear layer alone.

        Yields:
            The denoiser.

        Raises:
            ConfigError: if the factors are not constant, or the denoiser has no long skips or normalises them first:
                a norm takes out of ``[hidden state, skip]`` what a weight would have to know.
        """
        backbone = view(denoiser)
        _check_skips(backbone)
        if self.time != "constant":
            raise ConfigError(f"SkipTuning.fold needs the same factors in every evaluation; got time={self.time!r}.")
        readers: list[tuple[Any, float]] = [
            (site.module, self._rho(backbone.skips)[site.skips[0]]) for site in backbone.skip_sites
        ]
        for module, _ in readers:
            kind = type(module).__name__
            if kind not in FOLDABLE or type(module.skip_linear) is not nn.Linear:
                raise ConfigError(
                    f"SkipTuning.fold is exact only where a skip enters through a plain linear layer; {kind} of "
                    f"{backbone.class_name} normalises it first or has another layer. Enable SkipTuning in its place."
                )
        replaced = [(module.skip_linear, module.skip_linear.weight) for module, _ in readers]
        try:
            for module, rho in readers:
                linear = module.skip_linear
                weight = linear.weight.detach().clone()
                weight[:, linear.in_features // 2 :] *= float(rho)
                linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
            yield denoiser
        finally:
            for linear, weight in replaced:
                linear.weight = weight


def _is_rho(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 2


def _check_skips(backbone: Backbone) -> None:
    if not backbone.skip_sites:
        raise ConfigError(
            f"SkipTuning scales long skip connections from an encoder to a decoder, and fastdiff knows none in "
            f"{backbone.class_name}. Use it with a UNet, HunyuanDiT or U-ViT."
        )
