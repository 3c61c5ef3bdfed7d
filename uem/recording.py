"""What a pipeline asks of its denoiser: the arguments of its calls, and the predictions that it got.

Whatever conditions a denoiser - classes, text, masks, sizes - is among its call's arguments. Taking them from the
pipeline's own calls needs no code for any pipeline.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdiff.engine.batching import timestep_name
from fastdiff.errors import ConfigError, UnsupportedPipelineError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DENOISERS = ("transformer", "unet", "prior")
"""Components that exits are trained for, the first that a pipeline has."""

SHARED = ("img_ids", "txt_ids", "image_rotary_emb")
"""Arguments about tokens, which no sample has for itself, even where there happen to be as many as samples."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a denoiser.

    Args:
        step: number of the scheduler's steps before it.
        arguments: by name, in the order of the denoiser's signature, which begins with the noisy samples.
        prediction: what it returned, without variances; None where the call was not made.
        timestep: the scheduler's, in training units.
    """

    step: int
    arguments: dict[str, Any]
    prediction: torch.Tensor | None
    timestep: float


class _Stop(Exception):
    """Ends a pipeline's call."""


def denoiser_of(pipe: DiffusionPipeline) -> tuple[str, Any]:
    """A pipeline's denoiser and the name of the component.

    Raises:
        UnsupportedPipelineError: if there is none.
    """
    for name in DENOISERS:
        if isinstance(module := getattr(pipe, name, None), nn.Module):
            return name, module
    raise UnsupportedPipelineError(
        f"{type(pipe).__name__} has no denoiser under one of the names {', '.join(DENOISERS)}; it has the components "
        f"{', '.join(pipe.components)}."
    )


def call_parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters


def record(
    pipe: DiffusionPipeline, arguments: Mapping[str, Any], seed: int, evaluations: Sequence[int] | None
) -> list[Call]:
    """Call a pipeline, and note its calls of the denoiser.

    Args:
        pipe: the pipeline.
        arguments: of its call.
        seed: of what it draws without a generator.
        evaluations: steps of the scheduler to note; None for the first alone, for which nothing is computed.

    Raises:
        ConfigError: if the pipeline refuses the arguments, or nothing was noted.
    """
    _, denoiser = denoiser_of(pipe)
    calls: list[Call] = []
    steps = 0
    signature = inspect.signature(type(denoiser).forward)

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(denoiser, *args, **kwargs).arguments
        given = {name: value for name, value in list(bound.items())[1:] if name != "return_dict"}
        sample = next(iter(given.values()))
        if evaluations is None:
            channels = getattr(denoiser.config, "out_channels", None) or sample.shape[1]
            output = sample if sample.ndim != 4 else sample.new_zeros(len(sample), channels, *sample.shape[2:])
            calls.append(Call(steps, given, None, _timestep(pipe, steps)))
            return (output,) if kwargs.get("return_dict") is False else _Output(output)
        result = original(*args, **kwargs)
        if steps in evaluations:
            prediction = result[0][:, : sample.shape[1]]
            calls.append(Call(steps, {**given}, prediction.clone(), _timestep(pipe, steps)))
        return result

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        if evaluations is None:
            raise _Stop
        result = original(*args, **kwargs)
        steps += 1
        return result

    device = torch.device(pipe.device)
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _replaced(denoiser, "forward", forward),
        _replaced(pipe.scheduler, "step", step),
    ):
        torch.manual_seed(seed)
        try:
            pipe(**arguments)
        except _Stop:
            pass
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{type(pipe).__name__} does not sample with {', '.join(arguments)}: {error}") from error
    if not calls:
        raise ConfigError(f"{type(pipe).__name__} did not call its denoiser in any of the steps that are recorded.")
    return calls


class _Output(tuple[torch.Tensor]):
    """Stands for a denoiser's output, by attribute or by index."""

    def __new__(cls, sample: torch.Tensor) -> _Output:
        return super().__new__(cls, (sample,))

    @property
    def sample(self) -> torch.Tensor:
        return self[0]


@contextmanager
def _replaced(owner: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Within the block, a method of one object is another function, which is given the method first."""
    own = vars(owner).get(name)
    method = getattr(owner, name)
    setattr(owner, name, functools.wraps(method)(functools.partial(by, method)))
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


def _timestep(pipe: DiffusionPipeline, step: int) -> float:
    return float(torch.as_tensor(pipe.scheduler.timesteps)[step])


# -- rows of calls -----------------------------------------------------------------------------------------------------


def flattened(arguments: Mapping[str, Any], rows: int) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A call's arguments as a structure that JSON can hold, tensors with one row for each sample, and other tensors.

    The timestep is given to each sample.

    Args:
        arguments: by name.
        rows: number of samples.

    Raises:
        ConfigError: if an argument holds something that is neither tensor nor plain value.
    """
    own: dict[str, torch.Tensor] = {}
    shared: dict[str, torch.Tensor] = {}
    timestep = timestep_name(arguments)

    def flat(value: Any, path: str) -> Any:
        if path == timestep:
            value = torch.as_tensor(value)
            value = value if value.ndim and len(value) == rows else value.reshape(-1)[:1].expand(rows)
        if isinstance(value, torch.Tensor):
            is_own = value.ndim > 0 and len(value) == rows and path.rpartition(".")[2] not in SHARED
            (own if is_own else shared)[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"mapping": {name: flat(item, f"{path}.{name}") for name, item in value.items()}}
        if isinstance(value, (list, tuple)):
            items = [flat(item, f"{path}.{number}") for number, item in enumerate(value)]
            return {type(value).__name__ if type(value) in (list, tuple) else "tuple": items}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise ConfigError(
            f"The denoiser is called with {path}={type(value).__name__}, which cannot be kept for training; only "
            "tensors, numbers, text and lists of them can."
        )

    structure = {name: flat(value, name) for name, value in arguments.items()}
    return structure, own, shared


def restored(structure: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments that `flattened` took apart."""

    def whole(part: Mapping[str, Any]) -> Any:
        ((kind, content),) = part.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "mapping":
            return {name: whole(item) for name, item in content.items()}
        if kind in ("list", "tuple"):
            items = [whole(item) for item in content]
            return items if kind == "list" else tuple(items)
        return content

    return {name: whole(part) for name, part in structure.items()}
