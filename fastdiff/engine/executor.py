"""The executor of one denoiser: before each of its calls it picks the plan's row and tells every unit what to do."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastdiff.backbones import unwrap
from fastdiff.cost import measure
from fastdiff.engine.branches import Branch, BranchFinder
from fastdiff.engine.clock import Grid, StepClock
from fastdiff.engine.hooks import COMPUTE, Cell, InstalledHooks
from fastdiff.engine.program import Key, Program, Residual, Reuse, lower
from fastdiff.engine.record import Call, DenoiserRecord
from fastdiff.methods.base import PlanRequest
from fastdiff.plan import Action, ComputePlan

GRAPHS = 64
"""Distinct rows, or kinds of cell where blocks are compiled one by one, that a compiler may keep."""

Planner = Callable[[PlanRequest], ComputePlan]
"""Makes the plan for the evaluations to come."""


class _BranchState:
    """What one guidance branch keeps: residuals, and the layout of the sample they belong to."""

    def __init__(self, layout: tuple[Any, ...]) -> None:
        self.layout = layout
        self.residuals: dict[Key, Residual] = {}

    def holds(self, key: Key) -> bool:
        """Whether the residual was computed and not freed since."""
        return key in self.residuals and self.residuals[key].value is not None


class Executor:
    """Runs plans on one denoiser for one sampling call, between `open` and `close`.

    Args:
        hooks: the acting hooks on the denoiser's units.
        clock: the call's step clock.
        planner: makes the plan, once for each grid.
        exit_heads: modules that turn the hidden state at an exit into one for the output layers, by unit name.
    """

    def __init__(
        self,
        hooks: InstalledHooks,
        clock: StepClock,
        planner: Planner,
        exit_heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.hooks = hooks
        self.backbone = hooks.backbone
        self.record = DenoiserRecord(self.backbone.class_name, self.backbone.names)
        self.context: str | None = None
        self._clock = clock
        self._planner = planner
        self._heads = dict(exit_heads or {})
        self._signature = inspect.signature(type(self.backbone.denoiser).forward)
        self._attached: list[Callable[[], None]] = []
        self.restart()

    def restart(self) -> None:
        """Drop everything that belongs to the grid before."""
        self._program: Program | None = None
        self._first_evaluation = 0
        self._branches: dict[Branch, _BranchState] = {}
        self._finder = BranchFinder()

    # -- the sampling call -------------------------------------------------------------------------------------------

    def open(self, denoiser: nn.Module) -> None:
        """Start watching calls of the denoiser, compiled or not, from outside any compiled code."""
        if getattr(denoiser, "_compiled_call_impl", None) is not None:
            self._watch_compiled(denoiser)
        else:
            handle = denoiser.register_forward_pre_hook(
                lambda module, args, kwargs: self.before_call(args, kwargs), with_kwargs=True, prepend=True
            )
            self._attached.append(handle.remove)
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
            self.before_call(args, kwargs)
            return compiled(*args, **kwargs)

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

    def before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pick the row for the coming call and arm the units' hooks with it."""
        arguments = self._arguments(args, kwargs)
        if self._program is None and self._clock.grid is not None:
            self._start(self._clock.grid, arguments)
        self._clock.in_evaluation = True
        branch = self._finder.find(self.context, arguments)
        state = self._state(branch, arguments)
        row = self._clock.evaluation - self._first_evaluation
        reason = self._reason_to_compute(row, state, arguments)
        if self._program is None or reason:
            self.hooks.compute_all()
            self.record.fallbacks[reason] += 1
            actions = [int(Action.COMPUTE)] * len(self.backbone.units)
        else:
            self.hooks.set_cells(self._cells(self._program, row, state))
            actions = self._program.plan.table[row].tolist()
        self.record.calls.append(Call(self._clock.evaluation, branch, tuple(actions)))

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by the names in the denoiser's forward."""
        arguments = dict(self._signature.bind(None, *args, **kwargs).arguments)
        arguments.pop(next(iter(self._signature.parameters)))  # self
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        return arguments

    def _reason_to_compute(self, row: int, state: _BranchState, arguments: Mapping[str, Any]) -> str:
        """Why this call cannot follow the plan and is computed in full; empty if it can."""
        if self._program is None:
            return "the scheduler's timesteps were not set"
        if row >= self._program.plan.evaluations:
            return "more evaluations than the scheduler's grid has"
        if arguments.get("skip_layers"):
            return "the pipeline itself leaves out layers (skip_layers)"
        if not all(state.holds(key) for reading in self._program.readings[row] for key in reading.sources):
            return "nothing kept to reuse for this branch and shape"
        return ""

    def _start(self, grid: Grid, arguments: Mapping[str, Any]) -> None:
        """Lower the methods for the evaluations from this denoiser's first call on."""
        timestep = next((value for name, value in arguments.items() if name in ("timestep", "timesteps", "t")), None)
        if self._clock.evaluation == 0:
            self._clock.skip_to(self._clock.begin_index(timestep) or 0)
        self._first_evaluation = self._clock.evaluation
        sample = _sample(arguments)
        if sample is not None:
            self._heads = {name: head.to(sample.device) for name, head in self._heads.items()}
        self.hooks.compute_all()
        self.record.measure = functools.partial(measure, self.backbone, dict(arguments))
        request = PlanRequest(self.backbone, grid.since(self._first_evaluation), self.record.measure)
        self._program = lower(self._planner(request), self.backbone)
        self.record.plans.append(self._program.plan)

    def _state(self, branch: Branch, arguments: Mapping[str, Any]) -> _BranchState:
        sample = _sample(arguments)
        layout = () if sample is None else (sample.shape, sample.dtype, sample.device)
        state = self._branches.get(branch)
        if state is None or state.layout != layout:
            state = self._branches[branch] = _BranchState(layout)
        return state

    def _cells(self, program: Program, row: int, state: _BranchState) -> list[Cell]:
        """What every unit does in a row, bound to what this branch keeps."""
        exits = False
        cells = []
        for name, action in zip(self.backbone.names, program.plan.table[row], strict=True):
            head = self._heads.get(name) if action == Action.EXIT and not exits else None
            exits = action == Action.EXIT
            cells.append(COMPUTE if action == Action.COMPUTE else Cell(compute=False, head=head))
        for key in program.captures[row]:
            residual = state.residuals[key] = Residual()
            for column in {key.run.first, key.run.last}:
                if cells[column] is COMPUTE:
                    cells[column] = Cell()
                    cells[column].plain = False
            cells[key.run.first].opens.append(residual)
            cells[key.run.last].keeps.append(residual)
        for reading in program.readings[row]:
            sources = tuple(state.residuals[key] for key in reading.sources)
            reuse = Reuse(sources, _as_tensor(reading.weights))
            cells[reading.run.first].opens.append(reuse)
            cells[reading.run.last].reuse = reuse
        return cells

    # -- between calls -----------------------------------------------------------------------------------------------

    def next_evaluation(self) -> None:
        """Free what no later row reads and note how much is held."""
        self._finder.next_evaluation()
        if self._program is None:
            return
        kept = [residual for state in self._branches.values() for residual in state.residuals.values()]
        self.record.peak_bytes = max(self.record.peak_bytes, sum(residual.nbytes for residual in kept))
        row = self._clock.evaluation - self._first_evaluation
        for state in self._branches.values():
            for key in [key for key in state.residuals if self._program.last_reader[key] < row]:
                del state.residuals[key]


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
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    before = getattr(config, name)
    setattr(config, name, max(before, number))
    return lambda: setattr(config, name, before)


def _as_tensor(weights: tuple[float, ...]) -> torch.Tensor | None:
    """Weights as a tensor on the host, whose values a compiler does not guard on; None to carry one value over."""
    return None if len(weights) == 1 else torch.tensor(weights, dtype=torch.float32)
