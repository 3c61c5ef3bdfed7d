"""What the caches of diffusers have in common: how they are enabled on any denoiser, and removed from it.

Models that have diffusers' cache interface get ``enable_cache``; others get the functional form, ``apply_...``, which
takes any module. Where a cache needs a context and the pipeline opens none, ``CacheMixin.cache_context`` opens one
around the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fastdiff.eval.peers.base import Peer, PeerUnavailableError, denoisers_of, evaluations_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Evaluation = Callable[[], float]
"""Tells the timestep of the evaluation under way."""


@dataclass(frozen=True)
class DiffusersCache(Peer):
    """Base of the caches of diffusers."""

    distribution: ClassVar[str] = "diffusers"
    module: ClassVar[str] = "diffusers"
    function: ClassVar[str]
    """The functional form, in ``diffusers.hooks``."""
    target: ClassVar[str]
    """What it puts hooks on."""
    needs_context: ClassVar[bool] = True
    """Whether it keeps its state by cache context."""

    def _config(self, denoiser: nn.Module, evaluations: int, timestep: Evaluation) -> Any:
        """The configuration of diffusers for a call of so many evaluations."""
        raise NotImplementedError

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        from diffusers import CacheMixin

        evaluations = evaluations_of(pipe, num_inference_steps)
        opens_context = self.needs_context and not _opens_context(pipe)
        with ExitStack() as stack:
            for denoiser in denoisers_of(pipe).values():
                # diffusers resets what it knows to be a cache after the call; whatever else is kept lasts for one.
                is_for_one_call = opens_context or not isinstance(denoiser, CacheMixin)
                watch = _Watch(self, pipe, denoiser, evaluations if is_for_one_call else None)
                stack.callback(watch.remove)
                self._enable_on(denoiser, self._config(denoiser, evaluations, watch.timestep), stack)
                if opens_context:
                    stack.enter_context(CacheMixin.cache_context(denoiser, "inference"))
            return stack.pop_all().close

    def _enable_on(self, denoiser: nn.Module, config: Any, stack: ExitStack) -> None:
        from diffusers import CacheMixin, hooks

        before = _hooks_below(denoiser)
        stack.callback(_remove_hooks, denoiser, {*before, *_hooks_of(denoiser)})
        if isinstance(denoiser, CacheMixin):
            denoiser.enable_cache(config)
            stack.callback(denoiser.disable_cache)
        else:
            getattr(hooks, self.function)(denoiser, config)
        if _hooks_below(denoiser) == before:
            raise PeerUnavailableError(f"{self.name} accelerates {self.target}; {type(denoiser).__name__} has none.")


def _opens_context(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline's call names the branches of guidance to the cache."""
    return "cache_context" in inspect.unwrap(type(pipe).__call__).__code__.co_names


def _hooks_of(module: nn.Module) -> set[tuple[nn.Module, str]]:
    registry = getattr(module, "_diffusers_hook", None)
    return {(module, name) for name in registry.hooks} if registry else set()


def _hooks_below(denoiser: nn.Module) -> set[tuple[nn.Module, str]]:
    return set().union(*(_hooks_of(module) for module in denoiser.modules() if module is not denoiser))


def _remove_hooks(denoiser: nn.Module, kept: set[tuple[nn.Module, str]]) -> None:
    for module, name in {*_hooks_below(denoiser), *_hooks_of(denoiser)} - kept:
        registry: Any = module._diffusers_hook
        registry.remove_hook(name, recurse=False)


class _Watch:
    """Tells a denoiser's timestep, which some caches ask for, and sees to it that one call has one branch.

    Args:
        peer: who asks.
        pipe: whose calls they are; if it tells its timestep, the denoiser, which may get it in another unit, need not.
        denoiser: whose calls are watched.
        limit: how many there are if nothing is kept from another branch or another call; None where diffusers keeps
            these apart.
    """

    def __init__(self, peer: Peer, pipe: DiffusionPipeline, denoiser: nn.Module, limit: int | None) -> None:
        self._peer = peer
        self._pipe = pipe
        self._limit = limit
        self._calls = 0
        self._given: Any = None
        self._signature = inspect.signature(type(denoiser).forward)
        self.remove = denoiser.register_forward_pre_hook(self._note, with_kwargs=True).remove

    def _note(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._signature.bind_partial(denoiser, *args, **kwargs).arguments
        given = getattr(self._pipe, "current_timestep", None)
        self._given = arguments.get("timestep") if given is None else given
        self._calls += 1
        if self._limit is not None and self._calls > self._limit:
            raise PeerUnavailableError(
                f"{self._peer.name} has seen more evaluations than the {self._limit} of one call. Either the pipeline "
                "evaluates the branches of guidance one after the other and does not name them to the cache, or the "
                "peer was not applied anew for this call."
            )

    def timestep(self) -> float:
        """The timestep of the evaluation under way.

        Raises:
            PeerUnavailableError: if neither pipeline nor denoiser is told.
        """
        if self._given is None:
            raise PeerUnavailableError(
                f"{self._peer.name} asks for the timestep; {type(self._pipe).__name__} has none."
            )
        if isinstance(self._given, torch.Tensor):  # read once: every reading waits for the device
            self._given = float(self._given.flatten()[0])
        return float(self._given)
