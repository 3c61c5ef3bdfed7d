"""The executor of one denoiser: before each of its calls it picks the plan's row and tells every unit what to do."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdiff.backbones import is_compiled, unwrap
from fastdiff.cost import measure
from fastdiff.engine.batching import (
    CONTROL,
    is_at,
    mixing_processor,
    observed_processor,
    processors,
    room_for,
    stacked,
    taken_apart,
    timestep_name,
)
from fastdiff.engine.branches import Branch, BranchFinder
from fastdiff.engine.cells import RowCells
from fastdiff.engine.clock import Grid, StepClock
from fastdiff.engine.exits import ExitRule, Exits, HandOver, copies_in
from fastdiff.engine.graphs import Work
from fastdiff.engine.hooks import InstalledHooks
from fastdiff.engine.kept import BranchState
from fastdiff.engine.program import Batch, Program, lower
from fastdiff.engine.record import Call, DenoiserRecord
from fastdiff.engine.skips import SkipScales, control_of
from fastdiff.kernels.steps import steps_of
from fastdiff.methods.base import PlanRequest
from fastdiff.plan import Action, ComputePlan

GRAPHS = 64
"""Distinct rows, or kinds of cell where blocks are compiled one by one, that a compiler may keep."""

Planner = Callable[[PlanRequest], ComputePlan]
"""Makes the plan for the evaluations to come."""

Scaler = Callable[[PlanRequest], SkipScales | None]
"""Says by how much they read their long skips scaled."""

Ruler = Callable[[PlanRequest], ExitRule | None]
"""Says when samples stop on their own."""


class Executor:
    """Runs plans on one denoiser for one sampling call, between `open` and `close`.

    Args:
        hooks: the acting hooks on the denoiser's units.
        clock: the call's step clock.
        planner: makes the plan, once for each grid.
        scaler: says by how much long skips are scaled, once for each grid.
        ruler: says when samples stop on their own, once for each grid.
        exit_heads: modules that turn the hidden state at an exit into one for the output layers, by unit name.
    """

    def __init__(
        self,
        hooks: InstalledHooks,
        clock: StepClock,
        planner: Planner,
        scaler: Scaler,
        ruler: Ruler,
        exit_heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.hooks = hooks
        self.backbone = hooks.backbone
        self.record = DenoiserRecord(self.backbone.class_name, self.backbone.names)
        self.context: str | None = None
        self._clock = clock
        self._planner = planner
        self._scaler = scaler
        self._ruler = ruler
        self._heads = dict(exit_heads or {})
        self._steps = steps_of(self.backbone.denoiser)
        self._parameters = list(inspect.signature(type(self.backbone.denoiser).forward).parameters)[1:]
        self._attached: list[Callable[[], None]] = []
        self._own_call = False
        self.restart()

    def restart(self) -> None:
        """Drop everything that belongs to the grid before."""
        self._program: Program | None = None
        self._skip_scales: SkipScales | None = None
        self._rule: ExitRule | None = None
        self._exits: Exits | None = None
        self._depths: np.ndarray | None = None  # of the evaluation's first guidance branch
        self._hand_overs: dict[frozenset[str], HandOver] = {}
        self._first_evaluation = 0
        self._branches: dict[Branch, BranchState] = {}
        self._finder = BranchFinder()
        self._answer: Callable[[], Any] | None = None

    # -- the sampling call -------------------------------------------------------------------------------------------

    def open(self, denoiser: nn.Module) -> None:
        """Start watching calls of the denoiser, compiled or not, from outside any compiled code."""
        self._module = denoiser
        if self.hooks.graphs is not None:
            self._attached.append(self.hooks.graphs.attach(denoiser, self.record))
        if getattr(denoiser, "_compiled_call_impl", None) is not None:
            self._watch_compiled(denoiser)
        else:
            before = denoiser.register_forward_pre_hook(
                lambda module, args, kwargs: self.before_call(args, kwargs), with_kwargs=True, prepend=True
            )
            after = denoiser.register_forward_hook(lambda module, args, output: self.after_call(output), prepend=True)
            self._attached += [before.remove, after.remove]
        self._watch_context(unwrap(denoiser))
        self._attached.append(_allow_graphs(GRAPHS))

    def close(self) -> None:
        """Stop watching and free what was kept."""
        while self._attached:
            self._attached.pop()()
        self.hooks.compute_all()
        self.restart()

    def _watch_compiled(self, denoiser: nn.Module) -> None:
        """`Module.compile` puts forward hooks into the graph; go before it."""
        compiled: Callable[..., Any] = vars(denoiser)["_compiled_call_impl"]

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.before_call(args, kwargs) or (args, kwargs)
            output = compiled(*args, **kwargs)
            answer = self.after_call(output)
            return output if answer is None else answer

        vars(denoiser)["_compiled_call_impl"] = call
        self._attached.append(lambda: vars(denoiser).update(_compiled_call_impl=compiled))

    def _watch_context(self, denoiser: nn.Module) -> None:
        """Learn the name of the guidance branch from pipelines that open a `cache_context`."""
        opened: Callable[..., Any] | None = getattr(denoiser, "cache_context", None)
        if opened is None:
            return

        @contextmanager
        def named(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            with opened(name, *args, **kwargs):
                self.context = name
                try:
                    yield
                finally:
                    self.context = None

        own = {key: value for key, value in vars(denoiser).items() if key == "cache_context"}
        vars(denoiser)["cache_context"] = named

        def restore() -> None:
            vars(denoiser).pop("cache_context", None)
            vars(denoiser).update(own)

        self._attached.append(restore)

    # -- one denoiser call -------------------------------------------------------------------------------------------

    def before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """Pick the row for the coming call and arm the units' hooks with it.

        Returns:
            Other arguments to call with; None to keep those given.
        """
        if self._own_call:
            return None
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs  # a wrong call fails by itself
        if self._program is None and self._clock.grid is not None:
            self._start(self._clock.grid, arguments)
        self._clock.in_evaluation = True
        self._answer = self._exits = None
        branch = self._finder.find(self.context, arguments)
        state = self._state(branch, arguments)
        row = self._clock.evaluation - self._first_evaluation
        reason = self._reason_to_compute(row, state, arguments)
        held = None
        if self._program is None or reason:
            self.hooks.compute_all()
            if self._program is not None:
                self.hooks.set_cells(self._cells.computing(state))
            self._scale_skips([row], arguments)
            self.record.fallbacks[reason] += 1
            self._expect(reason)
            actions = [int(Action.COMPUTE)] * len(self.backbone.units)
        else:
            held = self._hold_control(self._program, row, state, arguments)
            self._arm(self._program, row, state, arguments | (held or {}))
            actions = self._program.plan.rows[row]
        self.record.calls.append(Call(self._clock.evaluation, branch, tuple(actions)))
        return None if held is None else ((), arguments | held)

    def after_call(self, output: Any) -> Any:
        """What the call returns instead of ``output``; None if that is what was asked for."""
        if self._own_call:
            return None
        if self._exits is not None:
            self._note_exits(self._exits)
        if self._answer is None:
            return None
        answer, self._answer = self._answer, None
        return answer()

    def _arm(self, program: Program, row: int, state: BranchState, arguments: dict[str, Any]) -> None:
        """Tell the units what to do in a row: their part of it, or nothing where the prediction is there already."""
        self._scale_skips([], arguments)
        if row in state.answers:
            answer = state.answers.pop(row)
            self._answer = lambda: answer
            self.hooks.set_cells(self._cells.idle(state))
            self._expect("the prediction was made ahead")
            return
        if self._rule is not None and program.computes_all(row):
            self._exits = self._exits_of(self._rule, row, state, arguments)
            self.hooks.set_exits(self._exits)
            self._scale_skips([row], arguments)
            self._expect("samples stop where it is found out while they run")
            return
        batch = program.batches.get(row)
        if batch is None or self._one_by_one(row, state, arguments):
            self.hooks.set_cells(self._cells.of_row(row, state))
            self._scale_skips([row], arguments)
            if self.hooks.graphs is not None:
                self.hooks.graphs.expect(self._work(program, row, state))
            return
        self._expect("several evaluations are made at once")
        columns = program.encoding_columns(batch)
        encoding = self._cells.of_row(row, state)[:columns] if columns else []
        self.hooks.set_cells(encoding + self._cells.idle(state)[columns:])
        self._answer = functools.partial(self._decode, program, batch, state, arguments)

    def _expect(self, reason: str) -> None:
        """Tell why the coming call is none that may come again."""
        if self.hooks.graphs is not None:
            self.hooks.graphs.expect(reason)

    def _work(self, program: Program, row: int, state: BranchState) -> Work | str:
        """What a row does, what it reads and what it leaves."""
        if not self._cells.can_idle(state):
            return "the shapes of what later calls leave out are noted"
        scales = self.hooks.skip_scales
        if scales is None:
            return "what ControlNets add to skips is scaled in another way"
        readings = program.readings[row]
        weights = tuple(reading.weights for reading in readings)
        reads = [state.kept[key] for reading in readings for key in reading.sources]
        leaves = [state.kept[key] for key in sorted(program.captures[row])]
        shapes = [shape.like for shape in state.shapes]
        return Work((program.pattern(row), weights, scales), reads, leaves, shapes)

    def _scale_skips(self, rows: Sequence[int], arguments: Mapping[str, Any]) -> None:
        """Tell by how much the decoder of these rows reads the long skips scaled in the coming call."""
        if self._skip_scales is None:
            return
        sample = _sample(arguments)
        scales = self._skip_scales.at(rows, None if sample is None else sample.device)
        control = None if self._skip_scales.scales_control else control_of(arguments)
        self.hooks.scale_skips(scales, control, self._steps)
        if scales is not None:
            table = self._skip_scales.table
            self.record.skip_scales.update(
                (self._first_evaluation + row, table[row]) for row in rows if (table[row] != 1).any()
            )

    def _reason_to_compute(self, row: int, state: BranchState, arguments: Mapping[str, Any]) -> str:
        """Why this call cannot follow the plan and is computed in full; empty if it can."""
        if self._program is None:
            return "the scheduler's timesteps were not set"
        if row >= self._program.plan.evaluations:
            return "more evaluations than the scheduler's grid has"
        if arguments.get("skip_layers"):
            return "the pipeline itself leaves out layers (skip_layers)"
        if self._observed:
            return f"the pipeline reads what {self._observed} sees in every call"
        if torch.is_grad_enabled() and getattr(_sample(arguments), "requires_grad", False):
            return "the pipeline takes gradients through the call"
        if self._rule is not None and is_compiled(self._module):
            return "samples do not stop one by one in a model that is compiled as a whole; compile its blocks"
        if self._rule is not None and self.backbone.up_steps:
            if self._mixing:
                return f"{self._mixing} may mix the samples of a batch, which then cannot stop one by one"
            if self._skip_scales is not None and not self._skip_scales.scales_control and control_of(arguments):
                return "samples do not stop where skips are scaled without what ControlNets add to them"
        if row in state.answers:
            return "" if self._is_at(row, arguments) else "another timestep than the prediction was made for"
        if not all(state.holds(key) for reading in self._program.readings[row] for key in reading.sources):
            return "nothing kept to reuse for this branch and shape"
        if not self._cells.are_possible(row, state):
            return "the units left out have not run in this shape before"
        return ""

    def _start(self, grid: Grid, arguments: Mapping[str, Any]) -> None:
        """Lower the methods for the evaluations from this denoiser's first call on."""
        timestep = arguments.get(timestep_name(arguments) or "")
        if self._clock.evaluation == 0:
            self._clock.skip_to(self._clock.begin_index(timestep) or 0)
        self._first_evaluation = self._clock.evaluation
        sample = _sample(arguments)
        if sample is not None:
            self._heads = {name: head.to(sample.device) for name, head in self._heads.items()}
        self.hooks.compute_all()
        self.record.measure = functools.partial(measure, self.backbone, dict(arguments))
        request = PlanRequest(self.backbone, grid.since(self._first_evaluation), self.record.measure)
        self._program = program = self._lowered(self._planner(request))
        self._skip_scales = self._scaler(request)
        self._rule = self._ruler(request)
        self._grid = request.grid
        self._cells = RowCells(program, self.backbone, self._heads, self._steps)
        kinds = set(processors(self.backbone.denoiser))
        self._mixing, self._observed = mixing_processor(kinds), observed_processor(kinds)
        self.record.plans.append(program.plan)

    def _lowered(self, plan: ComputePlan) -> Program:
        """The plan's program, which mostly is that of the sampling call before."""
        if self.hooks.lowered is None or self.hooks.lowered[0] != plan:
            self.hooks.lowered = plan, lower(plan, self.backbone)
        return self.hooks.lowered[1]

    def _state(self, branch: Branch, arguments: Mapping[str, Any]) -> BranchState:
        sample = _sample(arguments)
        layout = () if sample is None else (sample.shape, sample.dtype, sample.device)
        state = self._branches.get(branch)
        if state is None or state.layout != layout:
            state = self._branches[branch] = BranchState(layout, len(self.backbone.units))
        return state

    # -- samples that stop on their own ------------------------------------------------------------------------------

    def _exits_of(self, rule: ExitRule, row: int, state: BranchState, arguments: Mapping[str, Any]) -> Exits:
        """Which samples run in the coming call; the guidance branches of an evaluation follow its first."""
        sample = _sample(arguments)
        if state.copies is None:
            state.copies = 1 if sample is None else copies_in(sample)
        given = frozenset(name for name, value in arguments.items() if value is not None)
        hand_over = self._hand_overs.setdefault(given, HandOver(self.backbone))
        heads = {self.backbone.names.index(name): head for name, head in self._heads.items()}
        timestep = arguments.get(timestep_name(arguments) or "", 0)
        samples = 0 if sample is None else sample.shape[0] // state.copies
        followed = self._depths if self._depths is not None and len(self._depths) == samples else None
        return Exits(rule, row, heads, timestep, state.copies, hand_over, self._steps, followed)

    def _note_exits(self, exits: Exits) -> None:
        """Record what samples ran in the call that ended."""
        call, depths = self.record.calls[-1], exits.depths
        outputs = len(self.backbone.outputs)
        ran = np.arange(len(call.actions)) < depths.max()
        ran[len(ran) - outputs :] = True
        actions = tuple(np.where(ran, Action.COMPUTE, Action.EXIT).tolist())
        self.record.calls[-1] = dataclasses.replace(call, actions=actions, depths=depths, outputs=outputs)
        self._depths = depths if self._depths is None else self._depths
        self._exits = None

    # -- several evaluations at once ---------------------------------------------------------------------------------

    def _one_by_one(self, row: int, state: BranchState, arguments: Mapping[str, Any]) -> bool:
        """Whether a batch's rows are computed each in its own call; the record says why."""
        reason = ""
        if not self._cells.can_idle(state):
            reason = "no evaluation in this shape came before"
        elif self._mixing:
            reason = f"{self._mixing} may mix the samples of a batch"
        elif not self._is_at(row, arguments):
            reason = "the denoiser is not given the scheduler's own timesteps"
        if reason:
            self.record.one_by_one[reason] += 1
        return bool(reason)

    def _is_at(self, row: int, arguments: Mapping[str, Any]) -> bool:
        return is_at(self._grid, row, arguments)

    def _decode(self, program: Program, batch: Batch, state: BranchState, arguments: dict[str, Any]) -> Any:
        """Make the predictions of a batch's rows in as few calls as memory allows; returns the first."""
        sample = _sample(arguments)
        assert sample is not None
        read = {key for reading in program.readings[batch.last] for key in reading.sources}
        feature_bytes = sum(state.kept[key].nbytes for key in read)
        room = program.plan.meta.get("max_parallel") or room_for(feature_bytes, sample.device)
        arguments = arguments | state.held_control()
        for start in range(0, len(batch.rows), room):
            rows = list(batch.rows[start : start + room])
            self.hooks.set_cells(self._cells.reading(batch.last, state, rows))
            together = stacked(arguments, sample, self._grid, rows)
            self._scale_skips(rows, together)
            output = self._call(together)
            state.answers.update(zip(rows, taken_apart(output, len(rows)), strict=True))
            self.record.batches.append(len(rows))
            self._note_bytes(len(rows) * feature_bytes)
        for key in [key for key in state.kept if program.last_reader[key] <= batch.last]:
            del state.kept[key]
        return state.answers.pop(batch.first)

    def _call(self, arguments: dict[str, Any]) -> Any:
        """Call the denoiser as the pipeline does, without being told of it."""
        self._own_call = True
        try:
            return self._module(**arguments)
        finally:
            self._own_call = False

    def _hold_control(
        self, program: Program, row: int, state: BranchState, arguments: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Control belongs to the features it is added to: rows that reuse these are given what was added then."""
        given = {name: arguments[name] for name in CONTROL if arguments.get(name) is not None}
        if not program.blind[row]:
            if any(program.blind):
                state.control = given
                state.control = state.held_control()
            return None
        if not given and not state.control:
            return None
        return dict.fromkeys(given) | state.held_control()

    # -- between calls -----------------------------------------------------------------------------------------------

    def next_evaluation(self) -> None:
        """Free what no later row reads and note how much is held."""
        self._finder.next_evaluation()
        self._depths = None
        if self._program is None:
            return
        row = self._clock.evaluation - self._first_evaluation
        if any(self._program.captures[row - 1 : row]):
            self._note_bytes()
        for state in self._branches.values():
            for key in [key for key in state.kept if self._program.last_reader[key] < row]:
                del state.kept[key]
            for passed in [answered for answered in state.answers if answered < row]:
                del state.answers[passed]

    def _note_bytes(self, more: int = 0) -> None:
        held = sum(state.nbytes for state in self._branches.values())
        self.record.peak_bytes = max(self.record.peak_bytes, held + more)


def _sample(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """The noisy sample, which denoisers take first; its first item where they take a list."""
    first = next((value for value in arguments.values() if value is not None), None)
    if isinstance(first, (list, tuple)):
        first = next(iter(first), None)
    return first if isinstance(first, torch.Tensor) else None


def _allow_graphs(number: int) -> Callable[[], None]:
    """Let a compiler keep that many versions of one function; returns how to undo it.

    A plan has a fixed number of distinct rows and each is a graph, but torch gives up beyond 8 by default.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        return lambda: None
    config = torch._dynamo.config
    before = config.recompile_limit
    config.recompile_limit = max(before, number)
    return lambda: setattr(config, "recompile_limit", before)
