"""Paired timing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.cost import synchronize
from fastdiff.errors import ConfigError
from fastdiff.eval import describe_environment, paired_ratio, time_interleaved
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


def test_times_are_those_of_the_calls() -> None:
    seconds = time_interleaved({"short": lambda _: None, "long": lambda _: time.sleep(0.05)}, 3)
    assert min(seconds["long"]) >= 0.05 > min(seconds["short"])


def test_what_happens_between_turns_is_not_timed() -> None:
    seen: list[str] = []

    def pause(name: str) -> None:
        time.sleep(0.3)
        seen.append(name)

    contenders = {"a": lambda _: seen.append("runs")}
    seconds = time_interleaved(contenders, 2, warm_up=0, before_each=pause, after_each=pause)
    assert max(seconds["a"]) < 0.3
    assert seen == ["a", "runs", "a"] * 2


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


def spend(seconds: float) -> None:
    """Take a known time: sleep through most of it and wait for the end awake."""
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


def test_a_known_time_is_reported_within_five_percent() -> None:
    pipe = SleepingPipeline()
    rounds = list(timed_rounds({"full": sampling(pipe, 3)}, 5, denoisers=lambda _: [pipe.unet]))
    whole = Latency.of([turns["full"].seconds for turns in rounds], batch=4)
    denoiser = Latency.of([turns["full"].denoiser_seconds or 0.0 for turns in rounds], batch=4)
    assert whole.seconds == pytest.approx(3 * STEP + OTHER, rel=0.05)
    assert denoiser.seconds == pytest.approx(3 * STEP, rel=0.05)
    assert whole.images_per_second == pytest.approx(4 / (3 * STEP + OTHER), rel=0.05)
    assert type(pipe.unet) is Sleeping
    assert set(vars(pipe.unet)) == set(vars(Sleeping()))


def test_speedup_over_itself_is_one_and_over_twice_the_work_is_two() -> None:
    pipe = SleepingPipeline()
    contenders = {"a": sampling(pipe, 1), "b": sampling(pipe, 1), "twice": sampling(pipe, 3)}
    rounds = list(timed_rounds(contenders, 9))
    seconds = {name: [turns[name].seconds for turns in rounds] for name in contenders}
    assert paired_ratio(seconds["a"], seconds["b"]).median == pytest.approx(1, abs=0.02)
    assert paired_ratio(seconds["twice"], seconds["a"]).median == pytest.approx(2, rel=0.05)


def test_work_in_hooks_is_part_of_a_denoisers_time() -> None:
    module = Sleeping()
    with_hook = module.register_forward_pre_hook(lambda *_: spend(STEP), prepend=True)

    def sample() -> None:
        late = module.register_forward_pre_hook(lambda *_: spend(STEP), prepend=True)
        module()
        late.remove()

    turn = take_turn(sample, denoisers=[module])
    assert turn.denoiser_seconds == pytest.approx(3 * STEP, rel=0.1)
    with_hook.remove()


class Nested(nn.Module):
    """A denoiser that calls itself, as hooks do that make several evaluations at once."""

    def forward(self, depth: int) -> None:
        spend(STEP)
        if depth:
            self(depth - 1)


def test_a_call_within_a_call_counts_once() -> None:
    module = Nested()
    turn = take_turn(lambda: module(2), denoisers=[module])
    assert turn.denoiser_seconds == pytest.approx(3 * STEP, rel=0.1)
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


def test_the_saturating_batch_is_where_doubling_stops_to_pay() -> None:
    # 8 images hardly take longer than 1: throughput doubles up to there and falls a little then.
    def call_of(batch: int) -> None:
        spend(0.05 * max(1.0, batch / 7))

    assert saturating_batch(call_of) == 8


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("x: not enough memory")]
)
def test_the_saturating_batch_is_the_last_that_fits(error: Exception) -> None:
    def call_of(batch: int) -> None:
        if batch > 4:
            raise error
        spend(0.01)

    assert saturating_batch(call_of) == 4


def test_other_errors_are_not_memorys() -> None:
    def call_of(batch: int) -> None:
        if batch > 4:
            raise RuntimeError("shapes differ")

    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        saturating_batch(call_of)


def test_a_batch_may_be_as_large_as_allowed() -> None:
    assert saturating_batch(lambda _: spend(0.005), most=4) == 4
    with pytest.raises(MemoryError):
        saturating_batch(lambda _: (_ for _ in ()).throw(MemoryError()))
