"""DeepCache, on UNets: deep features of a key step serve the steps after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastdiff.eval.peers.base import Peer, unet_of
from fastdiff.methods.base import check_number

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class DeepCache(Peer):
    """Its ``DeepCacheSDHelper``.

    Args:
        interval: every so many steps the UNet runs as a whole (``cache_interval``).
        branch: how many layers run in between, from 0 (``cache_branch_id``).
    """

    name: ClassVar[str] = "deepcache"
    distribution: ClassVar[str] = "DeepCache"
    module: ClassVar[str] = "DeepCache"

    interval: int = 3
    branch: int = 0

    def _check(self) -> None:
        check_number(self, "interval", 1, 1000, whole=True)
        check_number(self, "branch", 0, 1000, whole=True)

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        from DeepCache import DeepCacheSDHelper

        unet_of(pipe, self)
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=int(self.interval), cache_branch_id=int(self.branch))
        helper.enable()
        return helper.disable
