"""Samples that stop on their own: decided while a call runs, from the hidden state that a unit is about to read.

The samples of a batch stop one by one. Those that go on are gathered into a smaller batch, so that the units after an
exit have less to do; each sample is put back once, where it stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdiff.backbones import Backbone
from fastdiff.backbones.base import Step, Streams
from fastdiff.errors import StateError
from fastdiff.kernels.steps import Steps

SCOPES = ("per_sample", "batch_mean", "batch_all")

Scorer = Callable[[torch.Tensor, torch.Tensor, Steps], torch.Tensor]
"""Hidden state ``(rows, ...)``, timesteps ``(rows,)`` and the operations that may be used, to uncertainties in [0, 1],
shape ``(rows,)``."""

Watch = Callable[[int, int, torch.Tensor], None]
"""Told an evaluation's row, an exit's column, and the uncertainties there of the samples that still run, on the device,
as they are compared with the threshold."""


@dataclass(frozen=True)
class ExitRule:
    """When samples stop, for the evaluations of one grid.

    Args:
        scorers: by the column of the unit that would be the first not to run.
        thresholds: a sample stops where its uncertainty is below, shape ``(evaluations, units)``; 0 asks nothing there,
            and infinity stops every sample.
        scope: one decision for each sample, or for the batch by its mean, or for the batch once all are below.
        patience: times that an uncertainty must have been below.
        lookahead: units that run between a decision and its effect, while it is read back from the device; None for 1
            between blocks on accelerators, and 0 between a UNet's stages and on the CPU.
        watch: told every uncertainty, also where the threshold is 0 and nobody can stop.
    """

    scorers: Mapping[int, Scorer]
    thresholds: np.ndarray
    scope: str = "per_sample"
    patience: int = 1
    lookahead: int | None = None
    watch: Watch | None = None

    def asks(self, row: int, column: int) -> bool:
        """Whether uncertainties are asked for before a unit, in an evaluation."""
        return column in self.scorers and (self.watch is not None or bool(self.thresholds[row, column] > 0))


class HandOver:
    """For each unit whether its output reaches nothing but the next unit, unchanged: seen in calls, not assumed.

    Where that is so, rows that stopped need not be put back into the batch between units. Between a UNet's stages they
    could not be, and the layouts of which that is known are the ones with such steps.
    """

    def __init__(self, backbone: Backbone) -> None:
        read = {name for unit in backbone.units for name in unit.traits.reads}
        self._is_direct: list[bool | None] = [False if name in read else None for name in backbone.names]
        for step in backbone.up_steps:
            self._is_direct[step.columns[-1]] = True
        self._is_direct[backbone.outputs.start - 1] = False
        self.is_fixed = bool(backbone.up_steps)

    def is_direct(self, column: int) -> bool:
        """Whether this is known of a unit."""
        return bool(self._is_direct[column])

    def learn(self, column: int, output: Streams, following: Streams) -> None:
        """Note what the next unit was given after a unit's output."""
        if not self.is_fixed and self._is_direct[column] is not False:
            self._is_direct[column] = _same(output, following)


class Exits:
    """Which samples still run in one denoiser call.

    Args:
        rule: when they stop.
        row: the call's evaluation, counted as the rule's thresholds are.
        heads: modules that turn the hidden state at an exit into one for the output layers, by column; those of a
            UNet are given the first long skip too.
        timestep: as the call gives it; a number, or a tensor of one value or of one for each row.
        copies: how often the samples are in the batch, one guidance branch after the other; they stop together.
        hand_over: what is known of the way from unit to unit.
        steps: scores samples, takes them out of the batch, and puts them back.
        depths: how many units each sample ran in another guidance branch of this evaluation, which this one follows.
    """

    def __init__(
        self,
        rule: ExitRule,
        row: int,
        heads: Mapping[int, nn.Module],
        timestep: Any,
        copies: int,
        hand_over: HandOver,
        steps: Steps,
        depths: np.ndarray | None = None,
    ) -> None:
        self._rule = rule
        self._row = row
        self._thresholds = rule.thresholds[row]
        self._heads = heads
        self._timestep = timestep
        self._copies = copies
        self._hand_over = hand_over
        self._sets_aside = hand_over.is_fixed
        self._follows = depths
        self._steps = steps
        self._batch = 0
        self._active: list[int] = []  # samples that still run
        self._rows: torch.Tensor | None = None  # their rows in the batch; None for all
        self._compact: Streams = ()
        self._last: Streams = ()  # what the step before returned
        self._aside: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # of a UNet, column, rows and what they left
        self._taken: dict[int, tuple[Any, Any]] = {}
        self._times: torch.Tensor | None = None
        self._decisions: list[_Decision] = []

    # -- what is told afterwards ---------------------------------------------------------------------------------------

    @property
    def depths(self) -> np.ndarray:
        """How many units each sample ran, int64 of shape ``(samples,)``."""
        return self._depths.copy()

    # -- one step after the other --------------------------------------------------------------------------------------

    def run(self, step: Step, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a step for the samples that have not stopped."""
        column, end = step.columns[0], step.columns[-1]
        whole = step.io.read(args, kwargs)
        if not self._batch:
            self._begin(whole[0], step)
        elif self._rows is None:
            self._hand_over.learn(column - 1, self._last, whole)
        compact = self._compact_of(column, whole)
        if leaving := self._leaving(column, compact[0]):
            whole, compact = self._stop(step, leaving, whole, compact)
        if self._rows is None:
            output = forward(*args, **kwargs)
            self._last = step.io.parse(output)
            return output
        if self._active:
            arguments = self._arguments(step, compact, args, kwargs)
            self._compact = step.io.parse(forward(*arguments[0], **arguments[1]))
            if self._sets_aside:
                self._taken.clear()  # long skips, which nobody reads again
            elif not self._hand_over.is_direct(end):
                whole = self._put(whole, self._rows, self._compact)
        elif step.fragile:  # the denoiser may write into what it is handed back
            whole = tuple(stream if stream is None else stream.clone() for stream in whole)
        if step.carries is not None:
            whole = (self._brought_together(step.first_skip(args, kwargs)),)
        self._last = whole
        return step.io.build(whole)

    def _begin(self, stream: torch.Tensor, step: Step) -> None:
        self._batch = stream.shape[0]
        samples = self._batch // self._copies
        self._active = list(range(samples))
        self._depths = np.full(samples, self._thresholds.shape[0])
        self._passes = torch.zeros(samples, dtype=torch.int32, device=stream.device)
        is_short = len(step.columns) == 1 and stream.device.type != "cpu"
        self._lookahead = int(is_short) if self._rule.lookahead is None else self._rule.lookahead

    def _compact_of(self, column: int, whole: Streams) -> Streams:
        """The streams of the samples that still run."""
        if self._rows is None:
            return whole
        if not (self._active and self._hand_over.is_direct(column - 1)):
            return tuple(self._take(stream) for stream in whole)
        if not _same(whole, self._last):
            raise StateError(
                "The denoiser changed the hidden state between two of its blocks in one call and not in another, so "
                "that samples cannot exit one by one. Use scope='batch_mean' or 'batch_all'."
            )
        return self._compact

    def _arguments(self, step: Step, compact: Streams, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, Any]:
        """A step's arguments, cut to the samples that still run."""
        positions = dict(zip(step.io.positions, compact, strict=True))
        named = dict(zip(step.io.streams, compact, strict=True))
        return (
            tuple(positions[index] if index in positions else self._take(value) for index, value in enumerate(args)),
            {name: named[name] if name in named else self._take(value) for name, value in kwargs.items()},
        )

    def _take(self, value: Any) -> Any:
        """The active rows of whatever has one for each of the batch; the same value is cut once."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._take, value))
        if isinstance(value, dict):
            return {name: self._take(item) for name, item in value.items()}
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != self._batch:
            return value
        if id(value) not in self._taken:
            assert self._rows is not None
            self._taken[id(value)] = value, self._steps.gather(value, self._rows)
        return self._taken[id(value)][1]

    # -- stopping ------------------------------------------------------------------------------------------------------

    def _leaving(self, column: int, hidden: torch.Tensor) -> list[int]:
        """The samples that stop before this unit."""
        if self._follows is not None:
            return [sample for sample in self._active if self._follows[sample] <= column]
        if self._active and self._rule.asks(self._row, column):
            self._decisions.append(self._decide(column, hidden))
        leaving: set[int] = set()
        while self._decisions and self._decisions[0].column <= column - self._lookahead:
            leaving.update(self._decisions.pop(0).leaving())
        return [sample for sample in self._active if sample in leaving]

    def _decide(self, column: int, hidden: torch.Tensor) -> _Decision:
        threshold = self._thresholds[column]
        if np.isinf(threshold):
            below = torch.ones(len(self._active), dtype=torch.bool, device=hidden.device)
        else:
            uncertainty = self._rule.scorers[column](hidden, self._timesteps(hidden), self._steps)
            uncertainty = uncertainty.view(self._copies, len(self._active))
            reduced = self._reduced(uncertainty)
            if self._rule.watch is not None:
                self._rule.watch(self._row, column, reduced)
            below = reduced < threshold
        if self._rule.patience > 1:
            samples = slice(None) if self._rows is None else self._rows[: len(self._active)]
            self._passes[samples] += below
            below = self._passes[samples] >= self._rule.patience
        return _Decision(column, tuple(self._active), below)

    def _reduced(self, uncertainty: torch.Tensor) -> torch.Tensor:
        """One uncertainty for each sample, of those of its copies, shape ``(copies, samples)``."""
        if self._rule.scope == "batch_mean":
            return uncertainty.mean().expand(uncertainty.shape[1])
        if self._rule.scope == "batch_all":
            return uncertainty.amax().expand(uncertainty.shape[1])
        return uncertainty.amax(0)

    def _timesteps(self, hidden: torch.Tensor) -> torch.Tensor:
        """The timestep of each active row; the same tensor until samples stop."""
        if self._times is None:
            timestep = torch.as_tensor(self._timestep, device=hidden.device)
            if timestep.ndim and timestep.shape[0] == self._batch:
                self._times = timestep if self._rows is None else timestep.index_select(0, self._rows)
            else:
                self._times = timestep.reshape(-1)[:1].expand(hidden.shape[0])
        return self._times

    def _stop(self, step: Step, leaving: Sequence[int], whole: Streams, compact: Streams) -> tuple[Streams, Streams]:
        """Put samples back that stop here, or aside where the others will change shape, and go on with these."""
        column, device = step.columns[0], compact[0].device
        self._depths[list(leaving)] = column
        gone = set(leaving)
        stay = [place for place, sample in enumerate(self._active) if sample not in gone]
        leave = [place for place, sample in enumerate(self._active) if sample in gone]
        samples, before = self._batch // self._copies, len(self._active)
        stopped = tuple(self._rows_of(stream, leave, before) for stream in compact)
        rows = _every_copy(leaving, samples, self._copies, device)
        if self._sets_aside:
            self._aside.append((column, rows, stopped[0]))
        else:
            if (head := self._heads.get(column)) is not None:
                stopped = (head(stopped[0]), *stopped[1:])
            whole = self._put(whole, rows, stopped)
        compact = tuple(self._rows_of(stream, stay, before) for stream in compact)
        self._active = [self._active[place] for place in stay]
        self._rows = _every_copy(self._active, samples, self._copies, device)
        self._taken.clear()
        self._times = None
        return whole, compact

    def _brought_together(self, first_skip: torch.Tensor) -> torch.Tensor:
        """What output layers read: what the samples that never stopped left, and what heads make of the others."""
        assert self._rows is not None
        parts = [(self._rows, self._compact[0])] if self._active else []
        for column, rows, hidden in self._aside:
            parts.append((rows, self._heads[column](hidden, self._steps.gather(first_skip, rows))))
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return self._steps.gather(torch.cat([part for _, part in parts]), order)

    def _rows_of(self, stream: Any, places: Sequence[int], samples: int) -> Any:
        if stream is None:
            return None
        return self._steps.gather(stream, _every_copy(places, samples, self._copies, stream.device))

    def _put(self, whole: Streams, rows: torch.Tensor, part: Streams) -> Streams:
        """Streams with some rows replaced."""
        pairs = zip(whole, part, strict=True)
        return tuple(None if new is None else self._steps.scatter(old, rows, new.to(old.dtype)) for old, new in pairs)


class _Decision:
    """Which samples stop, on its way from the device."""

    def __init__(self, column: int, samples: tuple[int, ...], stops: torch.Tensor) -> None:
        self.column = column
        self._samples = samples
        self._ready: torch.cuda.Event | None = None
        self._stops = stops
        if stops.is_cuda:
            self._stops = torch.empty(stops.shape, dtype=stops.dtype, pin_memory=True)
            self._stops.copy_(stops, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def leaving(self) -> list[int]:
        """The samples that stop; waits for the device where it has not said so yet."""
        if self._ready is not None:
            self._ready.synchronize()
        return [sample for sample, stops in zip(self._samples, self._stops.tolist(), strict=True) if stops]


def _every_copy(places: Sequence[int], size: int, copies: int, device: torch.device) -> torch.Tensor:
    """Row numbers of some places in every one of ``copies`` parts of ``size`` rows."""
    rows = [copy * size + place for copy in range(copies) for place in places]
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def _same(output: Streams, following: Streams) -> bool:
    return len(output) == len(following) and all(a is b for a, b in zip(output, following, strict=True))


def copies_in(sample: torch.Tensor) -> int:
    """How often a batch holds the same samples, one guidance branch after the other; waits for the device."""
    for copies in (3, 2):
        if sample.shape[0] % copies == 0:
            first, *others = sample.chunk(copies)
            if all(torch.equal(first, other) for other in others):
                return copies
    return 1
