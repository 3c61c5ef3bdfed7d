"""Wall-clock comparisons that a slow minute of the machine cannot tilt: contenders take turns, ratios are paired."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from fastdiff.cost import synchronize
from fastdiff.errors import ConfigError


def _nothing(name: str) -> None:
    """What happens between two turns unless something is asked for."""


def time_interleaved(
    contenders: Mapping[str, Callable[[int], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    device: torch.device | str = "cpu",
    before_each: Callable[[str], None] = _nothing,
    after_each: Callable[[str], None] = _nothing,
) -> dict[str, list[float]]:
    """Time contenders against each other: each runs once in every round, and the order moves on with every round.

    A pair of times of one round lies seconds apart and saw the same machine, which is what makes their ratio
    trustworthy where two separate averages are not.

    Args:
        contenders: name to what is timed; called with the round's index, which is negative while warming up.
        rounds: timed rounds, at least 1.
        warm_up: rounds before that, not timed.
        device: what to wait for before the clock is read.
        before_each: called with the name before every contender's turn, outside its time.
        after_each: the same after its turn.

    Returns:
        Seconds by name, one entry for each round.

    Raises:
        ConfigError: if there is no contender or no round.
    """
    names = list(contenders)
    if not names or rounds < 1:
        raise ConfigError(f"Timing needs contenders and at least one round; got {len(names)} and {rounds}.")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warm_up, rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            before_each(name)
            synchronize(device)
            start = time.perf_counter()
            contenders[name](index)
            synchronize(device)
            elapsed = time.perf_counter() - start
            if index >= 0:
                seconds[name].append(elapsed)
            after_each(name)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How much faster than a baseline, over pairs of runs.

    Args:
        median: of the pairs' ratios; above 1 is faster.
        low: their lower quartile.
        high: their upper quartile.
        pairs: how many there were.
    """

    median: float
    low: float
    high: float
    pairs: int


def paired_ratio(baseline: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Compare times from `time_interleaved`, round by round.

    Args:
        baseline: the baseline's seconds.
        seconds: the other's, of the same rounds.

    Raises:
        ConfigError: if the numbers of rounds differ or are zero.
    """
    if len(baseline) != len(seconds) or not baseline:
        raise ConfigError(f"Pairs need equally many times, at least one; got {len(baseline)} and {len(seconds)}.")
    ratios = [slow / fast for slow, fast in zip(baseline, seconds, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median(ratios), low, high, len(ratios))
