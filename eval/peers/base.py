"""What every peer is: frozen settings that enable another package on a pipeline for one sampling call, and undo it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fastdiff.errors import FastDiffError
from fastdiff.pipelines.acceleration import DENOISERS
from fastdiff.spec import format_fields

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Undo = Callable[[], tuple[str, ...]]
"""Puts a pipeline back and tells which attributes of its modules the peer's own undoing had left changed."""


class PeerUnavailableError(FastDiffError, RuntimeError):
    """A peer that is not installed or cannot accelerate a pipeline; the message is the reason."""


@dataclass(frozen=True)
class Peer:
    """Base of all peers. Subclasses are frozen dataclasses of JSON-compatible settings, checked when made.

    What a peer keeps between evaluations is not always dropped between calls, and some must know the number of steps:
    a peer is applied anew for every sampling call.
    """

    registry: ClassVar[dict[str, type[Peer]]] = {}
    name: ClassVar[str]
    """In specifications."""
    distribution: ClassVar[str]
    """The package that pip installs."""
    module: ClassVar[str]
    """The module that it is imported as."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):  # bases of several peers have none
            Peer.registry[cls.name] = cls

    def __post_init__(self) -> None:
        """Make tuples of lists, as JSON has them, so that equal settings are equal."""
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        self._check()

    def __str__(self) -> str:
        """The specification that `parse_peer` turns into these settings."""
        return format_fields(self.name, self, self._make)

    @classmethod
    def _make(cls, values: Mapping[str, Any]) -> Peer:
        return cls(**values)

    @classmethod
    def version(cls) -> str | None:
        """The installed version of the package; None if there is none."""
        try:
            return version(cls.distribution)
        except PackageNotFoundError:
            return None

    def prepared(self, pipe: DiffusionPipeline, num_inference_steps: int, sample: Callable[[], Any]) -> Peer:
        """These settings with what the peer has to measure on a pipeline first; most have nothing to measure.

        Args:
            pipe: the pipeline.
            num_inference_steps: of the calls to come.
            sample: one such call.

        Raises:
            PeerUnavailableError: with the reason.
        """
        return self

    def apply(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Undo:
        """Enable the peer on a pipeline, for one sampling call.

        Args:
            pipe: the pipeline.
            num_inference_steps: of the call to come.

        Returns:
            What undoes it: modules, hooks and classes are as they were, whatever the peer itself leaves behind.

        Raises:
            PeerUnavailableError: if the package is not installed or refuses the pipeline; nothing has changed then.
        """
        self._check_ready(pipe)
        before = _Modules(pipe)
        try:
            disable = self._enable(pipe, num_inference_steps)
        except PeerUnavailableError:
            before.restore()
            raise
        except Exception as error:
            before.restore()
            raise PeerUnavailableError(
                f"{self.distribution} {self.version()} refuses {type(pipe).__name__} with "
                f"{type(error).__name__}: {error}"
            ) from error

        def undo() -> tuple[str, ...]:
            try:
                disable()
            finally:
                left = before.restore()
            return left

        return undo

    @contextmanager
    def applied(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Iterator[Peer]:
        """Within the block the peer is enabled on a pipeline, for one sampling call; after it everything is undone.

        Raises:
            PeerUnavailableError: if it cannot be, with the reason.
        """
        undo = self.apply(pipe, num_inference_steps)
        try:
            yield self
        finally:
            undo()

    def engaged(self, pipe: DiffusionPipeline) -> bool | None:
        """Whether the call just made left anything out, while still applied; None where the peer does not tell.

        Where it does not, images equal to plain sampling's say that it did nothing.
        """
        return None

    def _check(self) -> None:
        """Refuse settings that are not allowed, with a `ConfigError`."""

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        """Call the package's own functions; returns those that it undoes it with."""
        raise NotImplementedError

    def _check_ready(self, pipe: DiffusionPipeline) -> None:
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            raise PeerUnavailableError(
                f"{self.distribution} is not installed; `pip install {self.distribution}` installs it. ({error})"
            ) from error
        except Exception as error:
            raise PeerUnavailableError(
                f"{self.distribution} {self.version()} cannot be imported here: {type(error).__name__}: {error}"
            ) from error
        if getattr(pipe, "fastdiff", None) is not None:
            raise PeerUnavailableError(
                f"fastdiff is enabled on this {type(pipe).__name__}; call fastdiff.disable(pipe) before {self.name}."
            )


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components that predict noise, by name.

    Raises:
        PeerUnavailableError: if there is none.
    """
    components = {name: getattr(pipe, name, None) for name in DENOISERS}
    found = {name: module for name, module in components.items() if isinstance(module, nn.Module)}
    if not found:
        raise PeerUnavailableError(f"{type(pipe).__name__} has no denoiser under one of the names {DENOISERS}.")
    return found


def unet_of(pipe: DiffusionPipeline, peer: Peer) -> nn.Module:
    """The UNet of a pipeline.

    Raises:
        PeerUnavailableError: if the peer accelerates UNets alone and this has none.
    """
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        kinds = ", ".join(type(module).__name__ for module in denoisers_of(pipe).values())
        raise PeerUnavailableError(f"{peer.name} is made for UNets; {type(pipe).__name__} has a {kinds}.")
    return unet


def evaluations_of(pipe: DiffusionPipeline, num_inference_steps: int) -> int:
    """How often the solver evaluates the denoiser in a call; some do more than once for a step."""
    scheduler = copy.deepcopy(pipe.scheduler)
    with suppress(ValueError, TypeError):  # some need what only the pipeline's call knows; they evaluate once
        scheduler.set_timesteps(num_inference_steps)
        return len(scheduler.timesteps)
    return num_inference_steps


class _Modules:
    """What hangs on the modules of a pipeline: classes, attributes, submodules and hooks; parameters are left alone.

    Peers undo what they do by assigning the old forward to the instance, and some leave more than that; what is
    restored here is the absence of all that.
    """

    _IN_PLACE = (
        "_modules",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    )

    def __init__(self, pipe: DiffusionPipeline) -> None:
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        self._kept = [
            (module, type(module), dict(vars(module)), {name: dict(vars(module)[name]) for name in self._IN_PLACE})
            for module in dict.fromkeys(module for part in parts for module in part.modules())
        ]

    def restore(self) -> tuple[str, ...]:
        """Put everything back; returns the names of what had to be."""
        changed: dict[str, None] = {}
        for module, cls, attributes, contents in self._kept:
            if type(module) is not cls:
                module.__class__ = cls
                changed["__class__"] = None
            present = vars(module)
            for name in [name for name in present if name not in attributes]:
                del present[name]
                changed[name] = None
            for name in [name for name, value in attributes.items() if present.get(name, self) is not value]:
                present[name] = attributes[name]
                changed[name] = None
            for name, content in contents.items():
                if list(present[name].items()) != list(content.items()):
                    present[name].clear()
                    present[name].update(content)
                    changed[name] = None
        return tuple(changed)
