"""cache-dit, on transformers: the middle blocks' residual is reused while the first blocks' changes little."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastdiff.backbones.unet import is_unet
from fastdiff.eval.peers.base import Peer, PeerUnavailableError, denoisers_of
from fastdiff.methods.base import check_number

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class DBCache(Peer):
    """Its ``DBCacheConfig``, on the pipelines that it knows.

    Args:
        threshold: the first blocks' residual may change by this share (``residual_diff_threshold``).
        front: blocks that always run, at the start (``Fn_compute_blocks``).
        back: the same at the end (``Bn_compute_blocks``).
        warmup: first steps that run as a whole (``max_warmup_steps``).
        max_cached: steps that may reuse, at most; -1 for all (``max_cached_steps``).
        max_continuous: the same one after the other (``max_continuous_cached_steps``).
    """

    name: ClassVar[str] = "cache-dit"
    distribution: ClassVar[str] = "cache-dit"
    module: ClassVar[str] = "cache_dit"

    threshold: float = 0.08
    front: int = 8
    back: int = 0
    warmup: int = 8
    max_cached: int = -1
    max_continuous: int = -1

    def _check(self) -> None:
        check_number(self, "threshold", 0, 100)
        for name, low in (("front", 1), ("back", 0), ("warmup", 0), ("max_cached", -1), ("max_continuous", -1)):
            check_number(self, name, low, 10_000, whole=True)

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        import cache_dit

        self._check_supported(pipe)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=int(self.front),
            Bn_compute_blocks=int(self.back),
            residual_diff_threshold=self.threshold,
            max_warmup_steps=int(self.warmup),
            max_cached_steps=int(self.max_cached),
            max_continuous_cached_steps=int(self.max_continuous),
            num_inference_steps=num_inference_steps,
        )

        def disable() -> None:
            with _quiet():
                cache_dit.disable_cache(pipe)

        try:
            with _quiet():
                cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=self._calibrator())
        except Exception:
            disable()  # it wraps the pipeline's class before it looks at the blocks
            raise
        return disable

    def _calibrator(self) -> Any:
        return None

    def _check_supported(self, pipe: DiffusionPipeline) -> None:
        if getattr(type(pipe), "_is_cached", False):
            raise PeerUnavailableError(
                f"cache-dit is enabled on a {type(pipe).__name__} already, and it keeps that on the class."
            )
        kinds = {type(module).__name__ for module in denoisers_of(pipe).values() if is_unet(module)}
        if kinds:
            raise PeerUnavailableError(
                f"cache-dit caches lists of transformer blocks that hand one hidden state on; a {', '.join(kinds)} has "
                "stages of several shapes with long skips, and cache-dit has no adapter for it."
            )

    def engaged(self, pipe: DiffusionPipeline) -> bool | None:
        """Whether its summary counts a cached step."""
        import cache_dit

        with _quiet():
            stats = cache_dit.summary(pipe, logging=False)
        return any(stat.cached_steps or stat.cfg_cached_steps for stat in stats)


@dataclass(frozen=True)
class DBCacheTaylorSeer(DBCache):
    """The same with its TaylorSeer calibrator: the residual is extrapolated, not reused.

    Args:
        order: of the Taylor expansion (``taylorseer_order``).
    """

    name: ClassVar[str] = "cache-dit-taylorseer"

    order: int = 1

    def _check(self) -> None:
        super()._check()
        check_number(self, "order", 1, 10, whole=True)

    def _calibrator(self) -> Any:
        import cache_dit

        return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=int(self.order))


@contextmanager
def _quiet() -> Iterator[None]:
    """Its reports on every change, which a sweep makes by the hundred, are left out."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
