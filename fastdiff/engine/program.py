"""From a plan to what each unit does in each row: what is kept, by whom it is read, when it goes, what runs together.

A static plan is known before the first evaluation, so only what a later row reads is kept at all, and a contiguous run
of reused residual blocks keeps one residual, taken from the input of its first to the output of its last block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastdiff.backbones import Backbone
from fastdiff.plan import READS_CACHE, Action, ComputePlan


class Run(NamedTuple):
    """Units ``first..last`` that are reused together."""

    first: int
    last: int


class Key(NamedTuple):
    """What is kept of one run of units, as an earlier row computed it."""

    run: Run
    row: int


class Reading(NamedTuple):
    """What one run of reused units reads: kept values and the weight of each in the sum."""

    run: Run
    sources: tuple[Key, ...]
    weights: tuple[float, ...]


class Batch(NamedTuple):
    """Rows ``first..last``, none of which but the first reads the sample: their decoders run as one batch.

    Args:
        first: the row in which the others' predictions are made.
        last: the last of them.
        encodes: whether the first row computes what all of them read; if not, it reuses that as the others do.
    """

    first: int
    last: int
    encodes: bool

    @property
    def rows(self) -> range:
        """The rows of the batch."""
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Program:
    """A lowered plan.

    Args:
        plan: the plan, pruned and valid for the backbone.
        residual: for each unit whether reuse adds a residual to its fresh input, rather than taking its output.
        readings: for each row its reused runs.
        captures: for each row what to keep.
        last_reader: for everything kept the last row that reads it.
        blind: for each row whether it makes its prediction without reading the sample.
        batches: by their first rows, the rows that run as one batch.
    """

    plan: ComputePlan
    residual: tuple[bool, ...]
    readings: tuple[tuple[Reading, ...], ...]
    captures: tuple[tuple[Key, ...], ...]
    last_reader: dict[Key, int]
    blind: tuple[bool, ...]
    batches: dict[int, Batch]

    @property
    def patterns(self) -> int:
        """Number of distinct rows, as a compiler sees them: one graph each."""
        return len({self.pattern(row) for row in range(self.plan.evaluations)})

    def pattern(self, row: int) -> tuple[Any, ...]:
        """What distinguishes a row from another for a compiler."""
        reads = tuple((reading.run, len(reading.sources)) for reading in self.readings[row])
        keeps = tuple(sorted(key.run for key in self.captures[row]))
        return tuple(self.plan.rows[row]), reads, keeps

    def computes_all(self, row: int) -> bool:
        """Whether a row runs every unit and leaves nothing for later ones."""
        return set(self.plan.rows[row]) == {Action.COMPUTE} and not self.captures[row]

    def encoding_columns(self, batch: Batch) -> int:
        """How many columns of a batch's first row run before its decoder does: all up to the last that is kept."""
        return 1 + max(key.run.last for key in self.captures[batch.first]) if batch.encodes else 0


def lower(plan: ComputePlan, backbone: Backbone) -> Program:
    """Turn a plan into a program for a backbone.

    Raises:
        PlanError: if the plan breaks one of the validity rules.
        ProfileMismatchError: if it was made for other units.
    """
    plan = plan.validate(backbone.traits).prune(backbone.traits)
    kinds = plan.reuse_kinds(backbone.traits)
    residual = tuple(kind == "residual" for kind in kinds)
    # An output stands for itself: only residuals of units that follow each other may be summed up in one.
    names = zip(backbone.segments, residual, plan.units, strict=True)
    segments = [segment if adds else (segment, name) for segment, adds, name in names]
    readings = tuple(tuple(_readings(plan, row, segments)) for row in range(plan.evaluations))
    last_reader: dict[Key, int] = {}
    for row, row_readings in enumerate(readings):
        last_reader.update({key: row for reading in row_readings for key in reading.sources})
    kept: dict[int, list[Key]] = defaultdict(list)
    for key in last_reader:
        kept[key.row].append(key)
    captures = tuple(tuple(kept[row]) for row in range(plan.evaluations))
    blind = _blind_rows(plan, kinds)
    alike = [is_blind and not kept_in_row for is_blind, kept_in_row in zip(blind, captures, strict=True)]
    batches = _batches(plan, readings, alike) if plan.meta.get("parallel") else {}
    return Program(plan, residual, readings, captures, last_reader, blind, batches)


def _readings(plan: ComputePlan, row: int, segments: Sequence[Any]) -> list[Reading]:
    """Group a row's reused units into the longest runs with one action, one segment and the same source rows."""
    readings: list[Reading] = []
    previous: tuple[Any, ...] | None = None
    for column, action in enumerate(plan.rows[row]):
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


def _blind_rows(plan: ComputePlan, kinds: Sequence[str]) -> tuple[bool, ...]:
    """Which rows do not read the sample: what the first unit makes of it is not read, or replaced by its reuse."""
    first = plan.table[:, 0]
    replaced = np.isin(first, READS_CACHE) & (kinds[0] == "output")
    return tuple(((first == Action.DROP) | replaced).tolist())


def _batches(plan: ComputePlan, readings: Sequence[tuple[Reading, ...]], alike: Sequence[bool]) -> dict[int, Batch]:
    """The longest runs of rows that differ in their timestep alone, each with the row that computes what it reads."""
    batches: list[Batch] = []
    for row in range(1, plan.evaluations):
        if not alike[row]:
            continue
        if batches and batches[-1].last == row - 1 and _same_work(plan, readings, row - 1, row):
            batches[-1] = batches[-1]._replace(last=row)
        elif row > 1 and _encodes_for(plan, readings, row - 1, row):  # row 0 shows the shapes that later rows rely on
            batches.append(Batch(row - 1, row, encodes=True))
        else:
            batches.append(Batch(row, row, encodes=False))
    return {batch.first: batch for batch in batches if batch.last > batch.first}


def _same_work(plan: ComputePlan, readings: Sequence[tuple[Reading, ...]], one: int, other: int) -> bool:
    """Whether two rows do the same with the same kept values."""
    sources = [[(reading.run, reading.sources) for reading in readings[row]] for row in (one, other)]
    return np.array_equal(plan.table[one], plan.table[other]) and sources[0] == sources[1]


def _encodes_for(plan: ComputePlan, readings: Sequence[tuple[Reading, ...]], encoder: int, row: int) -> bool:
    """Whether a row reuses what ``encoder`` computed last, and does all else as that row does."""
    newest = {key.row for reading in readings[row] for key in reading.sources[:1]}
    own = ~np.isin(plan.table[row], (*READS_CACHE, Action.DROP))
    return newest == {encoder} and np.array_equal(plan.table[encoder][own], plan.table[row][own])
