"""The shapes of real models at which every kernel is tested on GPUs and timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from kernel_checks import operations
from kernel_checks.operations import Given, Operation, Random

COLD, WARM, LAUNCH = "cold", "L2-warm", "launch-bound"
WARM_BYTES = 24 * 2**20
"""What certainly stays in the second-level cache of a data centre's GPU between two calls."""


@dataclass(frozen=True)
class Case:
    """A call as some model makes it.

    Attributes:
        operation: what is called.
        model: whose shapes these are.
        what: where in the model.
        sizes: arguments of the operation's inputs.
        tiny: whether it is no model's, but shows what a launch costs.
    """

    operation: Operation
    model: str
    what: str
    sizes: tuple[tuple[str, Any], ...]
    tiny: bool = False

    @property
    def kernel(self) -> str:
        """Name of the function in `fastdiff.ops`."""
        return self.operation.name

    @property
    def shape(self) -> str:
        """The sizes in words."""
        return ", ".join(words for words in (_words(name, value) for name, value in self.sizes) if words)

    def __str__(self) -> str:
        return " | ".join(part for part in (self.kernel, self.model, self.what, self.shape) if part)

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Given:
        """Arguments of the operation's functions."""
        return self.operation.inputs(Random(dtype, device, seed), **dict(self.sizes))

    def moved(self, dtype: torch.dtype) -> int:
        """Bytes that cannot but be read and written, each once."""
        return self.operation.moved(self.inputs(dtype, "meta"))

    def regimes(self, dtype: torch.dtype) -> tuple[str, ...]:
        """What is timed: only what fits into the cache can be found there."""
        if self.tiny:
            return (LAUNCH,)
        return (COLD, WARM) if self.moved(dtype) <= WARM_BYTES else (COLD,)

    def small(self) -> Case:
        """The same with sizes that Triton's interpreter runs in a moment."""
        limits = self.operation.limits
        sizes = ((name, min(value, limits[name]) if name in limits else value) for name, value in self.sizes)
        small = tuple((name, (2, 3) if name == "sample" else value) for name, value in sizes)
        return replace(self, model="", sizes=small, tiny=False)


def _words(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return {"last": "channels last", "pixels": "pixels"}.get(name, "") if value else ""
    text = "×".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{name.replace('_', ' ')} {text}"


def _case(operation: Operation, model: str, what: str = "", **sizes: Any) -> Case:
    return Case(operation, model, what, tuple(sizes.items()))


@dataclass(frozen=True)
class Transformer:
    """A diffusion transformer as published.

    Attributes:
        batches: rows of a guided evaluation, for one image and for many.
        streams: tokens of the sequences that its blocks norm.
        columns: patches in a row of the image.
        heads: of queries and keys that are normed and turned; 0 where there are none.
    """

    name: str
    batches: tuple[int, int]
    streams: tuple[int, ...]
    columns: int
    width: int
    patch: int
    channels: int
    latent_channels: int
    heads: int = 0

    def cases(self) -> Iterator[Case]:
        """What one evaluation calls."""
        side = self.columns * self.patch
        for batch in self.batches:
            for tokens in self.streams:
                size = {"batch": batch, "tokens": tokens, "width": self.width}
                for uncertainty in (False, True):
                    yield _case(
                        operations.ResidualNormModulate(),
                        self.name,
                        "block with uncertainty head" if uncertainty else "block",
                        **size,
                        adaptive=True,
                        uncertainty=uncertainty,
                    )
                yield _case(operations.GeluTanh(), self.name, batch=batch, tokens=tokens, hidden=4 * self.width)
            yield _case(
                operations.ExitHead(),
                self.name,
                batch=batch,
                columns=self.columns,
                width=self.width,
                patch=self.patch,
                channels=self.channels,
            )
            image = {"tokens": self.columns**2, "width": self.width, "outputs": self.patch**2 * self.latent_channels}
            yield _case(operations.UncertaintyScore(), self.name, batch=batch, **image)
            if self.heads:
                shape = {"tokens": self.streams[0], "heads": self.heads, "width": self.width // self.heads}
                yield _case(operations.QkNormRope(), self.name, batch=batch, **shape)
            latents, hidden = (self.latent_channels, side, side), (self.streams[0], self.width)
            yield _case(operations.Lincomb(), self.name, "guided step", batch=batch, count=3, sample=latents)
            yield _case(operations.Lincomb(), self.name, "forecast", batch=batch, count=3, sample=hidden)
            yield _case(operations.Reuse(), self.name, "reuse", batch=batch, count=2, sample=hidden)
        for rows in (operations.GatherRows(), operations.ScatterRows()):
            yield _case(rows, self.name, batch=self.batches[1], tokens=self.streams[0], width=self.width)


@dataclass(frozen=True)
class UNet:
    """A UNet as published.

    Attributes:
        batches: rows of a guided evaluation, for one image and for many.
        levels: channels and height of the features.
        pairs: in the decoder, channels of the features and of the skip connection, and height.
        attention: width and height of the transformers.
    """

    name: str
    batches: tuple[int, int]
    levels: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int, int], ...]
    attention: tuple[tuple[int, int], ...]

    def cases(self) -> Iterator[Case]:
        """What one evaluation calls."""
        for batch in self.batches:
            for last in (False, True):
                for channels, size in self.levels:
                    sizes = {"batch": batch, "channels": channels, "size": size, "last": last}
                    yield _case(operations.GroupNormAct(), self.name, "timestep", **sizes)
                for channels, skip, size in self.pairs:
                    sizes = {"batch": batch, "channels": channels, "skip_channels": skip, "size": size, "last": last}
                    yield _case(operations.GroupNormAct(), self.name, "skip", **sizes)
                    yield _case(operations.SkipShortcut(), self.name, **sizes, outputs=self._channels(size))
            for width, size in self.attention:
                tokens = {"batch": batch, "tokens": size**2}
                yield _case(
                    operations.ResidualNormModulate(), self.name, "block", **tokens, width=width, adaptive=False
                )
                yield _case(operations.Geglu(), self.name, **tokens, hidden=4 * width)
            full = self.levels[0][1]
            # Exits stand before stages, each of which ends with features enlarged to the size of the next.
            stages = [(channels, size) for (channels, _), (_, size) in pairwise(self.levels[::-1])]
            for channels, size in (self.levels[-1], *stages):
                image = {"tokens": size**2, "width": channels, "outputs": 4 * (full // size) ** 2}
                yield _case(operations.UncertaintyScore(), self.name, batch=batch, **image, pixels=True)
            channels, size = self.levels[0]
            latents, hidden = (4, size, size), (channels, size, size)
            yield _case(operations.Lincomb(), self.name, "guided step", batch=batch, count=3, sample=latents)
            yield _case(operations.Reuse(), self.name, "reuse", batch=batch, count=2, sample=hidden)

    def _channels(self, size: int) -> int:
        """What the decoder's blocks of a level make of features and skip connection."""
        return next(channels for channels, side in self.levels if side == size)


@dataclass(frozen=True)
class UViT:
    """A U-ViT as published.

    Attributes:
        batches: rows of a guided evaluation, for one image and for many.
        columns: patches of two by two latents in a row of the image.
        extra: tokens that are no patches.
    """

    name: str
    batches: tuple[int, int]
    columns: int
    extra: int
    width: int

    def cases(self) -> Iterator[Case]:
        """What one evaluation calls."""
        for batch in self.batches:
            size = {"batch": batch, "tokens": self.columns**2 + self.extra, "width": self.width}
            image = size | {"tokens": self.columns**2, "outputs": 16, "extra": self.extra}
            yield _case(operations.ResidualNormModulate(), self.name, "block", **size, adaptive=False)
            yield _case(operations.SkipTokens(), self.name, "tokens", **size)
            yield _case(operations.UncertaintyScore(), self.name, **image)


MODELS: tuple[Transformer | UNet | UViT, ...] = (
    Transformer("DiT-XL/2 256", (2, 64), (256,), columns=16, width=1152, patch=2, channels=8, latent_channels=4),
    Transformer("PixArt-Sigma 1024", (2, 16), (4096,), columns=64, width=1152, patch=2, channels=8, latent_channels=4),
    Transformer(
        "SD3-medium 1024", (2, 8), (4096, 333), columns=64, width=1536, patch=2, channels=16, latent_channels=16
    ),
    # Guided by a number that it is given, so that one image is one row; its latents are packed patches.
    Transformer(
        "Flux 1024", (1, 2), (4608,), columns=64, width=3072, patch=1, channels=64, latent_channels=64, heads=24
    ),
    UViT("U-ViT-H/2 256", (2, 64), columns=16, extra=2, width=1152),
    UNet(
        "SD1.5 512",
        (2, 16),
        ((320, 64), (640, 32), (1280, 16), (1280, 8)),
        (
            (1280, 1280, 8),
            (1280, 1280, 16),
            (1280, 640, 16),
            (1280, 640, 32),
            (640, 640, 32),
            (640, 320, 32),
            (640, 320, 64),
            (320, 320, 64),
        ),
        ((320, 64), (640, 32), (1280, 16)),
    ),
    UNet(
        "SDXL 1024",
        (2, 8),
        ((320, 128), (640, 64), (1280, 32)),
        (
            (1280, 1280, 32),
            (1280, 640, 32),
            (1280, 640, 64),
            (640, 640, 64),
            (640, 320, 64),
            (640, 320, 128),
            (320, 320, 128),
        ),
        ((640, 64), (1280, 32)),
    ),
)

TINY = (
    _case(operations.ResidualNormModulate(), "", batch=1, tokens=16, width=64, adaptive=True),
    _case(operations.GroupNormAct(), "", batch=1, channels=64, size=8),
    _case(operations.GroupNormAct(), "", "skip", batch=1, channels=64, skip_channels=32, size=8),
    _case(operations.SkipShortcut(), "", batch=1, channels=64, skip_channels=32, size=8, outputs=64),
    _case(operations.Geglu(), "", batch=1, tokens=16, hidden=64),
    _case(operations.GeluTanh(), "", batch=1, tokens=16, hidden=64),
    _case(operations.ExitHead(), "", batch=1, columns=4, width=64, patch=2, channels=4),
    _case(operations.UncertaintyScore(), "", batch=1, tokens=16, width=64, outputs=16, extra=1),
    _case(operations.QkNormRope(), "", batch=1, tokens=16, heads=2, width=32),
    _case(operations.Lincomb(), "", "guided step", batch=1, count=3, sample=(4, 8, 8)),
    _case(operations.GatherRows(), "", batch=4, tokens=16, width=64),
    _case(operations.ScatterRows(), "", batch=4, tokens=16, width=64),
)

CASES: tuple[Case, ...] = (
    *(replace(case, tiny=True) for case in TINY),
    *(case for model in MODELS for case in model.cases()),
)
"""What is tested and timed, launches first."""

KERNELS: tuple[str, ...] = tuple(dict.fromkeys(case.kernel for case in CASES))
"""Functions of `fastdiff.ops` that have a kernel."""
