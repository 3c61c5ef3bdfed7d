"""Which settings of each peer are worth a comparison on which kind of pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdiff.eval.peers.base import Peer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def default_peers(pipe: DiffusionPipeline) -> tuple[Peer, ...]:
    """The settings."""
    return ()
