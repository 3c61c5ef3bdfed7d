"""What every family of backbones is reduced to: named units and how tensors pass through them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastdiff.errors import UnsupportedBackboneError
from fastdiff.plan import UnitTraits

Streams = tuple[Any, ...]
"""The tensors that travel from block to block, e.g. ``(image tokens, text tokens)``; an entry may be ``None``."""


@dataclass(frozen=True)
class BlockIO:
    """Where a block's forward takes its streams from and where it returns them.

    Args:
        streams: names of the forward parameters that carry them, image stream first.
        returns: for each stream its place in the returned tuple, or ``None`` if the block returns one bare tensor.
        positions: for each stream its place among the positional arguments; filled in by `of`.
    """

    streams: tuple[str, ...] = ("hidden_states",)
    returns: tuple[int, ...] | None = None
    positions: tuple[int, ...] = ()

    def of(self, block: nn.Module) -> BlockIO:
        """The same, bound to a block's signature.

        Raises:
            UnsupportedBackboneError: if the block's forward lacks one of the streams.
        """
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        if missing := [stream for stream in self.streams if stream not in names]:
            raise UnsupportedBackboneError(
                f"{type(block).__name__}.forward has no parameter {missing[0]!r}; it takes {', '.join(names)}. "
                "Declare its streams with fastdiff.backbones.register_block."
            )
        return BlockIO(self.streams, self.returns, tuple(names.index(stream) for stream in self.streams))

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Streams:
        """The streams among a call's arguments."""
        return tuple(
            kwargs[name] if name in kwargs else args[position] if position < len(args) else None
            for name, position in zip(self.streams, self.positions, strict=True)
        )

    def parse(self, output: Any) -> Streams:
        """The streams in a block's output."""
        if self.returns is None:
            return (output,)
        return tuple(output[place] for place in self.returns)

    def build(self, streams: Streams) -> Any:
        """An output as the block would have returned it."""
        if self.returns is None:
            return streams[0]
        output = [None] * (max(self.returns) + 1)
        for place, stream in zip(self.returns, streams, strict=True):
            output[place] = stream
        return tuple(output)


@dataclass(frozen=True)
class Unit:
    """One column of a plan: a module of the denoiser, what a plan may do with it, and how it is called.

    Args:
        module: the block itself.
        io: where its streams are.
        traits: name and abilities, as validation and pruning see them.
        segment: units of one segment follow each other with nothing but residual additions between them, so that one
            residual can stand for a run of them.
        fragile: whether the denoiser may write into what the unit returns, so that its input is copied to be kept.
    """

    module: nn.Module
    io: BlockIO
    traits: UnitTraits
    segment: int = 0
    fragile: bool = False

    @property
    def name(self) -> str:
        """Dotted path in the denoiser."""
        return self.traits.name


@dataclass(frozen=True)
class Backbone:
    """A denoiser as a sequence of units in execution order.

    Args:
        denoiser: the module whose forward makes one prediction.
        units: its blocks; one column of a plan each.
    """

    denoiser: nn.Module
    units: tuple[Unit, ...]
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(unit.name for unit in self.units))

    @property
    def class_name(self) -> str:
        """Name of the denoiser's class."""
        return type(self.denoiser).__name__

    @property
    def traits(self) -> tuple[UnitTraits, ...]:
        """What validation and pruning need, one entry per unit."""
        return tuple(unit.traits for unit in self.units)

    @property
    def segments(self) -> tuple[int, ...]:
        """Segment of each unit."""
        return tuple(unit.segment for unit in self.units)
