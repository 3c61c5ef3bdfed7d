"""Paired timing."""

from __future__ import annotations

import json
import time

import pytest

from fastdiff.cost import synchronize
from fastdiff.errors import ConfigError
from fastdiff.eval import describe_environment, paired_ratio, time_interleaved
from fastdiff.eval.provenance import describe_machine


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
