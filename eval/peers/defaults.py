"""Which settings of each peer are worth a comparison on which kind of pipeline.

Chosen on the shipped models at 50 DDIM steps, from careful to fast, and so that each peer does something there; no
setting of a peer was left out for doing well. A peer that cannot run a pipeline stands in the list with the settings
that it has by itself, so that the reason can be told. tomesd draws nothing here, so that an image does not depend on
what was sampled before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdiff.backbones.unet import is_unet
from fastdiff.eval.peers.base import Peer, denoisers_of
from fastdiff.eval.peers.cache_dit import DBCache, DBCacheTaylorSeer
from fastdiff.eval.peers.deepcache import DeepCache
from fastdiff.eval.peers.diffusers_caches import (
    FasterCache,
    FirstBlockCache,
    MagCache,
    PyramidAttentionBroadcast,
    TaylorSeer,
)
from fastdiff.eval.peers.freeu import FreeU
from fastdiff.eval.peers.tomesd import PATCHED, ToMe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BLOCKS = ".*blocks.[0-9]+"
"""Names of a transformer's blocks."""
BRANCHES = ".*blocks.[0-9]+.(attn[12]?|ff)"
"""Names of what a block adds to the hidden state, as in TaylorSeer's paper."""
LAYERS = ".*(resnets|transformer_blocks).[0-9]+"
"""Names of a UNet's layers, where its attentions are blocks of transformers: these return a tensor, their parents do
not."""
PLAIN_LAYERS = ".*(resnets|attentions).[0-9]+"
"""The same where its attentions are attentions only."""

TRANSFORMERS: tuple[Peer, ...] = (
    DBCache(),
    DBCache(threshold=0.3, front=1, warmup=8, max_continuous=1),
    DBCache(front=1),
    DBCache(threshold=0.15, front=1, warmup=4),
    DBCacheTaylorSeer(front=1),
    DBCacheTaylorSeer(threshold=0.5, front=1, warmup=4, max_continuous=2),
    DBCacheTaylorSeer(threshold=0.5, front=1, max_continuous=3),
    DeepCache(),
    FasterCache(guidance_interval=None),
    FasterCache(guidance_interval=2),
    FasterCache(),
    FirstBlockCache(threshold=0.03),
    FirstBlockCache(),
    FirstBlockCache(threshold=0.1),
    FreeU(),
    MagCache(max_skip=1, retention=0.4),
    MagCache(max_skip=1),
    MagCache(),
    PyramidAttentionBroadcast(),
    PyramidAttentionBroadcast(interval=4, timesteps=(-1, 1001)),
    TaylorSeer(),
    TaylorSeer(interval=3, modules=BRANCHES),
    TaylorSeer(interval=2, modules=BLOCKS),
    TaylorSeer(interval=3, modules=BLOCKS),
    TaylorSeer(interval=4, modules=BLOCKS),
    TaylorSeer(interval=5, modules=BLOCKS),
    ToMe(),
    ToMe(ratio=0.25, max_downsample=2, random=False),
    ToMe(max_downsample=2, random=False),
)

UNETS: tuple[Peer, ...] = (
    DBCache(),
    DBCacheTaylorSeer(),
    *(DeepCache(interval) for interval in (2, 3, 5)),
    DeepCache(3, branch=2),
    FasterCache(),
    FirstBlockCache(),
    FreeU(),
    FreeU(b1=1.1, b2=1.2),
    MagCache(),
    PyramidAttentionBroadcast(cross_interval=3),
    PyramidAttentionBroadcast(interval=4, cross_interval=6, timesteps=(-1, 1001)),
    TaylorSeer(),
    *(TaylorSeer(interval, modules=LAYERS) for interval in (2, 3, 5)),
    ToMe(ratio=0.25, random=False),
    ToMe(random=False),
    ToMe(ratio=0.75, max_downsample=2, random=False),
)

PLAIN_UNETS: tuple[Peer, ...] = (
    DBCache(),
    DBCacheTaylorSeer(),
    *(DeepCache(interval) for interval in (2, 3, 5)),
    DeepCache(3, branch=2),
    FasterCache(),
    FirstBlockCache(),
    FreeU(),
    MagCache(),
    PyramidAttentionBroadcast(),
    PyramidAttentionBroadcast(interval=4, timesteps=(-1, 1001)),
    TaylorSeer(),
    *(TaylorSeer(interval, modules=PLAIN_LAYERS) for interval in (2, 3, 5)),
    ToMe(),
)


def default_peers(pipe: DiffusionPipeline) -> tuple[Peer, ...]:
    """Every peer, with the settings that are worth a comparison on this kind of pipeline.

    Args:
        pipe: the pipeline.

    Raises:
        PeerUnavailableError: if it has no denoiser.
    """
    denoiser, *_ = denoisers_of(pipe).values()
    if not is_unet(denoiser):
        return TRANSFORMERS
    has_blocks = any(type(module).__name__ == PATCHED for module in denoiser.modules())
    return UNETS if has_blocks else PLAIN_UNETS
