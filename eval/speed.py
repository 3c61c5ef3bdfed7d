"""Wall-clock comparisons that a slow minute of the machine cannot tilt: contenders take turns, ratios are paired."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from statistics import median, quantiles
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from fastdiff.cost import synchronize
from fastdiff.errors import ConfigError

WORTHWHILE = 1.05
"""A larger batch must make at least so many times the images in a second."""

MEMORY_SAMPLES = 0.005
"""Seconds between two looks at a process's memory."""


# -- taking turns ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What one call took.

    Args:
        seconds: of the whole call.
        denoiser_seconds: of the denoisers' evaluations in it; None if they were not timed.
        peak_bytes: what torch's allocator held at most on a GPU, weights included; None elsewhere: what a process
            holds there depends on what it did before.
    """

    seconds: float
    denoiser_seconds: float | None = None
    peak_bytes: int | None = None


def timed_rounds(
    contenders: Mapping[str, Callable[[int], Any]],
    rounds: int,
    *,
    first: int = 0,
    device: torch.device | str = "cpu",
    denoisers: Callable[[str], Sequence[nn.Module]] = lambda _: (),
    around: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> Iterator[dict[str, Turn]]:
    """Time contenders against each other: each runs once in every round, and the order moves on with every round.

    A pair of times of one round lies seconds apart and saw the same machine, which is what makes their ratio
    trustworthy where two separate averages are not.

    Args:
        contenders: name to what is timed; called with the round's index.
        rounds: how many.
        first: index of the first round; others may have been timed before.
        device: what to wait for before the clock is read.
        denoisers: modules whose calls are timed by themselves too, by the contender's name.
        around: entered before every contender's turn and left after it, outside its time.

    Yields:
        What each contender took in a round.

    Raises:
        ConfigError: if there is no contender or no round.
    """
    names = list(contenders)
    if not names or rounds < 1:
        raise ConfigError(f"Timing needs contenders and at least one round; got {len(names)} and {rounds}.")
    for index in range(first, first + rounds):
        start = index % len(names)
        turns = {}
        for name in names[start:] + names[:start]:
            with around(name):
                turns[name] = take_turn(partial(contenders[name], index), device, denoisers(name))
        yield turns


def take_turn(call: Callable[[], Any], device: torch.device | str = "cpu", denoisers: Sequence[nn.Module] = ()) -> Turn:
    """Time one call.

    Args:
        call: what is timed.
        device: what to wait for before the clock is read.
        denoisers: modules whose calls are timed by themselves too.
    """
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with _stopwatch(denoisers, device) as taken:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        elapsed = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if is_cuda else None
    return Turn(elapsed, sum(taken()) if denoisers else None, peak)


@contextmanager
def _stopwatch(modules: Sequence[nn.Module], device: torch.device | str) -> Iterator[Callable[[], list[float]]]:
    """Times the calls of modules within the block; on GPUs without waiting for any of them."""
    is_cuda = torch.device(device).type == "cuda"
    mark, between = (_event, _between_events) if is_cuda else (time.perf_counter, _between)
    marks: list[tuple[Any, Any]] = []

    running = False

    def timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal running
        if running:  # a call within a call, such as several evaluations made at once, is part of its time
            return call(*args, **kwargs)
        running, start = True, mark()
        try:
            return call(*args, **kwargs)
        finally:
            running = False
            marks.append((start, mark()))

    with ExitStack() as stack:
        for module in modules:
            own = type(module)
            module.__class__ = _timed_class(own)  # type: ignore[arg-type]  # a class is hashable
            vars(module)[_TIMED] = timed
            stack.callback(vars(module).pop, _TIMED)
            stack.callback(setattr, module, "__class__", own)
        yield lambda: [between(*pair) for pair in marks]


_TIMED = "_timed_call"


@cache
def _timed_class(own: type) -> type:
    """A subclass whose whole call is timed, with all hooks: methods and other packages compute in hooks, too.

    It keeps the name, by which denoisers are known, and there is one for each class, so that compiled code stays valid.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_TIMED](partial(own.__call__, self), *args, **kwargs)

    return type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
    return start.elapsed_time(stop) / 1000


def _between(start: float, stop: float) -> float:
    return stop - start


def time_interleaved(
    contenders: Mapping[str, Callable[[int], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    device: torch.device | str = "cpu",
    around: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> dict[str, list[float]]:
    """The seconds of `timed_rounds`, one entry for each round, by name.

    Args:
        contenders: name to what is timed; called with the round's index, which is negative while warming up.
        rounds: timed rounds, at least 1.
        warm_up: rounds before that, not timed.
        device: what to wait for before the clock is read.
        around: entered before every contender's turn and left after it, outside its time.

    Raises:
        ConfigError: if there is no contender or no round.
    """
    if rounds < 1:
        raise ConfigError(f"Timing needs at least one round; got {rounds}.")
    turns = list(timed_rounds(contenders, warm_up + rounds, first=-warm_up, device=device, around=around))[warm_up:]
    return {name: [turn[name].seconds for turn in turns] for name in contenders}


# -- what times say ----------------------------------------------------------------------------------------------------


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
    """Compare times of `timed_rounds`, round by round.

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


@dataclass(frozen=True)
class Latency:
    """How long calls take.

    Args:
        batch: images in each.
        seconds: median of the calls (p50).
        low: lower quartile.
        high: upper quartile.
        p95: 95th percentile; of few calls it is little more than the slowest.
        images_per_second: at the median.
        calls: how many were timed.
    """

    batch: int
    seconds: float
    low: float
    high: float
    p95: float
    images_per_second: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float], batch: int) -> Latency:
        """Of some calls of one batch size.

        Raises:
            ConfigError: if there is none.
        """
        if not seconds:
            raise ConfigError("A latency is that of at least one call.")
        low, middle, high, p95 = (float(value) for value in np.percentile(seconds, [25, 50, 75, 95]))
        return cls(batch, middle, low, high, p95, batch / middle if middle else math.inf, len(seconds))


# -- memory and batches ------------------------------------------------------------------------------------------------


def saturating_batch(
    call: Callable[[int], Any],
    *,
    device: torch.device | str = "cpu",
    most: int = 4096,
    repeats: int = 2,
) -> int:
    """The batch from which a larger one hardly makes more images in a second.

    Doubled from 1 on, until that gains less than 5 % or memory ends.

    Args:
        call: makes a batch of some images.
        device: what to wait for before the clock is read.
        most: the largest batch to try.
        repeats: timed calls of each batch, the fastest counts; one to warm up comes first.
    """
    device = torch.device(device)
    batch, best = 1, 0.0
    while batch <= most:
        try:
            with _grown_memory() as grown:
                call(batch)
            seconds = min(take_turn(partial(call, batch), device).seconds for _ in range(repeats))
        except (MemoryError, RuntimeError) as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            break
        if batch / seconds < WORTHWHILE * best:
            break
        best = batch / seconds
        batch *= 2
        # Where memory is not a GPU's own, running out of it ends the process and not the call.
        if device.type == "cpu" and 2 * grown() > psutil.virtual_memory().available:
            break
    return max(1, batch // 2)


@contextmanager
def _grown_memory() -> Iterator[Callable[[], int]]:
    """By how many bytes this process grows within the block, at most, looked at every few milliseconds."""
    process = psutil.Process()
    seen = [process.memory_info().rss]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(MEMORY_SAMPLES):
            seen.append(process.memory_info().rss)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield lambda: max(seen) - seen[0]
    finally:
        done.set()
        watching.join()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has ended; torch has several."""
    message = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in message for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
