"""What a CUDA graph is to a GPU, for a CPU: the operations of a call, done again on the very same tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = torch.ops.aten.nonzero.default
"""What a CUDA graph cannot hold: the host waits for the size of its result. Reading numbers is not told from this, here
where those of the host and those of the device are both on the CPU."""


class Tape(TorchDispatchMode):
    """Records the operations of a call, without the Python around them."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func == WAITS:
            raise RuntimeError(f"{func} waits for the device")
        output = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        """Do all operations again, each result in the place of the first time."""
        with torch.no_grad():
            for func, args, kwargs, output in self._operations:
                again = func(*args, **kwargs)
                for place, value in zip(tree_leaves(output), tree_leaves(again), strict=True):
                    if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


class TapeRecorder:
    """Records calls as `fastdiff.engine.graphs.Recorder` says.

    As a pool of CUDA graphs it takes no other once those that it held are gone. Results are spoilt until they are
    replayed, because recording a CUDA graph computes nothing.
    """

    def __init__(self) -> None:
        self._tapes: list[weakref.ref[Tape]] = []

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self._tapes and all(tape() is None for tape in self._tapes):
            raise RuntimeError("all graphs of this memory pool are gone")
        tape = Tape()
        self._tapes.append(weakref.ref(tape))  # also if recording fails
        with tape:
            result = function()
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                value.fill_(float("nan"))
        return result, tape.replay
