"""FreeU, on UNets: long skips and backbone features are scaled. It changes images and saves no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastdiff.eval.peers.base import Peer, PeerUnavailableError, unet_of
from fastdiff.methods.base import check_number

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class FreeU(Peer):
    """``enable_freeu`` of diffusers, with the values that its documentation gives for Stable Diffusion 1.5.

    Args:
        s1: factor of the low frequencies of the skips in the first up stage.
        s2: the same in the second.
        b1: factor of half the channels of the backbone in the first up stage.
        b2: the same in the second.
    """

    name: ClassVar[str] = "freeu"
    distribution: ClassVar[str] = "diffusers"
    module: ClassVar[str] = "diffusers"

    s1: float = 0.9
    s2: float = 0.2
    b1: float = 1.5
    b2: float = 1.6

    def _check(self) -> None:
        for name in ("s1", "s2", "b1", "b2"):
            check_number(self, name, 0, 10)

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        unet: Any = unet_of(pipe, self)
        if not hasattr(unet, "enable_freeu"):
            raise PeerUnavailableError(f"{type(unet).__name__} has no enable_freeu: diffusers has it for others only.")
        unet.enable_freeu(s1=self.s1, s2=self.s2, b1=self.b1, b2=self.b2)
        return unet.disable_freeu
