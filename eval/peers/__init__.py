"""Other packages' accelerations, each behind a thin adapter that only calls the package's own public functions."""

from __future__ import annotations

from fastdiff.errors import ConfigError
from fastdiff.eval.peers.base import Peer, PeerUnavailableError
from fastdiff.eval.peers.cache_dit import DBCache, DBCacheTaylorSeer
from fastdiff.eval.peers.deepcache import DeepCache
from fastdiff.eval.peers.defaults import default_peers
from fastdiff.eval.peers.diffusers_caches import (
    FasterCache,
    FirstBlockCache,
    MagCache,
    PyramidAttentionBroadcast,
    TaylorSeer,
)
from fastdiff.eval.peers.freeu import FreeU
from fastdiff.eval.peers.tomesd import ToMe
from fastdiff.spec import kebab, parse_fields

__all__ = [
    "DBCache",
    "DBCacheTaylorSeer",
    "DeepCache",
    "FasterCache",
    "FirstBlockCache",
    "FreeU",
    "MagCache",
    "Peer",
    "PeerUnavailableError",
    "PyramidAttentionBroadcast",
    "TaylorSeer",
    "ToMe",
    "default_peers",
    "names",
    "parse_peer",
]


def names() -> tuple[str, ...]:
    """The peers' names in specifications."""
    return tuple(sorted(Peer.registry))


def parse_peer(spec: str) -> Peer:
    """Make a peer from its specification, such as ``deepcache:interval=3,branch=0``; ``str(peer)`` writes it.

    Raises:
        ConfigError: if the peer or a field does not exist, or a value is not allowed; the message lists what exists.
    """
    name, _, rest = spec.partition(":")
    name = kebab(name.strip())
    if name not in Peer.registry:
        raise ConfigError(f"There is no peer {name!r}; the peers are {', '.join(names())}.")
    cls = Peer.registry[name]
    return cls(**parse_fields(cls, name, rest))
