"""The caches of diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fastdiff.errors import ConfigError
from fastdiff.eval.peers.base import Peer, PeerUnavailableError, evaluations_of
from fastdiff.eval.peers.diffusers_base import DiffusersCache, Evaluation
from fastdiff.methods.base import check_flag, check_number, check_tuple

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BLOCK_LISTS = "the blocks, two or more, that a denoiser holds in lists by the usual names of transformers"


@dataclass(frozen=True)
class FirstBlockCache(DiffusersCache):
    """``FirstBlockCacheConfig``: the blocks after the first are left out while its residual changes little.

    Args:
        threshold: by which share it may change.
    """

    name: ClassVar[str] = "first-block-cache"
    function: ClassVar[str] = "apply_first_block_cache"
    target: ClassVar[str] = BLOCK_LISTS

    threshold: float = 0.05

    def _check(self) -> None:
        check_number(self, "threshold", 0, 100)

    def _config(self, denoiser: nn.Module, evaluations: int, timestep: Evaluation) -> Any:
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=self.threshold)

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        try:
            return super()._enable(pipe, num_inference_steps)
        except IndexError as error:  # it takes the first and the last block of a list that may be empty
            raise PeerUnavailableError(f"{self.name} accelerates {self.target}; there are none.") from error


@dataclass(frozen=True)
class MagCache(DiffusersCache):
    """``MagCacheConfig``: steps are left out by how the residual's magnitude changes on this pipeline.

    `prepared` measures that in one call, by the calibration mode of diffusers.

    Args:
        threshold: of the error that may add up.
        max_skip: steps that may be left out in a row (``max_skip_steps``).
        retention: share of the steps, from the first, that always run (``retention_ratio``).
        ratios: what `prepared` measured (``mag_ratios``).
        calibrate: run everything and print the ratios.
    """

    name: ClassVar[str] = "mag-cache"
    function: ClassVar[str] = "apply_mag_cache"
    target: ClassVar[str] = BLOCK_LISTS

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] = ()
    calibrate: bool = False

    def _check(self) -> None:
        check_number(self, "threshold", 0, 100)
        check_number(self, "max_skip", 1, 1000, whole=True)
        check_number(self, "retention", 0, 1)
        check_flag(self, "calibrate")
        _check_numbers(self, "ratios")

    def prepared(self, pipe: DiffusionPipeline, num_inference_steps: int, sample: Callable[[], Any]) -> Peer:
        """These settings with the ratios that a call by ``sample`` has."""
        printed = StringIO()  # diffusers hands the ratios over in no other way
        with replace(self, calibrate=True).applied(pipe, num_inference_steps), redirect_stdout(printed):
            sample()
        lists = re.findall(r"^\[[-+.e\d, ]*\]$", printed.getvalue(), re.MULTILINE)
        if not lists:
            raise PeerUnavailableError(
                f"MagCache prints its ratios after {evaluations_of(pipe, num_inference_steps)} evaluations, and this "
                f"call of {type(pipe).__name__} did not lead to any."
            )
        return replace(self, ratios=tuple(json.loads(lists[0])), calibrate=False)

    def _config(self, denoiser: nn.Module, evaluations: int, timestep: Evaluation) -> Any:
        from diffusers import MagCacheConfig

        if not self.ratios and not self.calibrate:
            raise PeerUnavailableError(
                f"{self.name} must be calibrated on the pipeline: apply what prepared() returns."
            )
        return MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=int(self.max_skip),
            retention_ratio=self.retention,
            num_inference_steps=evaluations,
            mag_ratios=list(self.ratios) or None,
            calibrate=self.calibrate,
        )


@dataclass(frozen=True)
class PyramidAttentionBroadcast(DiffusersCache):
    """``PyramidAttentionBroadcastConfig``: what attentions return is reused.

    Args:
        interval: evaluations from one run of self-attentions to the next, inside the range.
        cross_interval: the same for cross-attentions; None leaves them alone.
        temporal_interval: the same for temporal attentions.
        timesteps: the range.
    """

    name: ClassVar[str] = "pyramid-attention-broadcast"
    function: ClassVar[str] = "apply_pyramid_attention_broadcast"
    target: ClassVar[str] = "attentions in blocks"
    needs_context: ClassVar[bool] = False

    interval: int = 2
    cross_interval: int | None = None
    temporal_interval: int | None = None
    timesteps: tuple[float, float] = (100, 800)

    def _check(self) -> None:
        check_number(self, "interval", 1, 1000, whole=True)
        for name in ("cross_interval", "temporal_interval"):
            if getattr(self, name) is not None:
                check_number(self, name, 1, 1000, whole=True)
        _check_numbers(self, "timesteps", 2)

    def _config(self, denoiser: nn.Module, evaluations: int, timestep: Evaluation) -> Any:
        from diffusers import PyramidAttentionBroadcastConfig

        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(self.interval),
            cross_attention_block_skip_range=self.cross_interval,
            temporal_attention_block_skip_range=self.temporal_interval,
            spatial_attention_timestep_skip_range=self.timesteps,
            cross_attention_timestep_skip_range=self.timesteps,
            temporal_attention_timestep_skip_range=self.timesteps,
            current_timestep_callback=timestep,
        )


@dataclass(frozen=True)
class FasterCache(DiffusersCache):
    """``FasterCacheConfig``: attentions are extrapolated, and one branch of guidance is made from the other.

    It takes the second half of a batch for the conditional branch. ``DiTPipeline`` puts that first, so there the
    branches change places; and a call without guidance needs ``guidance_interval=none``.

    Args:
        interval: evaluations from one run of the attentions to the next, inside the range.
        timesteps: the range, which leaves out the first evaluation.
        guidance_interval: evaluations from one run of both branches to the next; None runs both in each
            (``is_guidance_distilled``).
        guidance_timesteps: the range of that.
        layout: order of the dimensions of what the denoiser returns: BCHW, BCFHW or BFCHW.
    """

    name: ClassVar[str] = "faster-cache"
    function: ClassVar[str] = "apply_faster_cache"
    target: ClassVar[str] = "attentions in a transformer's lists of blocks"
    needs_context: ClassVar[bool] = False

    interval: int = 2
    timesteps: tuple[float, float] = (-1, 681)
    guidance_interval: int | None = 5
    guidance_timesteps: tuple[float, float] = (-1, 641)
    layout: str = "BCHW"

    def _check(self) -> None:
        check_number(self, "interval", 1, 1000, whole=True)
        if self.guidance_interval is not None:
            check_number(self, "guidance_interval", 1, 1000, whole=True)
        _check_numbers(self, "timesteps", 2)
        _check_numbers(self, "guidance_timesteps", 2)
        if self.layout not in ("BCHW", "BCFHW", "BFCHW"):
            raise ConfigError(f"FasterCache.layout is BCHW, BCFHW or BFCHW; got {self.layout!r}.")

    def _config(self, denoiser: nn.Module, evaluations: int, timestep: Evaluation) -> Any:
        from diffusers import FasterCacheConfig

        # What it cuts in halves, less class labels, which DiTPipeline stacks for guidance as others stack prompts.
        halved = (*FasterCacheConfig._unconditional_conditional_input_kwargs_identifiers, "class_labels")
        return FasterCacheConfig(
            spatial_attention_block_skip_range=int(self.interval),
            spatial_attention_timestep_skip_range=self.timesteps,
            temporal_attention_timestep_skip_range=self.timesteps,
            unconditional_batch_skip_range=int(self.guidance_interval or 1),
            unconditional_batch_timestep_skip_range=self.guidance_timesteps,
            attention_weight_callback=lambda attention: 0.5,  # its default, which it warns about
            tensor_format=self.layout,
            is_guidance_distilled=self.guidance_interval is None,
            current_timestep_callback=timestep,
            _unconditional_conditional_input_kwargs_identifiers=halved,
        )


@dataclass(frozen=True)
class TaylorSeer(DiffusersCache):
    """``TaylorSeerCacheConfig``: what modules return is extrapolated between the evaluations that run.

    Args:
        interval: from one of these to the next (``cache_interval``).
        warmup: first evaluations that run (``disable_cache_before_step``).
        order: of the Taylor expansion (``max_order``).
        modules: a regular expression for the whole names of the modules (``cache_identifiers``), which return one
            tensor each; None for the names that it looks for by default, ``blocks...attn`` and the like.
    """

    name: ClassVar[str] = "taylorseer"
    function: ClassVar[str] = "apply_taylorseer_cache"

    interval: int = 5
    warmup: int = 3
    order: int = 1
    modules: str | None = None

    def _check(self) -> None:
        check_number(self, "interval", 1, 1000, whole=True)
        check_number(self, "warmup", 1, 1000, whole=True)
        check_number(self, "order", 0, 10, whole=True)
        try:
            re.compile(self.modules or "")
        except (re.error, TypeError) as error:
            raise ConfigError(f"TaylorSeer.modules is a regular expression; got {self.modules!r}: {error}.") from error

    @property
    def target(self) -> str:  # type: ignore[override]
        """What it puts hooks on."""
        return "modules whose names " + (f"match {self.modules}" if self.modules else "begin with blocks, end in attn")

    def _config(self, denoiser: nn.Module, evaluations: int, timestep: Evaluation) -> Any:
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=int(self.interval),
            disable_cache_before_step=int(self.warmup),
            max_order=int(self.order),
            taylor_factors_dtype=next(denoiser.parameters()).dtype,
            cache_identifiers=[self.modules] if self.modules else None,
        )


def _check_numbers(peer: Peer, name: str, count: int | None = None) -> None:
    check_tuple(peer, name, "numbers")
    values = getattr(peer, name)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not numbers or (count is not None and len(values) != count):
        what = "numbers" if count is None else f"{count} numbers"
        raise ConfigError(f"{type(peer).__name__}.{name} holds {what}; got {list(values)!r}.")
