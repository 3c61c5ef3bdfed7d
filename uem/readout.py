"""What a denoiser would predict at each of its exits: one pass through its units, and one through its output layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastdiff.backbones import view
from fastdiff.engine.batching import TIMESTEP
from fastdiff.engine.hooks import COMPUTE, Cell, InstalledHooks
from fastdiff.engine.kept import repeated, transformed
from fastdiff.errors import ConfigError
from fastdiff.uem.modules import UncertaintyModules


@dataclass(frozen=True)
class ExitOutputs:
    """What one call found at the exits, and at the end.

    Args:
        hidden: the hidden state that each exit's unit is about to read, shape ``(exits, batch, tokens, width)``.
        predictions: of each exit, through its head and the denoiser's own output layers, shape
            ``(exits, *sample.shape)``; variances that some denoisers predict besides are left off.
        full: the denoiser's own prediction, of the sample's shape.
        timesteps: shape ``(batch,)``.
        read: the hidden states as the heads corrected them, of the shape of ``hidden``.
        last: the hidden state that the denoiser's own output layers read, shape ``(batch, tokens, width)``.
    """

    hidden: torch.Tensor
    predictions: torch.Tensor
    full: torch.Tensor
    timesteps: torch.Tensor
    read: torch.Tensor
    last: torch.Tensor


class ExitReadout:
    """Reads a denoiser's predictions at its exits, from entering the context to leaving it.

    The units run once, as they do in sampling. The hidden states that the exits see are then read by their heads and
    all together by the denoiser's output layers, in a second call in which no unit runs. Differentiable.

    Args:
        denoiser: a supported transformer, used directly and not through a pipeline.
        modules: the exits and their heads.

    Raises:
        ProfileMismatchError: if the modules are for another denoiser.
        UnsupportedBackboneError: if the denoiser's units cannot be found.
        StateError: if it is accelerated at the moment.
    """

    def __init__(self, denoiser: nn.Module, modules: UncertaintyModules) -> None:
        self._backbone = view(denoiser)
        modules.check(self._backbone)
        self._denoiser = denoiser
        self._modules = modules
        self._columns = [self._backbone.names.index(name) for name in modules.exits]

    def __enter__(self) -> ExitReadout:
        self._hooks = InstalledHooks(self._backbone)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.remove()

    def __call__(self, **arguments: Any) -> ExitOutputs:
        """Predict.

        Args:
            **arguments: of the denoiser's forward, by name; the noisy samples first.
        """
        with self._watched() as seen:
            full = self._call(arguments)
        hidden = [seen[column] for column in self._columns]
        read = [head(state) for head, state in zip(self._modules.exit_heads, hidden, strict=True)]
        predictions = self._read_out(torch.cat(read), arguments, len(hidden)).unflatten(0, (len(hidden), -1))
        last = seen[len(self._backbone.units)]
        return ExitOutputs(torch.stack(hidden), predictions, full, _timesteps(arguments), torch.stack(read), last)

    def _call(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        output: torch.Tensor = self._denoiser(**arguments, return_dict=False)[0]
        return output[:, : _sample(arguments).shape[1]]

    @contextmanager
    def _watched(self) -> Iterator[dict[int, torch.Tensor]]:
        """Within the block, what the exits' units read is noted by their columns, and what the last one returns."""
        seen: dict[int, torch.Tensor] = {}
        with ExitStack() as handles:
            for column in self._columns:
                unit = self._backbone.units[column]
                io = unit.io
                if io is None:
                    raise ConfigError(f"{unit.name} changes its input's shape, so that there is no exit before it.")

                def note(_: nn.Module, args: Any, kwargs: Any, column: int = column, io: Any = io) -> None:
                    seen[column] = io.read(args, kwargs)[0]

                handle = unit.module.register_forward_pre_hook(note, with_kwargs=True)
                handles.callback(handle.remove)
            end = self._backbone.units[-1]

            def note_end(_: nn.Module, __: Any, output: Any) -> None:
                seen[len(self._backbone.units)] = output if end.io is None else end.io.parse(output)[0]

            handles.callback(end.module.register_forward_hook(note_end).remove)
            yield seen

    def _read_out(self, hidden: torch.Tensor, arguments: Mapping[str, Any], times: int) -> torch.Tensor:
        """The output layers' predictions from hidden states of several calls with the same arguments."""
        batch = _sample(arguments).shape[0]

        def repeat(tensor: torch.Tensor) -> torch.Tensor:
            return repeated(tensor, times) if tensor.ndim and tensor.shape[0] == batch else tensor

        together = {name: transformed(repeat, value) for name, value in arguments.items()}
        last: Callable[[torch.Tensor], torch.Tensor] = lambda _: hidden  # noqa: E731
        cells = [Cell(compute=False) for _ in self._backbone.units]
        cells[-1].head = last  # type: ignore[assignment]
        self._hooks.set_cells(cells)
        try:
            return self._call(together)
        finally:
            self._hooks.set_cells([COMPUTE] * len(cells))


def _sample(arguments: Mapping[str, Any]) -> torch.Tensor:
    """The noisy samples, which denoisers take first."""
    sample: torch.Tensor = next(iter(arguments.values()))
    return sample


def _timesteps(arguments: Mapping[str, Any]) -> torch.Tensor:
    """The timestep of each sample."""
    batch = len(_sample(arguments))
    timestep = torch.as_tensor(next(arguments[name] for name in TIMESTEP if arguments.get(name) is not None))
    return timestep if timestep.ndim and len(timestep) == batch else timestep.reshape(-1)[:1].expand(batch)


def make_modules(
    denoiser: nn.Module, arguments: Mapping[str, Any], exits: Sequence[str] = (), **settings: Any
) -> UncertaintyModules:
    """New modules for a denoiser, whose sizes are seen in a call.

    Args:
        denoiser: a supported transformer.
        arguments: of its forward, by name; the noisy samples first.
        exits: names of the units before which a sample may stop; all by default.
        **settings: further ones of `UncertaintyModules`.

    Raises:
        ConfigError: if an exit is no unit of it, or its tokens are no square patches of the sample.
        UnsupportedBackboneError: if its units cannot be found.
    """
    backbone = view(denoiser)
    exits = exits or [unit.name for unit in backbone.units[1:] if unit.traits.can_exit and unit.io is not None]
    if unknown := set(exits) - set(backbone.names):
        units = ", ".join(backbone.names)
        raise ConfigError(f"{backbone.class_name} has no unit {', '.join(sorted(unknown))}; its units are {units}.")
    unit = backbone.units[backbone.names.index(exits[0])]
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        assert unit.io is not None
        seen.append(unit.io.read(args, kwargs)[0])

    handle = unit.module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            denoiser(**arguments, return_dict=False)
    finally:
        handle.remove()
    sample, (_, tokens, width) = _sample(arguments), seen[0].shape
    patch = getattr(denoiser.config, "patch_size", None) or 1
    made_of = sample.shape[1] if sample.ndim == 3 else sample[0, 0].numel() // patch**2
    outputs = sample[0].numel() // made_of
    return UncertaintyModules(
        backbone.class_name, len(backbone.units), list(exits), width, outputs, extra_tokens=tokens - made_of, **settings
    )
