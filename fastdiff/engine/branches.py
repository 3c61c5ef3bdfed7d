"""Guidance branches: which of the denoiser calls of one evaluation this is, told by what the call is conditioned on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

CONDITIONING = ("encoder_hidden_states", "prompt", "text", "pooled", "class_label", "cap_feats", "context", "label")
"""Parts of the names under which diffusers' denoisers take their conditioning."""

_CHANGES_WITH_TIME = ("timestep", "sigma", "guidance", "control", "hidden_states", "sample")


class Branch(NamedTuple):
    """Identity of a guidance branch within one sampling run.

    Args:
        context: the name given to ``cache_context`` by pipelines that open one.
        conditioning: number of the conditioning seen, in order of first appearance.
        occurrence: how many calls with the same two came before in the same evaluation.
    """

    context: str | None
    conditioning: int
    occurrence: int


class BranchFinder:
    """Tells the guidance branches of one sampling run apart, whatever the order of the calls.

    Conditioning is recognised by the memory it lives in while that memory is kept alive here, which costs no device
    synchronisation; tensors made anew are compared by content, with one synchronisation.
    """

    def __init__(self) -> None:
        self._known: list[_Conditioning] = []
        self._calls: dict[tuple[str | None, int], int] = {}

    def next_evaluation(self) -> None:
        """Forget the order of calls within the evaluation that ended."""
        self._calls.clear()

    def find(self, context: str | None, arguments: Mapping[str, Any]) -> Branch:
        """The branch of a call with these named arguments."""
        conditioning = self._conditioning(arguments)
        call = (context, conditioning)
        occurrence = self._calls.get(call, 0)
        self._calls[call] = occurrence + 1
        return Branch(context, conditioning, occurrence)

    def _conditioning(self, arguments: Mapping[str, Any]) -> int:
        tensors = list(_tensors(_conditioning_arguments(arguments)))
        for number, known in enumerate(self._known):
            if known.is_in_memory_of(tensors):
                return number
        for number, known in enumerate(self._known):
            if known.equals(tensors):
                known.move_to(tensors)
                return number
        self._known.append(_Conditioning(tensors))
        return len(self._known) - 1


class _Conditioning:
    """What one branch is conditioned on: its values, and the memory where they were last seen, which is kept alive."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._values = [tensor.detach().clone() for tensor in tensors]
        self.move_to(tensors)

    def move_to(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._places = [_place(tensor) for tensor in tensors]

    def is_in_memory_of(self, tensors: list[torch.Tensor]) -> bool:
        return self._places == [_place(tensor) for tensor in tensors]

    def equals(self, tensors: list[torch.Tensor]) -> bool:
        if len(self._values) != len(tensors):
            return False
        pairs = list(zip(self._values, tensors, strict=True))
        return all(a.dtype == b.dtype and a.device == b.device for a, b in pairs) and all(
            torch.equal(a, b) for a, b in pairs
        )


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how often it was written to, which inference tensors do not count."""
    written = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, written


def _conditioning_arguments(arguments: Mapping[str, Any]) -> list[Any]:
    named = [
        value
        for name, value in arguments.items()
        if any(part in name for part in CONDITIONING) and not name.startswith("timestep")  # UniDiffuser's timestep_text
    ]
    if any(True for _ in _tensors(named)):
        return named
    first = next(iter(arguments), None)  # a denoiser takes the noisy sample first
    changing = {name for name in arguments if any(part in name for part in _CHANGES_WITH_TIME)} | {first}
    return [value for name, value in arguments.items() if name not in changing]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
