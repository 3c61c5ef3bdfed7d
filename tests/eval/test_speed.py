"""Paired timing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.cost import synchronize
from fastdiff.errors import ConfigError
from fastdiff.eval import describe_environment, paired_ratio, speed, time_interleaved
from fastdiff.eval.provenance import describe_machine
from fastdiff.eval.sampling import call
from fastdiff.eval.speed import Latency, is_out_of_memory, saturating_batch, take_turn, timed_rounds
from fastdiff.eval.tasks import Task
from fastdiff.eval.ways import plain


def test_contenders_take_turns_and_the_order_moves_on() -> None:
    calls: list[tuple[int, str]] = []
    contenders = {name: lambda index, name=name: calls.append((index, name)) for name in "abc"}
    seconds = time_interleaved(contenders, 3, warm_up=1)
    assert [name for _, name in calls] == ["c", "a", "b", "a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [index for index, _ in calls] == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_times_are_those_of_the_calls(clock: None) -> None:
    seconds = time_interleaved({"short": lambda _: None, "long": lambda _: spend(0.05)}, 3)
    assert seconds == {"short": [0, 0, 0], "long": pytest.approx([0.05] * 3)}


def test_what_happens_between_turns_is_not_timed(clock: None) -> None:
    seen: list[str] = []

    @contextmanager
    def pause(name: str) -> Iterator[None]:
        for text in (f"before {name}", f"after {name}"):
            spend(0.3)
            seen.append(text)
            if text.startswith("before"):
                yield

    seconds = time_interleaved({"a": lambda _: seen.append("runs")}, 2, warm_up=0, around=pause)
    assert seconds["a"] == [0, 0]
    assert seen == ["before a", "runs", "after a"] * 2


def test_paired_ratio_ignores_a_slow_minute_of_the_machine() -> None:
    # The machine is five times slower in the second half; each pair still says 2.
    baseline, fast = [2.0, 2.0, 10.0, 10.0], [1.0, 1.0, 5.0, 5.0]
    ratio = paired_ratio(baseline, fast)
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (2, 2, 2, 4)


def test_paired_ratio_reports_the_quartiles() -> None:
    ratio = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (ratio.low, ratio.median, ratio.high) == (2, 3, 4)


def test_one_pair_has_no_spread() -> None:
    ratio = paired_ratio([3.0], [2.0])
    assert ratio.low == ratio.median == ratio.high == 1.5


@pytest.mark.parametrize(("baseline", "seconds"), [([], []), ([1.0], [1.0, 2.0])])
def test_times_that_are_no_pairs_are_a_typed_error(baseline: list[float], seconds: list[float]) -> None:
    with pytest.raises(ConfigError):
        paired_ratio(baseline, seconds)


def test_nothing_to_time_is_a_typed_error() -> None:
    with pytest.raises(ConfigError):
        time_interleaved({}, 1)
    with pytest.raises(ConfigError):
        time_interleaved({"a": lambda _: None}, 0)


def test_synchronize_returns_at_once_on_the_cpu() -> None:
    synchronize("cpu")


def test_environment_names_machine_and_versions_and_fits_json() -> None:
    environment = describe_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["device"] == "cpu"
    assert environment["torch"] in describe_machine(environment)


# -- the measurement itself: work of a known length --------------------------------------------------------------------

STEP, OTHER = 0.1, 0.1
LATE = 0.002
"""A busy machine wakes a sleeper up late."""
ATTEMPTS = 3
"""A busy machine may keep everybody waiting for a while; three times in a row it does not."""


class Clock:
    """A clock that only goes on when work is said to take time, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCKS: list[Clock] = []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time passes in `spend` only."""
    CLOCKS.append(Clock())
    monkeypatch.setattr(speed, "time", CLOCKS[-1])
    yield
    CLOCKS.pop()


def spend(seconds: float) -> None:
    """Take a known time: by the test's clock, or by sleeping through most of it and waiting for the end awake."""
    if CLOCKS:
        CLOCKS[-1].now += seconds
        return
    end = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - LATE))
    while time.perf_counter() < end:
        pass


class Sleeping(nn.Module):
    """A denoiser that takes a known time."""

    def forward(self) -> None:
        spend(STEP)


class SleepingPipeline:
    """A pipeline whose calls take ``STEP`` for each step in the denoiser, and ``OTHER`` beside it."""

    def __init__(self) -> None:
        self.unet = Sleeping()

    def __call__(self, num_inference_steps: int, batch_size: int, **_: Any) -> Any:
        spend(OTHER)
        for _step in range(num_inference_steps):
            self.unet()
        return SimpleNamespace(images=np.full((batch_size, 1, 1, 3), 0.5))


def sampling(pipe: Any, steps: int) -> Callable[[int], Any]:
    return lambda index: call(pipe, plain(steps), Task(), [index])


def measure_known_time() -> bool:
    """Whether known times are reported within 5 %."""
    pipe = SleepingPipeline()
    rounds = list(timed_rounds({"full": sampling(pipe, 3)}, 5, denoisers=lambda _: [pipe.unet]))
    whole = Latency.of([turns["full"].seconds for turns in rounds], batch=4)
    denoiser = Latency.of([turns["full"].denoiser_seconds or 0.0 for turns in rounds], batch=4)
    assert type(pipe.unet) is Sleeping
    assert set(vars(pipe.unet)) == set(vars(Sleeping()))
    return (
        whole.seconds == pytest.approx(3 * STEP + OTHER, rel=0.05)
        and denoiser.seconds == pytest.approx(3 * STEP, rel=0.05)
        and whole.images_per_second == pytest.approx(4 / (3 * STEP + OTHER), rel=0.05)
    )


def measure_speedups() -> bool:
    """Whether a pipeline is 1.00 ± 0.02 times as fast as itself, and twice as fast as twice its work."""
    pipe = SleepingPipeline()
    contenders = {"a": sampling(pipe, 1), "b": sampling(pipe, 1), "twice": sampling(pipe, 3)}
    rounds = list(timed_rounds(contenders, 9))
    seconds = {name: [turns[name].seconds for turns in rounds] for name in contenders}
    itself, twice = paired_ratio(seconds["a"], seconds["b"]), paired_ratio(seconds["twice"], seconds["a"])
    return itself.median == pytest.approx(1, abs=0.02) and twice.median == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("measure", [measure_known_time, measure_speedups])
def test_known_times_are_measured(measure: Callable[[], bool]) -> None:
    assert any(measure() for _ in range(ATTEMPTS))


@pytest.mark.parametrize("measure", [measure_known_time, measure_speedups])
def test_known_times_are_measured_where_nothing_disturbs(measure: Callable[[], bool], clock: None) -> None:
    assert measure()


def test_work_in_hooks_is_part_of_a_denoisers_time(clock: None) -> None:
    module = Sleeping()
    with_hook = module.register_forward_pre_hook(lambda *_: spend(STEP), prepend=True)

    def sample() -> None:
        late = module.register_forward_pre_hook(lambda *_: spend(STEP), prepend=True)
        module()
        late.remove()

    turn = take_turn(sample, denoisers=[module])
    assert turn.denoiser_seconds == pytest.approx(3 * STEP)
    with_hook.remove()


class Nested(nn.Module):
    """A denoiser that calls itself, as hooks do that make several evaluations at once."""

    def forward(self, depth: int) -> None:
        spend(STEP)
        if depth:
            self(depth - 1)


def test_a_call_within_a_call_counts_once(clock: None) -> None:
    module = Nested()
    turn = take_turn(lambda: module(2), denoisers=[module])
    assert turn.denoiser_seconds == pytest.approx(3 * STEP)
    assert turn.denoiser_seconds <= turn.seconds


class Doubling(nn.Module):
    """Something to compile: torch leaves its own modules as they are."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return 2 * sample


def test_compiled_calls_stay_compiled_while_they_are_timed() -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    module = Doubling()
    module.compile(backend=backend)
    module(torch.zeros(1, 2))
    for _ in range(3):
        take_turn(lambda: module(torch.zeros(1, 2)), denoisers=[module])
    assert compiled <= 2  # once more for the timed class, which stays


def test_rounds_go_on_where_others_ended() -> None:
    order: list[str] = []
    contenders = {name: lambda _, name=name: order.append(name) for name in "abc"}
    list(timed_rounds(contenders, 1, first=4))
    assert order == ["b", "c", "a"]


def test_latency_knows_its_spread() -> None:
    latency = Latency.of([float(value) for value in range(1, 102)], batch=2)
    assert (latency.seconds, latency.low, latency.high, latency.p95, latency.calls) == (51, 26, 76, 96, 101)
    with pytest.raises(ConfigError, match="at least one call"):
        Latency.of([], batch=1)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_the_saturating_batch_is_where_doubling_stops_to_pay(clock: None) -> None:
    # 8 images hardly take longer than 1: throughput doubles up to there and falls a little then.
    def call_of(batch: int) -> None:
        spend(0.05 * max(1.0, batch / 7))

    assert saturating_batch(call_of) == 8


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("x: not enough memory")]
)
def test_the_saturating_batch_is_the_last_that_fits(error: Exception, clock: None) -> None:
    def call_of(batch: int) -> None:
        if batch > 4:
            raise error
        spend(0.01)

    assert saturating_batch(call_of) == 4


def test_other_errors_are_not_memorys(clock: None) -> None:
    def call_of(batch: int) -> None:
        if batch > 4:
            raise RuntimeError("shapes differ")
        spend(0.01)

    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        saturating_batch(call_of)


def test_a_batch_may_be_as_large_as_allowed(clock: None) -> None:
    assert saturating_batch(lambda _: spend(0.005), most=4) == 4
    with pytest.raises(MemoryError):
        saturating_batch(lambda _: (_ for _ in ()).throw(MemoryError()))
