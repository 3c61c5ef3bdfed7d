"""What a denoiser would predict at each of its exits: one pass through its units, and one through its output layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastdiff.backbones import Backbone, view
from fastdiff.backbones.base import Step
from fastdiff.engine.batching import TIMESTEP
from fastdiff.engine.hooks import COMPUTE, Cell, InstalledHooks
from fastdiff.engine.kept import repeated, transformed
from fastdiff.errors import ConfigError
from fastdiff.uem.modules import UncertaintyModules

_END = -1
"""Key of the hidden state that the output layers read, beside the exits' columns."""


@dataclass(frozen=True)
class ExitOutputs:
    """What one call found at the exits, and at the end.

    Args:
        hidden: the hidden state that each exit's unit is about to read, of shape ``(batch, tokens, width)``; in a UNet
            ``(batch, channels, height, width)``.
        predictions: of each exit, through its head and the denoiser's own output layers, shape
            ``(exits, *sample.shape)``; variances that some denoisers predict besides are left off.
        full: the denoiser's own prediction, of the sample's shape.
        timesteps: shape ``(batch,)``.
        read: what the heads made of the hidden states, shape ``(exits, *last.shape)``.
        last: the hidden state that the denoiser's own output layers read, shape ``(batch, tokens, width)``; in a UNet
            ``(batch, channels, height, width)``.
    """

    hidden: list[torch.Tensor]
    predictions: torch.Tensor
    full: torch.Tensor
    timesteps: torch.Tensor
    read: torch.Tensor
    last: torch.Tensor


class ExitReadout:
    """Reads a denoiser's predictions at its exits, from entering the context to leaving it.

    The units run once, as they do in sampling. The hidden states that the exits see are then read by their heads and
    all together by the denoiser's output layers: in a second call in which no unit runs, or, in a UNet, whose output
    layers read nothing but that, in the same call. Differentiable.

    Args:
        denoiser: a supported transformer or UNet, used directly and not through a pipeline.
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
        read_out = self._in_one_call if self._backbone.up_steps else self._in_two_calls
        return read_out(arguments)

    def _call(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        output: torch.Tensor = self._denoiser(**arguments, return_dict=False)[0]
        return output[:, : _sample(arguments).shape[1]]

    def _outputs(
        self,
        seen: dict[int, torch.Tensor],
        full: torch.Tensor,
        predictions: torch.Tensor,
        read: list[torch.Tensor],
        arguments: Mapping[str, Any],
    ) -> ExitOutputs:
        hidden = [seen[column] for column in self._columns]
        return ExitOutputs(hidden, predictions, full, _timesteps(arguments), torch.stack(read), seen[_END])

    def _in_two_calls(self, arguments: Mapping[str, Any]) -> ExitOutputs:
        with _watched(self._backbone, self._columns) as seen:
            full = self._call(arguments)
        states = [seen[column] for column in self._columns]
        read = [head(state) for head, state in zip(self._modules.exit_heads, states, strict=True)]
        predictions = self._read_out(torch.cat(read), arguments, len(read)).unflatten(0, (len(read), -1))
        return self._outputs(seen, full, predictions, read, arguments)

    def _in_one_call(self, arguments: Mapping[str, Any]) -> ExitOutputs:
        """A UNet's output layers take one sample like another: the exits join the batch right before them."""
        last = self._backbone.up_steps[-1]
        read: list[torch.Tensor] = []

        def join(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            first_skip = last.first_skip(args, kwargs)
            pairs = zip(self._modules.exit_heads, self._columns, strict=True)
            read.extend(head(seen[column], first_skip) for head, column in pairs)
            return torch.cat([output, *read])

        with _watched(self._backbone, self._columns) as seen:
            handle = last.module.register_forward_hook(join, with_kwargs=True)
            try:
                full, *predictions = self._call(arguments).chunk(1 + len(self._columns))
            finally:
                handle.remove()
        return self._outputs(seen, full, torch.stack(predictions), read, arguments)

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


@contextmanager
def _watched(backbone: Backbone, columns: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, what the exits' units read is noted by their columns, and what the last one returns."""
    seen: dict[int, torch.Tensor] = {}
    steps = {step.columns[0]: step for step in backbone.steps}
    with ExitStack() as handles:
        for column in columns:
            step = steps[column]

            def note(_: nn.Module, args: Any, kwargs: Any, column: int = column, step: Step = step) -> None:
                seen[column] = step.io.read(args, kwargs)[0]

            handles.callback(step.module.register_forward_pre_hook(note, with_kwargs=True).remove)
        end = backbone.steps[-1]

        def note_end(_: nn.Module, __: Any, output: Any) -> None:
            seen[_END] = end.io.parse(output)[0]

        handles.callback(end.module.register_forward_hook(note_end).remove)
        yield seen


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
        denoiser: a supported transformer or UNet.
        arguments: of its forward, by name; the noisy samples first.
        exits: names of the units before which a sample may stop; all by default.
        **settings: further ones of `UncertaintyModules`.

    Raises:
        ConfigError: if an exit is none of it, or an exit's tokens are no square patches of the prediction.
        UnsupportedBackboneError: if its units cannot be found.
    """
    backbone = view(denoiser)
    exits = list(exits or backbone.exits)
    if unknown := set(exits) - set(backbone.names):
        units = ", ".join(backbone.names)
        raise ConfigError(f"{backbone.class_name} has no unit {', '.join(sorted(unknown))}; its units are {units}.")
    places = {backbone.names[step.columns[0]] for step in backbone.steps}
    if not exits or not places.issuperset(exits):
        found = ", ".join(backbone.exits) or "none"
        raise ConfigError(f"{backbone.class_name} has no exit before {', '.join(exits) or 'any unit'}; it has {found}.")
    columns = [backbone.names.index(name) for name in exits]
    with torch.no_grad(), _watched(backbone, columns) as seen:
        predicted: torch.Tensor = denoiser(**arguments, return_dict=False)[0]
    predicted = predicted[:, : _sample(arguments).shape[1]]
    states = [seen[column] for column in columns]
    if backbone.up_steps:
        sizes = _unet_sizes(predicted, states) | {"read_width": seen[_END].shape[1]}
        settings = {"heads": "per_exit"} | settings
    else:
        sizes = _transformer_sizes(predicted, states[0], getattr(denoiser.config, "patch_size", None) or 1)
    return UncertaintyModules(backbone.class_name, len(backbone.units), exits, **sizes, **settings)


def _transformer_sizes(predicted: torch.Tensor, hidden: torch.Tensor, patch: int) -> dict[str, Any]:
    _, tokens, width = hidden.shape
    made_of = predicted.shape[1] if predicted.ndim == 3 else predicted[0, 0].numel() // patch**2
    return {"width": width, "outputs": predicted[0].numel() // made_of, "extra_tokens": tokens - made_of}


def _unet_sizes(predicted: torch.Tensor, states: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Every pixel of a hidden state is a token, which stands for as many of the prediction's as it covers."""
    outputs = []
    for state in states:
        across = predicted.shape[-1] // state.shape[-1]
        if predicted.shape[2:] != tuple(across * size for size in state.shape[2:]):
            raise ConfigError(
                f"A prediction of {tuple(predicted.shape[2:])} does not divide into the pixels of a hidden state of "
                f"{tuple(state.shape[2:])}: take samples whose size is a multiple of more powers of two."
            )
        outputs.append(predicted.shape[1] * across**2)
    return {"width": [state.shape[1] for state in states], "outputs": outputs}
