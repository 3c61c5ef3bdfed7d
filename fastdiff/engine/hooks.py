"""The acting hooks on units, on the stages that call them, and on what reads long skips.

diffusers' hook registry is private API: this module alone registers hooks, and `fastdiff.kernels.patching` looks up the
forwards behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from fastdiff.backbones import Backbone, BlockIO, SkipSite, Unit
from fastdiff.backbones.base import Stage, Step, Streams
from fastdiff.engine.exits import Exits
from fastdiff.engine.graphs import Graphs
from fastdiff.engine.kept import Kept, Reuse, Shape, transformed
from fastdiff.engine.program import Program
from fastdiff.engine.skips import NO_KERNELS, Scale, scaled
from fastdiff.errors import StateError
from fastdiff.kernels.steps import Steps
from fastdiff.plan import ComputePlan

ADDED_IN_STAGE = "additional_residuals"
"""Argument with which T2I-Adapters change what a stage returns."""

HOOK_NAME = "fastdiff"
SKIP_HOOK_NAME = "fastdiff_skips"
STAGE_HOOK_NAME = "fastdiff_stage"


class Cell:
    """What one unit does in one evaluation of one guidance branch; plain Python that a compiler can read.

    Args:
        compute: whether the unit runs.
        opens: residuals and reuses whose run starts with this unit's input.
        keeps: what is kept of the run that ends with this unit's output.
        reuse: the reuse whose run ends here.
        shape: where to note the output's shape if the unit runs, and what to answer with if nobody reads it.
        head: turns the hidden state into one that the model's output layers can read, at an exit.
        rows: indices of the samples that the unit runs for, shape ``(active,)``; the others pass through.
        evaluations: number of evaluations that run as one batch.
        exits: decides which samples still run, in place of all the above.
        step: what the unit is to ``exits``.
    """

    __slots__ = (
        "compute",
        "evaluations",
        "exits",
        "head",
        "keeps",
        "opens",
        "plain",
        "reuse",
        "rows",
        "shape",
        "step",
    )

    def __init__(
        self,
        compute: bool = True,
        head: nn.Module | None = None,
        rows: torch.Tensor | None = None,
        shape: Shape | None = None,
        evaluations: int = 1,
        exits: Exits | None = None,
        step: Step | None = None,
    ) -> None:
        self.compute = compute
        self.opens: list[Kept | Reuse] = []
        self.keeps: list[Kept] = []
        self.reuse: Reuse | None = None
        self.shape = shape
        self.head = head
        self.rows = rows
        self.evaluations = evaluations
        self.exits = exits
        self.step = step
        self.plain = False  # a compiler guards on this value, and would guard on the identity of a cell


COMPUTE = Cell()
COMPUTE.plain = True


class UnitHook(ModelHook):
    """Runs, reuses or passes one unit, as its current cell says."""

    name = HOOK_NAME

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.unit = unit
        self.io = unit.io
        self.fragile = unit.fragile
        self.shortcut = unit.shortcut
        self.cell = COMPUTE
        self.wrapped: Callable[..., Any] | None = None  # the unit's forward with this hook in it
        self._compiled: Callable[..., Any] | None = None  # the unit's compiled call while another stands before it

    def set(self, cell: Cell) -> None:
        """Do this in the coming evaluation. What a compiled unit is run for is decided outside of what was compiled."""
        own = vars(self.unit.module)
        if self._compiled is not None:
            own["_compiled_call_impl"], self._compiled = self._compiled, None
        exits, step, compiled = cell.exits, cell.step, own.get("_compiled_call_impl")
        if exits is not None and step is not None and compiled is not None:
            own["_compiled_call_impl"] = lambda *args, **kwargs: exits.run(step, compiled, args, kwargs)
            self._compiled, cell = compiled, COMPUTE
        self.cell = cell

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the unit's forward."""
        forward = self.fn_ref.original_forward
        cell = self.cell
        if cell.plain:
            return forward(*args, **kwargs)
        if cell.exits is not None:
            assert cell.step is not None
            return cell.exits.run(cell.step, forward, args, kwargs)
        if cell.rows is not None:
            assert self.io is not None
            return compute_rows(forward, self.io, cell.rows, args, kwargs)
        for run in cell.opens:
            run.start = self._start(args, kwargs)
        if cell.compute:
            output = forward(*args, **kwargs)
            self._keep(cell, output)
            return output
        if self.has_output:
            return self.output()
        assert self.io is not None
        streams = self.io.read(args, kwargs) if cell.reuse is None else cell.reuse.finish()
        if cell.head is not None:
            streams = (cell.head(streams[0]), *streams[1:])
        return self.io.build(streams)

    @property
    def has_output(self) -> bool:
        """Whether the unit's answer is there without its input: reused as a whole, or read by nobody."""
        cell = self.cell
        if cell.compute or cell.opens:
            return False
        return cell.shape is not None if cell.reuse is None else not cell.reuse.residual

    def output(self) -> Any:
        """That answer."""
        cell = self.cell
        if cell.reuse is not None:
            return cell.reuse.output(copy=self.fragile)
        assert cell.shape is not None
        return cell.shape.placeholder(writable=self.fragile, evaluations=cell.evaluations)

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """What a residual that starts here is added to."""
        assert self.io is not None
        streams = self.io.read(args, kwargs)
        if self.shortcut is not None:
            return (self.shortcut(streams[0]),)
        return transformed(torch.clone, streams) if self.fragile else streams

    def _keep(self, cell: Cell, output: Any) -> None:
        """Keep what later evaluations need of an output."""
        if cell.shape is not None:
            cell.shape.note(output)
        for kept in cell.keeps:
            if kept.residual:
                assert self.io is not None
                kept.finish(self.io.parse(output))
            else:
                kept.value = transformed(torch.clone, output) if self.fragile else output


class SkipHook(ModelHook):
    """Scales the long skips that a module is handed, without writing into them."""

    name = SKIP_HOOK_NAME

    def __init__(self, site: SkipSite) -> None:
        super().__init__()
        self.site = site
        self.scales: tuple[Scale, ...] | None = None
        self.control: tuple[torch.Tensor | None, ...] = ()
        self.steps = NO_KERNELS
        self.wrapped: Callable[..., Any] | None = None

    def set(self, scales: Sequence[Scale] | None, control: Sequence[torch.Tensor] | None, steps: Steps) -> None:
        """Scale as this says, in the order of all skips; what ``control`` added to them stays as it is."""
        skips, self.steps = self.site.skips, steps
        own = None if scales is None else tuple(scales[skip] for skip in skips)
        self.scales = None if own is None or all(scale is None for scale in own) else own
        self.control = tuple(None if control is None else control[skip] for skip in skips)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hands the module its arguments with the skips scaled."""
        if self.scales is None:
            return args, kwargs
        name, position = self.site.argument, self.site.position
        if name in kwargs:
            return args, {**kwargs, name: self._scaled(kwargs[name])}
        if position >= len(args):
            return args, kwargs
        return (*args[:position], self._scaled(args[position]), *args[position + 1 :]), kwargs

    def _scaled(self, skips: Any) -> Any:
        assert self.scales is not None
        if not isinstance(skips, (list, tuple)):
            return scaled(skips, self.scales[0], self.control[0], self.steps)
        return tuple(scaled(*parts, self.steps) for parts in zip(skips, self.scales, self.control, strict=True))


class StageHook(ModelHook):
    """Answers for a stage of which no unit runs, so that nothing is put together that nobody reads.

    Runs an up stage for the samples that have not stopped, where they stop on their own.
    """

    name = STAGE_HOOK_NAME

    def __init__(self, stage: Stage, units: Sequence[UnitHook]) -> None:
        super().__init__()
        self.stage = stage
        self.returned = {column: units[column] for column in sorted(stage.returned)}
        self.units = [units[column] for column in stage.columns]
        self.is_idle = False
        self.exits: tuple[Exits, Step] | None = None
        self.wrapped: Callable[..., Any] | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the stage's forward."""
        if self.exits is not None:
            exits, step = self.exits
            return exits.run(step, self.fn_ref.original_forward, args, kwargs)
        if not self.is_idle or kwargs.get(ADDED_IN_STAGE) is not None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.stage.build({column: hook.output() for column, hook in self.returned.items()})


Hook = UnitHook | SkipHook | StageHook


def compute_rows(
    forward: Callable[..., Any], io: BlockIO, rows: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a unit for some samples of the batch only; the others keep their streams. Differentiable.

    Args:
        forward: the unit's forward.
        io: where the unit's streams are.
        rows: sample indices, shape ``(active,)``, int64, on the streams' device; may be empty.
        args: the positional arguments of the call, for the whole batch.
        kwargs: its keyword arguments; tensors with one row per sample are cut to the active rows.
    """
    streams = io.read(args, kwargs)
    if rows.numel() == 0:
        return io.build(streams)
    batch = streams[0].shape[0]

    def take(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch:
            return value.index_select(0, rows)
        if isinstance(value, (list, tuple)):
            return type(value)(map(take, value))
        return value

    output = io.parse(forward(*map(take, args), **{name: take(value) for name, value in kwargs.items()}))
    pairs = zip(streams, output, strict=True)
    return io.build(tuple(None if new is None else old.index_copy(0, rows, new) for old, new in pairs))


class InstalledHooks:
    """The acting hooks on one denoiser, until `remove`.

    Args:
        backbone: the denoiser's units.
        graphs: records the denoiser's calls; None where they are always computed.
    """

    def __init__(self, backbone: Backbone, graphs: Graphs | None = None) -> None:
        for unit in backbone.units:
            registry = getattr(unit.module, "_diffusers_hook", None)
            if registry is not None and registry.get_hook(HOOK_NAME) is not None:
                raise StateError(
                    f"This {backbone.class_name} is already accelerated, perhaps through another pipeline that shares "
                    "it. Disable that one first (fastdiff.disable), or load a second copy of the model."
                )
        if getattr(backbone.denoiser, "is_cache_enabled", False):
            raise StateError(
                f"diffusers' own cache is enabled on this {backbone.class_name}; two cannot act on the same blocks. "
                "Call its disable_cache() first."
            )
        self.backbone = backbone
        self.graphs = graphs
        self._steps = backbone.steps
        self.lowered: tuple[ComputePlan, Program] | None = None  # of the last sampling call
        self.hooks = [UnitHook(unit) for unit in backbone.units]
        self.skip_hooks = [SkipHook(site) for site in backbone.skip_sites]
        # A module that has both scales inside of its unit's hook: only where it runs.
        self._placed: list[tuple[nn.Module, Hook]] = [(hook.site.module, hook) for hook in self.skip_hooks]
        self._placed += [(unit.module, hook) for unit, hook in zip(backbone.units, self.hooks, strict=True)]
        self.stage_hooks = [StageHook(stage, self.hooks) for stage in backbone.stages]
        self._placed += [(hook.stage.module, hook) for hook in self.stage_hooks]
        for module, hook in self._placed:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, hook.name)
            hook.wrapped = module.forward
        self._forget_cached_registries()

    def set_cells(self, cells: list[Cell]) -> None:
        """Tell every unit what to do in the coming evaluation."""
        for hook, cell in zip(self.hooks, cells, strict=True):
            hook.set(cell)
        for stage in self.stage_hooks:
            stage.is_idle = all(hook.has_output for hook in stage.units)
            stage.exits = None

    def set_exits(self, exits: Exits) -> None:
        """Run every unit in the coming evaluation, for the samples that have not stopped."""
        if not self.backbone.up_steps:
            self.set_cells([Cell(exits=exits, step=step) for step in self._steps])
            return
        self.set_cells([COMPUTE] * len(self.hooks))
        steps = {step.module: step for step in self.backbone.up_steps}
        for stage in self.stage_hooks:
            step = steps.get(stage.stage.module)
            stage.exits = None if step is None else (exits, step)

    def scale_skips(
        self,
        scales: Sequence[Scale] | None,
        control: Sequence[torch.Tensor] | None = None,
        steps: Steps = NO_KERNELS,
    ) -> None:
        """Tell by how much the long skips are scaled in the coming call.

        Args:
            scales: one for each skip, in the order in which they are made; None for no scaling.
            control: what is added to each skip but not to be scaled; None for nothing.
            steps: the operations that scale them.
        """
        for hook in self.skip_hooks:
            hook.set(scales, control, steps)

    @property
    def skip_scales(self) -> tuple[Any, ...] | None:
        """By how much each module scales its skips in the coming call; None where numbers do not say it all."""
        if any(hook.scales and any(part is not None for part in hook.control) for hook in self.skip_hooks):
            return None
        return tuple(
            hook.scales and tuple(None if scale is None else float(scale) for scale in hook.scales)
            for hook in self.skip_hooks
        )

    def compute_all(self) -> None:
        """Make every unit run as if there were no hook."""
        self.set_cells([COMPUTE] * len(self.hooks))
        self.scale_skips(None)

    @property
    def in_place(self) -> bool:
        """Whether every module still calls its hook; accelerate takes later hooks along when it takes off its own."""
        return not any(_is_lost(module, hook) for module, hook in self._placed)

    def remove(self) -> None:
        """Take the hooks off, leaving each module's forward as it was found."""
        for module, hook in reversed(self._placed):
            _remove_hook(module, hook)
        self._forget_cached_registries()

    def _forget_cached_registries(self) -> None:
        """Make diffusers look for hooks again: it remembers which blocks had some (since 0.37)."""
        root = getattr(self.backbone.denoiser, "_diffusers_hook", None)
        if root is not None and hasattr(root, "_child_registries_cache"):
            root._child_registries_cache = None


def _is_lost(module: nn.Module, hook: Hook) -> bool:
    """Whether a module's forward leads to its class without passing the hook."""
    forward: Any = module.forward
    while forward is not hook.wrapped and getattr(forward, "__func__", None) is not type(module).forward:
        if not hasattr(forward, "__wrapped__"):
            return False  # somebody else's wrapper, which does not say what it calls
        forward = forward.__wrapped__
    return forward is not hook.wrapped


def _remove_hook(module: nn.Module, hook: Hook) -> None:
    registry: HookRegistry = module._diffusers_hook
    outermost = module.__dict__.get("forward")
    wrapped_since = registry._hook_order[-1] == hook.name and outermost is not hook.wrapped
    registry.remove_hook(hook.name, recurse=False)
    if wrapped_since:
        # accelerate wraps a module by calling its `_old_forward`: put ours out of that, and leave the wrapper in place.
        if module.__dict__.get("_old_forward") is hook.wrapped:
            vars(module)["_old_forward"] = module.forward
        vars(module)["forward"] = outermost
    elif getattr(module.forward, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]
    if not registry.hooks:
        del module._diffusers_hook
