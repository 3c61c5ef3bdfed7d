"""What got better or worse from one evaluation to another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdiff.eval.judging import CRITERIA, REFERENCE_DIGEST, Z, standard_error
from fastdiff.eval.results import name_of

SPEED = "speedup"
QUARTILES = 1.349
"""Quartiles of a normal distribution lie so many standard deviations apart."""
OF_MEDIAN = 1.2533
"""Standard error of a normal sample's median, in standard errors of its mean."""
FEWEST_PAIRS = 3
"""Pairs of times that say something of their own spread; speedups from fewer are not compared."""
ALIKE = ("model", "num_inference_steps", "num_samples", "seeds", "dtype", "scheduler", "asked", "judged")
"""What two results are to have in common, for their quality to compare."""
MACHINE = ("processor", "device", "torch_threads", "torch", "diffusers")
"""What their environments are to have in common, for their speed to compare."""


@dataclass(frozen=True)
class Difference:
    """One number of one way in both evaluations.

    Args:
        way: its label.
        name: ``"speedup"`` or the criterion.
        before: the earlier value.
        after: the later one.
        error: standard error of their difference; 0 where neither is known.
        better: 1 where more is better, -1 where less is.
        tolerance: share of the earlier value by which it may get worse.
    """

    way: str
    name: str
    before: float
    after: float
    error: float
    better: int
    tolerance: float

    @property
    def gain(self) -> float:
        """By how much it got better; negative where it got worse."""
        return self.better * (self.after - self.before)

    @property
    def is_noise(self) -> bool:
        """Whether as much would be found between two runs of the same thing."""
        return abs(self.gain) <= Z * self.error or self.gain == 0

    @property
    def is_regression(self) -> bool:
        """Whether it got worse, beyond noise and beyond the tolerance."""
        return not self.is_noise and -self.gain > self.tolerance * abs(self.before)


@dataclass(frozen=True)
class Comparison:
    """All that differs.

    Args:
        differences: of ways that both evaluations hold, beyond noise.
        missing: labels of ways that only the earlier one could sample; they count as regressions.
        new: labels of ways that only the later one could sample.
        compared: how many numbers were compared.
        unlike: settings that differ, so that numbers do not compare well.
    """

    differences: list[Difference]
    missing: list[str]
    new: list[str]
    compared: int
    unlike: list[str]

    @property
    def regressions(self) -> list[str]:
        """What got worse beyond noise and tolerance."""
        return [f"{one.way}: {one.name}" for one in self.differences if one.is_regression] + self.missing


def compare(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> Comparison:
    """Compare two evaluations' results, as `fastdiff.eval.results.load_results` reads them."""
    old, new = _sampled(before), _sampled(after)
    found = [one for key in old if key in new for one in _differences(old[key], new[key], tolerance)]
    unlike = [*_unlike(_comparable(before), _comparable(after), ALIKE)]
    unlike += _unlike(before["environment"], after["environment"], MACHINE)
    return Comparison(
        [one for one in found if not one.is_noise],
        [name_of(point) for key, point in old.items() if key not in new],
        [name_of(point) for key, point in new.items() if key not in old],
        len(found),
        unlike,
    )


def _comparable(data: Mapping[str, Any]) -> dict[str, Any]:
    """Results whose judge is told without what differs from machine to machine."""
    judged = {name: value for name, value in data["judged"].items() if name != REFERENCE_DIGEST}
    return {**data, "judged": judged}


def _unlike(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if before.get(name) != after.get(name):
            yield f"{name}: {before.get(name)} before, {after.get(name)} after"


def _sampled(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {point["key"]: point for point in data["points"] if point["quality"]}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> Iterator[Difference]:
    for name, criterion in CRITERIA.items():
        if name in old["quality"] and name in new["quality"]:
            before, after = old["quality"][name], new["quality"][name]
            values = before["value"], after["value"], math.hypot(_noise(before), _noise(after))
            yield Difference(name_of(old), criterion.title, *values, criterion.better, tolerance)
    if old["key"] == old["baseline"]:
        return
    for batch in old["timings"]:
        if batch in new["timings"]:
            before, after = (point["timings"][batch]["speedup"] for point in (old, new))
            if min(before["pairs"], after["pairs"]) >= FEWEST_PAIRS:
                values = before["median"], after["median"], math.hypot(_spread(before), _spread(after))
                yield Difference(name_of(old), f"{SPEED}, {batch} at a time", *values, 1, tolerance)


def _noise(told: Mapping[str, Any]) -> float:
    """Standard error of a criterion; of a mean over subsets or splits, whose own is not known, their deviation."""
    error = standard_error(told)
    return float(told.get("spread") or 0.0) if error is None else error


def _spread(speedup: Mapping[str, Any]) -> float:
    """Standard error of a median of paired ratios; few pairs know their own quartiles badly, which widens it."""
    pairs = speedup["pairs"]
    widened = 1 + 2 / (pairs - 1)  # about Student's quantile over the normal one
    return float(widened * OF_MEDIAN * (speedup["high"] - speedup["low"]) / QUARTILES / math.sqrt(pairs))


def told(comparison: Comparison) -> str:
    """The comparison as text."""
    lines = [f"not alike: {text}" for text in comparison.unlike]
    for one in sorted(comparison.differences, key=lambda one: one.gain):
        word = "REGRESSION" if one.is_regression else "worse" if one.gain < 0 else "better"
        change = f" ({(one.after - one.before) / abs(one.before):+.1%})" if one.before else ""
        lines.append(f"{word:10}  {one.way}: {one.name} {one.before:.4g} → {one.after:.4g}{change}")
    lines += [f"REGRESSION  {label}: could not be sampled any more" for label in comparison.missing]
    lines += [f"new         {label}" for label in comparison.new]
    count = len(comparison.differences)
    lines.append(
        f"{comparison.compared} numbers compared: {count} differ{'s' if count == 1 else ''} beyond noise, "
        f"{len(comparison.regressions)} regression(s)."
    )
    return "\n".join(lines)
