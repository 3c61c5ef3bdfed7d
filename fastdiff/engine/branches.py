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
        self._known: list[tuple[tuple[Any, ...], list[torch.Tensor], list[torch.Tensor]]] = []
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
        layout = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        for number, (known_layout, latest, _) in enumerate(self._known):
            if known_layout == layout and all(map(_same_memory, latest, tensors)):
                return number
        for number, (known_layout, _, values) in enumerate(self._known):
            if known_layout == layout and all(map(torch.equal, values, tensors)):
                self._known[number] = (layout, tensors, values)
                return number
        self._known.append((layout, tensors, [tensor.detach().clone() for tensor in tensors]))
        return len(self._known) - 1


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _conditioning_arguments(arguments: Mapping[str, Any]) -> list[Any]:
    named = [value for name, value in arguments.items() if any(part in name for part in CONDITIONING)]
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
