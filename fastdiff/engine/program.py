"""From a plan to what each unit does in each row: which residuals are kept, by whom they are read, when they go.

A static plan is known before the first evaluation, so only residuals that a later row reads are kept at all, and a
contiguous run of reused blocks keeps one residual, taken from the input of its first to the output of its last block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.backbones import Backbone
from fastdiff.backbones.base import Streams
from fastdiff.plan import READS_CACHE, ComputePlan


class Run(NamedTuple):
    """Units ``first..last`` that are reused together."""

    first: int
    last: int


class Key(NamedTuple):
    """One kept residual: a run of units, as an earlier row computed it."""

    run: Run
    row: int


class Reading(NamedTuple):
    """What one run of reused units reads: kept residuals and the weight of each in the sum."""

    run: Run
    sources: tuple[Key, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Program:
    """A lowered plan.

    Args:
        plan: the plan, pruned and valid for the backbone.
        readings: for each row its reused runs.
        captures: for each row the residuals to keep.
        last_reader: for every kept residual the last row that reads it.
    """

    plan: ComputePlan
    readings: tuple[tuple[Reading, ...], ...]
    captures: tuple[tuple[Key, ...], ...]
    last_reader: dict[Key, int]

    @property
    def patterns(self) -> int:
        """Number of distinct rows, as a compiler sees them: one graph each."""
        return len({self.pattern(row) for row in range(self.plan.evaluations)})

    def pattern(self, row: int) -> tuple[Any, ...]:
        """What distinguishes a row from another for a compiler."""
        reads = tuple((reading.run, len(reading.sources)) for reading in self.readings[row])
        keeps = tuple(sorted(key.run for key in self.captures[row]))
        return tuple(self.plan.table[row].tolist()), reads, keeps


def lower(plan: ComputePlan, backbone: Backbone) -> Program:
    """Turn a plan into a program for a backbone.

    Raises:
        PlanError: if the plan breaks one of the validity rules.
        ProfileMismatchError: if it was made for other units.
    """
    plan = plan.validate(backbone.traits).prune(backbone.traits)
    readings = tuple(tuple(_readings(plan, row, backbone.segments)) for row in range(plan.evaluations))
    last_reader: dict[Key, int] = {}
    for row, row_readings in enumerate(readings):
        last_reader.update({key: row for reading in row_readings for key in reading.sources})
    captures: dict[int, list[Key]] = defaultdict(list)
    for key in last_reader:
        captures[key.row].append(key)
    return Program(plan, readings, tuple(tuple(captures[row]) for row in range(plan.evaluations)), last_reader)


def _readings(plan: ComputePlan, row: int, segments: Sequence[int]) -> list[Reading]:
    """Group a row's reused units into the longest runs with one action, one segment and the same source rows."""
    readings: list[Reading] = []
    previous: tuple[Any, ...] | None = None
    for column, action in enumerate(plan.table[row]):
        if action not in READS_CACHE:
            previous = None
            continue
        rows = plan.sources(row, column)
        kind = (action, segments[column], rows)
        first = readings.pop().run.first if kind == previous else column
        run = Run(first, column)
        readings.append(Reading(run, tuple(Key(run, source) for source in rows), extrapolation_weights(rows, row)))
        previous = kind
    return readings


def extrapolation_weights(rows: Sequence[int], row: int) -> tuple[float, ...]:
    """Weights of the values at ``rows`` in their interpolating polynomial's value at ``row`` (Lagrange form).

    One value is carried over, two give the straight line, and so on: finite differences in the evaluation index.
    """
    points = np.asarray(rows, dtype=np.float64)
    weights = []
    for index, point in enumerate(points):
        others = np.delete(points, index)
        weights.append(float(np.prod((row - others) / (point - others))))
    return tuple(weights)


class Residual:
    """What a run of units added to its input: ``start`` while the run is under way, ``value`` afterwards."""

    __slots__ = ("start", "value")

    def __init__(self) -> None:
        self.start: Streams | None = None
        self.value: Streams | None = None

    def finish(self, end: Streams) -> None:
        """Keep what was added to ``start``."""
        assert self.start is not None
        self.value = tuple(None if b is None or a is None else b - a for a, b in zip(self.start, end, strict=False))
        self.start = None

    @property
    def nbytes(self) -> int:
        """Bytes held by the kept value."""
        return sum(tensor.nbytes for tensor in self.value or () if tensor is not None)


class Reuse:
    """Puts kept residuals on top of a run's fresh input."""

    __slots__ = ("sources", "start", "weights")

    def __init__(self, sources: tuple[Residual, ...], weights: torch.Tensor | None) -> None:
        self.start: Streams | None = None
        self.sources = sources
        self.weights = weights  # None where a single value is carried over

    def finish(self) -> Streams:
        """The run's output: ``start`` plus the weighted residuals, in the streams' dtype."""
        assert self.start is not None
        start, self.start = self.start, None
        return tuple(
            self._apply(stream, tuple(source.value[index] for source in self.sources))  # type: ignore[index]
            for index, stream in enumerate(start)
        )

    def _apply(self, stream: Any, residuals: tuple[Any, ...]) -> Any:
        if stream is None or residuals[0] is None:
            return stream
        if self.weights is None:
            return stream + residuals[0]
        return stream + sum(weight * residual for weight, residual in zip(self.weights, residuals, strict=True))
