"""Peers as settings: text, equality, refusals; nothing here needs the other packages."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import ConfigError
from fastdiff.eval.peers import DBCache, DeepCache, MagCache, Peer, TaylorSeer, ToMe, names, parse_peer
from fastdiff.eval.peers.defaults import PLAIN_UNETS, TRANSFORMERS, UNETS

FIELDS = [(name, field) for name, cls in Peer.registry.items() for field in cls.__dataclass_fields__]


def test_all_peers_are_there() -> None:
    assert names() == (
        "cache-dit",
        "cache-dit-taylorseer",
        "deepcache",
        "faster-cache",
        "first-block-cache",
        "freeu",
        "mag-cache",
        "pyramid-attention-broadcast",
        "taylorseer",
        "tomesd",
    )


@pytest.mark.parametrize(
    ("spec", "peer"),
    [
        ("deepcache", DeepCache()),
        ("DeepCache:interval=5".lower(), DeepCache(interval=5)),
        ("deepcache:interval=2,branch=1", DeepCache(2, 1)),
        ("cache-dit:max-continuous=3,threshold=0.2", DBCache(threshold=0.2, max_continuous=3)),
        ("taylorseer:modules=none", TaylorSeer()),
        ('taylorseer:modules=".*(attn1|ff)"', TaylorSeer(modules=".*(attn1|ff)")),
        ("mag-cache:ratios=[1,0.99]", MagCache(ratios=(1, 0.99))),
        ("tomesd:random=false", ToMe(random=False)),
    ],
)
def test_specifications(spec: str, peer: Peer) -> None:
    assert parse_peer(spec) == peer
    assert parse_peer(str(peer)) == peer


@pytest.mark.parametrize("peers", [TRANSFORMERS, UNETS, PLAIN_UNETS], ids=["transformers", "unets", "plain-unets"])
def test_default_settings_are_text_and_name_every_peer(peers: tuple[Peer, ...]) -> None:
    assert {peer.name for peer in peers} == set(names())
    assert len(set(peers)) == len(peers)
    assert [parse_peer(str(peer)) for peer in peers] == list(peers)


@pytest.mark.parametrize(
    ("spec", "listed"),
    [
        ("teacache", "cache-dit, cache-dit-taylorseer, deepcache"),
        ("deepcache:skip=2", "its fields are interval, branch"),
        ("deepcache:interval=0", "DeepCache.interval is a whole number from 1"),
        ("cache-dit:threshold=nan", "DBCache.threshold is a number"),
        ("faster-cache:layout=HWC", "BCHW, BCFHW or BFCHW"),
        ("pyramid-attention-broadcast:timesteps=[100]", "2 numbers"),
        ("taylorseer:modules=(", "regular expression"),
        ("tomesd:ratio=0.8", "from 0 to 0.75"),
    ],
)
def test_errors_say_what_exists(spec: str, listed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_peer(spec)
    assert listed in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    field=st.sampled_from(FIELDS),
    value=st.sampled_from(
        ["none", "true", "-1", "1e999", "NaN", "[]", "[1,2]", '["a"]', "{}", '""', "x", "[null]", "2"]
    ),
)
def test_any_value_of_any_field_is_a_peer_or_a_typed_error(field: tuple[str, str], value: str) -> None:
    with contextlib.suppress(ConfigError):
        peer = parse_peer(f"{field[0]}:{field[1]}={value}")
        assert isinstance(peer, Peer)
        hash(peer)
