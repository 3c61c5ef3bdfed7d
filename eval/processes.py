"""The processes that share a sweep, started by ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import gather_object, parse_flag_from_env  # type: ignore[import-untyped]

from fastdiff.errors import FastDiffError

_T = TypeVar("_T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others; by default that would be minutes, and timing alone takes longer."""


def default_device() -> torch.device:
    """What this machine computes on best."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    has_xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
    return torch.device("xpu" if has_xpu else "mps" if torch.backends.mps.is_available() else "cpu")


class OtherProcessError(FastDiffError, RuntimeError):
    """An error in another process, which says more about it."""


class Processes:
    """The processes of this command: one, unless a launcher started several. All of them see the same folders.

    Args:
        cpu: whether they compute on CPUs, though there may be something faster.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"
        self._state = PartialState(cpu=cpu, timeout=PATIENCE)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the first one, which times, judges and speaks."""
        return bool(self._state.is_main_process)

    @property
    def device(self) -> torch.device:
        """The device that the launcher has for this process."""
        return torch.device(self._state.device)

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's part: every n-th of the items."""
        return items[self._state.process_index :: self.count]

    def together(self, part: Callable[[], _T]) -> list[_T]:
        """Let every process do its part, and wait for all.

        Returns:
            What each part returned, in the processes' order, the same in every process.

        Raises:
            Exception: what this process's part raised.
            OtherProcessError: if another's did.
        """
        result, error = None, None
        try:
            result = part()
        except Exception as raised:
            error = raised
        told = None if error is None else f"{type(error).__name__}: {error}"
        heard = gather_object([(result, told)])
        if error is not None:
            raise error
        if errors := [told for _, told in heard if told is not None]:
            raise OtherProcessError(f"Another process ended with {errors[0]}")
        return [result for result, _ in heard]

    def on_main(self, work: Callable[[], _T]) -> _T:
        """Let the first process do something while the others wait; returns its result in all of them."""
        results = self.together(lambda: work() if self.is_main else None)
        return results[0]  # type: ignore[return-value]
