"""One sampling call from its first to its last denoiser evaluation, however it ends."""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastdiff.backbones import view
from fastdiff.engine.clock import Grid, StepClock
from fastdiff.engine.executor import Executor
from fastdiff.engine.exits import ExitRule
from fastdiff.engine.graphs import Graphs
from fastdiff.engine.hooks import InstalledHooks
from fastdiff.engine.record import RunRecord
from fastdiff.engine.skips import SkipScales
from fastdiff.errors import FastDiffNoEffectWarning
from fastdiff.methods.base import Method, PlanRequest, as_methods, level_of, make_planner

FEW_STEPS = 8
"""Below this many evaluations there is little to reuse between them."""


class SamplingRun:
    """Attaches methods to denoisers and schedulers for the length of one sampling call.

    Args:
        denoisers: component name to (module as the pipeline calls it, hooks on its units).
        schedulers: the schedulers whose ``set_timesteps`` and ``step`` tell the clock.
        methods: what to do.

    Use it as a context manager; leaving it, also by an exception, frees everything it kept.
    """

    def __init__(
        self,
        denoisers: Mapping[str, tuple[nn.Module, InstalledHooks]],
        schedulers: Iterable[Any],
        methods: Iterable[Method],
    ) -> None:
        self._methods = tuple(methods)
        self._schedulers = tuple(schedulers)
        self._modules = {name: module for name, (module, _) in denoisers.items()}
        backbones = [hooks.backbone for _, hooks in denoisers.values() if not hooks.backbone.is_control]
        edits = [method.latent_edit(backbone) for method in self._methods for backbone in backbones[:1]]
        edit = next(filter(None, edits), None)
        self.clock = StepClock(on_tick=self._next_evaluation, on_start=self._restart, edit=edit)
        planner = make_planner(self._methods)
        heads = {unit: head for method in self._methods for unit, head in method.exit_heads().items()}
        scaler = functools.partial(SkipScales.of, self._methods)
        self._executors = {
            name: Executor(hooks, self.clock, planner, scaler, self._exit_rule, heads)
            for name, (_, hooks) in denoisers.items()
        }
        records = {name: executor.record for name, executor in self._executors.items()}
        self.record = RunRecord(tuple(str(method) for method in self._methods), records)

    def _exit_rule(self, request: PlanRequest) -> ExitRule | None:
        rules = (method.exit_rule(request) for method in self._methods if not request.backbone.is_control)
        return next(filter(None, rules), None)

    def tick(self) -> None:
        """End an evaluation by hand, in a loop that has no scheduler."""
        self.clock.tick()

    def __enter__(self) -> SamplingRun:
        self._started = time.perf_counter()
        for scheduler in self._schedulers:
            self.clock.attach(scheduler)
        for name, executor in self._executors.items():
            executor.open(self._modules[name])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for executor in self._executors.values():
            executor.close()
        self.clock.detach()
        self.record.seconds = time.perf_counter() - self._started
        self.record.completed = kind is None
        if kind is None:
            self._warn_without_effect()

    def _next_evaluation(self) -> None:
        for executor in self._executors.values():
            executor.next_evaluation()

    def _restart(self) -> None:
        for executor in self._executors.values():
            executor.restart()

    def _warn_without_effect(self) -> None:
        if self.record.skipped or self.record.scaled or all(method.is_neutral for method in self._methods):
            return
        records = self.record.denoisers.values()
        reasons = {reason for record in records for reason in record.fallbacks}
        if not self.record.calls:
            reasons = {"no accelerated denoiser was called"}
        elif not reasons and any(call.depths is not None for record in records for call in record.calls):
            reasons = {"no sample was certain enough to stop"}
        elif not reasons and self.clock.grid is not None and len(self.clock.grid) <= FEW_STEPS:
            reasons = {f"{len(self.clock.grid)} evaluations are too few for this setting; see the plan"}
        why = "; ".join(sorted(reasons)) or "the plan computes every unit in every evaluation, and scales no long skip"
        names = " + ".join(self.record.methods)
        message = f"{names} skipped nothing in this call: {why}."
        warnings.warn(message, FastDiffNoEffectWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """How far up from here the code is that called fastdiff, for a warning to name its line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastdiff", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def sampling_run(
    denoiser: nn.Module,
    methods: Any,
    *,
    scheduler: Any = None,
    timesteps: torch.Tensor | None = None,
    training_steps: int = 1000,
    cuda_graphs: bool = False,
) -> Iterator[SamplingRun]:
    """Accelerate a denoiser in a sampling loop of your own, for the length of a ``with`` block.

    Args:
        denoiser: a supported denoiser (`fastdiff.backbones.view`).
        methods: one method or several.
        scheduler: a diffusers scheduler; its ``set_timesteps`` and ``step`` must be called inside the block.
        timesteps: for a loop without scheduler, the timesteps of its evaluations, noisiest first, shape
            ``(evaluations,)``. Call ``run.tick()`` after each evaluation then.
        training_steps: length of the training grid that ``timesteps`` are counted on.
        cuda_graphs: record evaluations as CUDA graphs and replay what repeats in the block (`fastdiff.enable` does the
            same for all calls of a pipeline).

    Yields:
        The run; its ``record`` says afterwards what happened.

    Raises:
        UnsupportedBackboneError: if the denoiser's units cannot be found.
        StateError: if the denoiser is accelerated already.
        ValueError: if not exactly one of ``scheduler`` and ``timesteps`` is given.
    """
    if (scheduler is None) == (timesteps is None):
        raise ValueError("Give either the scheduler of the loop or the timesteps of its evaluations.")
    chosen = as_methods(methods)
    hooks = InstalledHooks(view(denoiser, level_of(chosen)), Graphs() if cuda_graphs else None)
    try:
        schedulers = () if scheduler is None else (scheduler,)
        with SamplingRun({"denoiser": (denoiser, hooks)}, schedulers, chosen) as run:
            if timesteps is not None:
                grid = timesteps.detach().double().cpu().numpy()
                run.clock.start(Grid(grid, grid * float("nan"), training_steps, True, timesteps.detach()))
            yield run
    finally:
        hooks.remove()
