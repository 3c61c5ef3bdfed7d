"""What evaluations leave for later ones: residuals and outputs of units, and the shapes of what need not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fastdiff.backbones.base import Streams
from fastdiff.engine.program import Key
from fastdiff.kernels.steps import Steps


class Kept:
    """What a run of units left: ``start`` while the run is under way, ``value`` afterwards.

    The value is what the run added to its input, a tuple with one entry for each stream, or its output as it was.
    """

    __slots__ = ("residual", "start", "value")

    def __init__(self, residual: bool = True) -> None:
        self.residual = residual
        self.start: Streams | None = None
        self.value: Any = None

    def finish(self, end: Streams) -> None:
        """Keep what was added to ``start``."""
        assert self.start is not None
        self.value = tuple(None if b is None or a is None else b - a for a, b in zip(self.start, end, strict=False))
        self.start = None

    @property
    def nbytes(self) -> int:
        """Bytes held by the kept value."""
        return sum(tensor.nbytes for tensor in tensors(self.value))


class Reuse:
    """Answers for a run of units with what earlier evaluations left.

    Args:
        sources: what was kept, newest first.
        weights: the weight of each source for each evaluation of the batch, shape ``(evaluations, sources)``, on the
            host; None where a single value is carried over.
        evaluations: number of evaluations that run as one batch.
        steps: sums with the weights.
    """

    __slots__ = ("evaluations", "residual", "sources", "start", "steps", "weights")

    def __init__(self, sources: tuple[Kept, ...], weights: torch.Tensor | None, evaluations: int, steps: Steps) -> None:
        self.start: Streams | None = None
        self.sources = sources
        self.weights = weights
        self.evaluations = evaluations
        self.steps = steps
        self.residual = sources[0].residual

    def output(self, copy: bool) -> Any:
        """The reused output; a copy of what is kept where it may be written to."""
        value = self._combined(tuple(source.value for source in self.sources))
        shared = self.weights is None and self.evaluations == 1
        return transformed(torch.clone, value) if copy and shared else value

    def finish(self) -> Streams:
        """The run's output: ``start`` plus the weighted residuals, in the streams' dtype."""
        assert self.start is not None
        start, self.start = self.start, None
        residuals = [tuple(source.value[index] for source in self.sources) for index in range(len(start))]
        return tuple(
            stream if stream is None or values[0] is None else self._combined(values, stream)
            for stream, values in zip(start, residuals, strict=True)
        )

    def _combined(self, values: tuple[Any, ...], start: torch.Tensor | None = None) -> Any:
        """The weighted sums of some kept values, one evaluation after the other along the first dimension.

        Args:
            values: one of each source.
            start: what the sums are added to; the values are tensors then.
        """
        if self.weights is None:
            carried = transformed(lambda tensor: repeated(tensor, self.evaluations), values[0])
            return carried if start is None else start + carried
        count = len(self.weights)
        starts = (None,) * count if start is None else start.chunk(count)
        sums = [
            transformed(lambda *given, row=row, own=own: self.steps.weighted_sum(row, given, own), *values)
            for row, own in zip(self.weights, starts, strict=True)
        ]
        return sums[0] if len(sums) == 1 else transformed(lambda *rows: torch.cat(rows), *sums)


class Shape:
    """What a unit's output looks like, for evaluations in which nobody reads it but its caller still handles it."""

    __slots__ = ("like",)

    def __init__(self) -> None:
        self.like: Any = None

    def note(self, output: Any) -> None:
        """Remember an output's shapes without keeping its values."""
        self.like = transformed(lambda tensor: tensor.new_zeros(1).expand(tensor.shape), output)

    def placeholder(self, writable: bool, evaluations: int = 1) -> Any:
        """Zeros in the place of the output, for a batch of several evaluations; without memory unless writable."""

        def zeros(tensor: torch.Tensor) -> torch.Tensor:
            shape = (tensor.shape[0] * evaluations, *tensor.shape[1:])
            return tensor.new_zeros(shape) if writable else tensor[:1].expand(shape)

        return transformed(zeros, self.like)


class BranchState:
    """What one guidance branch keeps, all for samples of one layout.

    Args:
        layout: shape, dtype and device of the sample.
        units: number of units.
    """

    def __init__(self, layout: tuple[Any, ...], units: int) -> None:
        self.layout = layout
        self.kept: dict[Key, Kept] = {}
        self.shapes = [Shape() for _ in range(units)]
        self.knows_shapes = False  # whether all are noted that the program needs
        self.answers: dict[int, Any] = {}  # predictions made ahead of their rows
        self.copies: int | None = None  # guidance branches in one batch, where that was asked for
        self.control: dict[str, Any] = {}  # what was added to the features that are kept

    def holds(self, key: Key) -> bool:
        """Whether this was computed and not freed since."""
        return key in self.kept and self.kept[key].value is not None

    def held_control(self) -> dict[str, Any]:
        """The control arguments as they were given; UNets empty the lists."""
        return {name: list(value) if isinstance(value, list) else value for name, value in self.control.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        kept = sum(kept.nbytes for kept in self.kept.values())
        return kept + sum(tensor.nbytes for tensor in tensors([list(self.answers.values()), self.control]))


def repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """A tensor several times over along its first dimension; the tensor itself for once."""
    return tensor if times == 1 else tensor.repeat(times, *[1] * (tensor.ndim - 1))


def transformed(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """A nested value with every tensor replaced, together with its counterparts in others of the same structure."""
    if isinstance(value, torch.Tensor):
        return function(value, *others)
    if isinstance(value, Mapping):  # diffusers' output classes among them
        parts = {name: transformed(function, value[name], *(other[name] for other in others)) for name in value}
        return type(value)(**parts)
    if isinstance(value, (list, tuple)):
        return type(value)(transformed(function, *items) for items in zip(value, *others, strict=True))
    return value


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a nested value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)
