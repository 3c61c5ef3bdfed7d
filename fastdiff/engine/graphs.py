"""CUDA graphs of denoiser calls: what was recorded once is replayed without Python, as one launch.

A recording is made of what a call does, which is its row of the plan, and of the shapes it does it to; a call that does
the same replays it. What a call is given and what earlier evaluations left is copied to where the recording reads it,
and what comes out is copied away. So recordings may be replayed in any order, and share one memory pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastdiff.backbones import is_compiled, unwrap
from fastdiff.engine.batching import mixing_processor, observed_processor, processors
from fastdiff.engine.kept import Kept, transformed
from fastdiff.engine.record import DenoiserRecord
from fastdiff.engine.settings import PLAIN, Settings
from fastdiff.kernels import dispatch, launch

Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Records what a function does. Gives its result, whose tensors hold their values after a replay, and the replay."""

MOST = 64
"""Recordings of one denoiser; each holds the memory of what comes out of it."""

FIRST = "first of its kind"
"""Why a call is computed that will be recorded when it comes again: its kernels are loaded and chosen meanwhile."""

OWN_HOOKS = "fastdiff"
"""What the names of this library's hooks begin with."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What the units are told for one call.

    Attributes:
        does: equal for calls that do the same with other values.
        reads: what earlier evaluations left, as this call reads it.
        leaves: where this call puts what later ones read.
        constants: other tensors that a recording reads, and that nobody writes.
    """

    does: Hashable
    reads: Sequence[Kept]
    leaves: Sequence[Kept]
    constants: Sequence[Any]


@dataclass(frozen=True)
class Recording:
    """One recorded call.

    Attributes:
        replay: does it again.
        output: what the call returns, after a replay.
        left: what it leaves, after a replay.
        constants: kept alive because it reads them.
    """

    replay: Callable[[], None]
    output: Any
    left: Sequence[Any]
    constants: Sequence[Any]


class Given:
    """What a call is given, and what it reads of earlier ones, as one list.

    Args:
        args: the denoiser's positional arguments.
        kwargs: its keyword arguments.
        work: what the call does.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], work: Work) -> None:
        self.values, self._structure = pytree.tree_flatten(((args, kwargs), [kept.value for kept in work.reads]))
        self.tensors = [value for value in self.values if isinstance(value, torch.Tensor)]

    @property
    def obstacle(self) -> str:
        """Why calls with such arguments cannot be told apart; empty if they can."""
        strange = [value for value in self.values if not isinstance(value, (torch.Tensor, *PLAIN))]
        return f"an argument is a {type(strange[0]).__name__}" if strange else ""

    @property
    def layout(self) -> Hashable:
        """Equal where only the numbers in tensors differ."""
        return self._structure, tuple(map(_described, self.values)), torch.is_inference_mode_enabled()

    @property
    def device(self) -> torch.device:
        """Where the call runs; the other tensors are few numbers on the host."""
        return next((tensor.device for tensor in self.tensors if tensor.device.type != "cpu"), torch.device("cpu"))

    def at(self, places: Sequence[torch.Tensor]) -> Any:
        """Arguments, keyword arguments, and what is read, with these tensors in place of its own."""
        remaining = iter(places)
        values = [next(remaining) if isinstance(value, torch.Tensor) else value for value in self.values]
        return pytree.tree_unflatten(values, self._structure)


class Graphs:
    """The recordings of one denoiser, from one sampling call to the next.

    Args:
        devices: kinds of devices that can be recorded on.
    """

    def __init__(self, devices: Sequence[str] = ("cuda",)) -> None:
        self._recorder: Recorder = DeviceRecorder()
        self._devices = devices
        self._known: dict[Hashable, Recording | str] = {}  # a call's recording, or why it cannot be recorded
        self._places: dict[Hashable, list[torch.Tensor]] = {}  # where recordings read what they are given
        self._settings: Settings | None = None
        self._work: Work | str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        """A copy of a pipeline records its own calls."""
        return Graphs(self._devices)

    def expect(self, work: Work | str) -> None:
        """Tell what the coming call does, or why it cannot be recorded."""
        self._work = work

    def attach(self, denoiser: nn.Module, record: DenoiserRecord) -> Callable[[], None]:
        """Stand in front of a denoiser's forward for one sampling call; returns how to step aside."""
        model = unwrap(denoiser)
        self._refused = obstacle(denoiser, self._devices)
        settings = None if self._refused else Settings.of(model)
        if settings != self._settings:
            self._known.clear()
            self._places.clear()
            self._recorder = DeviceRecorder()
        self._settings, self._record = settings, record
        own = {name: value for name, value in vars(model).items() if name == "forward"}
        self._forward: Callable[..., Any] = model.forward
        vars(model)["forward"] = self._call

        def step_aside() -> None:
            del vars(model)["forward"]
            vars(model).update(own)

        return step_aside

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the denoiser's forward."""
        work, self._work = self._work, "several evaluations are made at once"
        reason = self._refused or (work if isinstance(work, str) else "")
        if torch.is_grad_enabled():
            reason = reason or "gradients may be needed"
        if not reason and isinstance(work, Work):
            given = Given(args, kwargs, work)
            with _as_current(given.device):
                known = self._recording(work, given)
                if isinstance(known, Recording):
                    return self._replayed(known, work)
            reason = known
        if not self._record.computed[reason]:
            log.info("Computed without a CUDA graph: %s.", reason)
        self._record.computed[reason] += 1
        return self._forward(*args, **kwargs)

    def _replayed(self, recording: Recording, work: Work) -> Any:
        recording.replay()
        self._record.replays += 1
        for kept, left in zip(work.leaves, recording.left, strict=True):
            kept.value = transformed(torch.clone, left)
        return transformed(torch.clone, recording.output)

    def _recording(self, work: Work, given: Given) -> Recording | str:
        """The recording of a call, ready to be replayed; else why there is none."""
        if given.obstacle:
            return given.obstacle
        layout = given.layout
        key = (work.does, layout, _surroundings())
        if key not in self._known:
            if len(self._known) >= MOST:
                return f"{MOST} other calls are recorded"
            self._known[key] = ""
            return FIRST
        known = self._known[key]
        if isinstance(known, str) and known:
            return known
        places = self._places.get(layout)
        if places is None:
            places = self._places[layout] = [torch.empty_like(tensor, device=given.device) for tensor in given.tensors]
        for place, tensor in zip(places, given.tensors, strict=True):
            place.copy_(tensor)
        if isinstance(known, str):
            known = self._known[key] = self._record_call(work, *given.at(places))
        return known

    def _record_call(self, work: Work, call: tuple[tuple[Any, ...], dict[str, Any]], reads: list[Any]) -> Any:
        """Record a call that reads its tensors from other places than those it was given in."""
        before = [kept.value for kept in work.reads]
        for kept, value in zip(work.reads, reads, strict=True):
            kept.value = value
        args, kwargs = call
        try:
            with launch.recording():
                output, replay = self._recorder(lambda: self._forward(*args, **kwargs))
        except RuntimeError as error:  # the model does what no graph can hold, such as waiting for the device
            log.warning("A call could not be recorded as a CUDA graph and is computed instead: %s", str(error))
            if not any(isinstance(known, Recording) for known in self._known.values()):
                self._recorder = DeviceRecorder()
            return f"it cannot be recorded ({type(error).__name__})"
        finally:
            for kept, value in zip(work.reads, before, strict=True):
                kept.value = value
        self._record.graphs += 1
        return Recording(replay, output, [kept.value for kept in work.leaves], work.constants)


class DeviceRecorder:
    """Records on the current CUDA device; all recordings share one memory pool.

    A pool takes no graph once it had some and has none: make another recorder then.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record what a function does, without doing it."""
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay


def obstacle(denoiser: nn.Module, devices: Sequence[str]) -> str:
    """Why no call of a denoiser can be recorded; empty if calls can."""
    model = unwrap(denoiser)
    if is_compiled(denoiser):
        return (
            "the model is compiled as a whole; compile its blocks (compile_repeated_blocks) or let the compiler record"
        )
    if model.training:
        return "the model is in training mode"
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) != 1 or next(iter(places)).partition(":")[0] not in devices:
        return f"the weights are on {' and '.join(sorted(places)) or 'no device'}, not on one of kind {devices[0]}"
    kinds = set(processors(model))
    if special := mixing_processor(kinds) or observed_processor(kinds):
        return f"{special} may do more than compute"
    hooked = (f"a hook on {name or 'the model'} would not be called" for name, part in model.named_modules()
              if _is_hooked(part, part is model))  # fmt: skip
    return next(hooked, "")


def _is_hooked(module: nn.Module, is_root: bool) -> bool:
    """Whether somebody else's hook runs in a module's call; what is called before and after the whole call may stay."""
    registry = getattr(module, "_diffusers_hook", None)
    others = [name for name in getattr(registry, "hooks", ()) if not name.startswith(OWN_HOOKS)]
    called = not is_root and (module._forward_hooks or module._forward_pre_hooks)
    return bool(others or called or hasattr(module, "_hf_hook"))


def _described(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return type(value), value


def _surroundings() -> Hashable:
    """What kernels are chosen by besides the tensors."""
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)]
    precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    return dispatch.mode(), *autocast, *precision, torch.are_deterministic_algorithms_enabled()


def _as_current(device: torch.device) -> AbstractContextManager[Any]:
    """Graphs are recorded and replayed on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
