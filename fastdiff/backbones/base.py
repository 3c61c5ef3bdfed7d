"""What every family of backbones is reduced to: named units and how tensors pass through them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
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
        io: where its streams are; None for a module that only ever hands over its whole output.
        traits: name and abilities, as validation and pruning see them.
        segment: units of one segment follow each other with nothing but residual additions between them, so that one
            residual can stand for a run of them.
        fragile: whether the denoiser may write into what the unit returns, so that it is copied to be kept.
        shortcut: what the unit adds its residual to, as a function of its input; the input itself if None.
        merges_skip: whether all it does is to merge a long skip into the stream, so that it counts as no block.
    """

    module: nn.Module
    io: BlockIO | None
    traits: UnitTraits
    segment: int = 0
    fragile: bool = False
    shortcut: Callable[[torch.Tensor], torch.Tensor] | None = None
    merges_skip: bool = False

    @property
    def name(self) -> str:
        """Dotted path in the denoiser."""
        return self.traits.name

    @property
    def stage(self) -> str:
        """The part of the denoiser that the unit belongs to: ``"down_blocks.0"``, ``"mid_block"``, ``"conv_in"``."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if parts[1:2] and parts[1].isdigit() else parts[0]

    @property
    def layer(self) -> str:
        """The layer of its stage that the unit belongs to, ``"up_blocks.0.1"``; samplers are in none of the layers."""
        parts = self.name.removeprefix(self.stage).split(".")
        if parts[-1:] == [""] or len(parts) < 3:
            return self.stage
        return f"{self.stage}.{'samplers' if parts[1].endswith('samplers') else parts[2]}"


@dataclass(frozen=True)
class SkipSite:
    """A module that is handed long skip connections.

    Args:
        module: the up block, or the block itself.
        argument: name of the forward parameter that carries them, a tensor or a tuple of which the last is read first.
        position: its place among the positional arguments.
        skips: numbers of the skips in the tuple's order, counted from the first that the encoder makes.
    """

    module: nn.Module
    argument: str
    position: int
    skips: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, argument: str, skips: tuple[int, ...]) -> SkipSite:
        """The same, with the argument's place from the module's signature.

        Raises:
            AttributeError: if the module's forward has no such parameter.
        """
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if argument not in names:
            raise AttributeError(f"{type(module).__name__}.forward has no parameter {argument!r}")
        return cls(module, argument, names.index(argument), skips)

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The skips among a call's arguments."""
        return kwargs[self.argument] if self.argument in kwargs else args[self.position]


@dataclass(frozen=True)
class Stage:
    """A module that calls a run of units one after the other and returns nothing but what they returned.

    Args:
        module: the down stage, bottleneck or up stage.
        columns: the units that it calls; their last one's output is the stage's hidden state.
        skips: the units whose outputs it returns beside that, as long skips; None if it returns the hidden state alone.
    """

    module: nn.Module
    columns: range
    skips: tuple[int, ...] | None = None

    def build(self, outputs: Mapping[int, Any]) -> Any:
        """The stage's output, made of its units' outputs by column."""
        # Attention comes wrapped in a tuple.
        found = {column: out if isinstance(out, torch.Tensor) else out[0] for column, out in outputs.items()}
        hidden = found[self.columns[-1]]
        return hidden if self.skips is None else (hidden, tuple(found[column] for column in self.skips))

    @property
    def returned(self) -> frozenset[int]:
        """The units whose outputs are part of the stage's."""
        return frozenset((self.columns[-1], *(self.skips or ())))


@dataclass(frozen=True)
class Step:
    """A module that runs for the samples that have not stopped, and before which samples may stop on their own.

    Args:
        module: a block, or an up stage of a UNet.
        io: where its streams are.
        columns: the units that it runs.
        fragile: whether the denoiser may write into what it returns.
        carries: in the last of a UNet's up stages, where the first long skip is among its skips; None in any other.
    """

    module: nn.Module
    io: BlockIO
    columns: range
    fragile: bool = False
    carries: tuple[SkipSite, int] | None = None

    def first_skip(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The first long skip that the encoder made, of the resolution of the prediction."""
        assert self.carries is not None
        site, place = self.carries
        skip: torch.Tensor = site.read(args, kwargs)[place]
        return skip


@dataclass(frozen=True)
class Backbone:
    """A denoiser as a sequence of units in execution order.

    Args:
        denoiser: the module whose forward makes one prediction.
        units: its blocks; one column of a plan each.
        level: how finely it is seen, ``"layer"`` or ``"branch"``.
        encoded: names of the units whose outputs are all that a decoder reads of the sample: the long skips in the
            order in which they are made, then the bottleneck. Empty where there is no encoder and decoder.
        skip_sites: where the long skips are read, in execution order.
        stages: the modules between the denoiser and its units, as far as their outputs are known.
        up_steps: the up stages of a UNet whose samples can stop on their own before any of them: each stage hands its
            output to the next as it is, and the last one to output layers that read nothing else.
        is_control: whether it only prepares what another denoiser's encoder adds, as ControlNets do.
    """

    denoiser: nn.Module
    units: tuple[Unit, ...]
    level: str = "layer"
    encoded: tuple[str, ...] = ()
    skip_sites: tuple[SkipSite, ...] = ()
    stages: tuple[Stage, ...] = ()
    up_steps: tuple[Step, ...] = ()
    is_control: bool = False
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

    @property
    def steps(self) -> tuple[Step, ...]:
        """What runs for the samples that have not stopped, in execution order; nothing where samples cannot stop."""
        if self.up_steps:
            return self.up_steps
        steps = [
            Step(unit.module, unit.io, range(column, column + 1), unit.fragile)
            for column, unit in enumerate(self.units)
            if unit.io is not None and unit.traits.same_shape
        ]
        return tuple(steps) if len(steps) == len(self.units) else ()

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the units before which samples may stop on their own."""
        if self.up_steps:
            return tuple(self.names[step.columns[0]] for step in self.up_steps)
        return tuple(self.names[step.columns[0]] for step in self.steps[1:] if self.traits[step.columns[0]].can_exit)

    @property
    def outputs(self) -> range:
        """The units behind the last step, which read what stopped samples left too: a UNet's output layers."""
        return range(self.steps[-1].columns.stop if self.steps else len(self.units), len(self.units))

    @property
    def skips(self) -> int:
        """Number of long skip connections that the encoder makes, up to the last that is read."""
        return 1 + max((skip for site in self.skip_sites for skip in site.skips), default=-1)
