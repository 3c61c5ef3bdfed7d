"""tomesd: tokens that are alike are merged for attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastdiff.eval.peers.base import Peer, PeerUnavailableError, denoisers_of
from fastdiff.methods.base import check_flag, check_number

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PATCHED = "BasicTransformerBlock"
"""The class of blocks that it replaces, by name; others it passes over without a word."""


@dataclass(frozen=True)
class ToMe(Peer):
    """Its ``apply_patch`` on the denoiser.

    Args:
        ratio: share of the tokens that is merged away, at most 0.75.
        max_downsample: blocks see merged tokens up to this downsampling from the latents: 1, 2, 4 or 8. A transformer
            that cuts latents into patches of 2 begins at 2.
        random: whether destinations are drawn (``use_rand``). Drawn from torch's global state, so images then depend on
            what was sampled before; an odd batch turns it off.
    """

    name: ClassVar[str] = "tomesd"
    distribution: ClassVar[str] = "tomesd"
    module: ClassVar[str] = "tomesd"

    ratio: float = 0.5
    max_downsample: int = 1
    random: bool = True

    def _check(self) -> None:
        check_number(self, "ratio", 0, 0.75)
        check_number(self, "max_downsample", 1, 8, whole=True)
        check_flag(self, "random")

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        import tomesd

        (denoiser, *more) = denoisers_of(pipe).values()
        if more:
            raise PeerUnavailableError(f"tomesd patches one denoiser; {type(pipe).__name__} has {1 + len(more)}.")
        if not any(type(module).__name__ == PATCHED for module in denoiser.modules()):
            raise PeerUnavailableError(f"tomesd patches blocks called {PATCHED}; {type(denoiser).__name__} has none.")
        tomesd.apply_patch(denoiser, ratio=self.ratio, max_downsample=int(self.max_downsample), use_rand=self.random)
        return lambda: tomesd.remove_patch(denoiser)
