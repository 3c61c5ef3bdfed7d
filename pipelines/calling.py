"""Loading and calling pipelines that only the user knows: what their calls take, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fastdiff.errors import ConfigError, FastDiffError
from fastdiff.pipelines.pipeline import FastDiffPipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load(model: str, device: str, dtype: str, **kwargs: Any) -> DiffusionPipeline:
    """Load a pipeline; further arguments are those of `FastDiffPipeline.from_pretrained`."""
    if dtype != "float32":  # the default, and naming it would draw a warning about the argument's own name
        kwargs["torch_dtype"] = getattr(torch, dtype)
    return FastDiffPipeline.from_pretrained(model, **kwargs).to(device)


def call_parameters(pipe: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    """The parameters of the wrapped pipeline's own call."""
    own = next(cls for cls in type(pipe).__mro__ if "__call__" in vars(cls) and not issubclass(cls, FastDiffPipeline))
    return dict(list(inspect.signature(own.__call__).parameters.items())[1:])


@contextmanager
def refusals_explained(what: str) -> Iterator[None]:
    """Within the block, an error about a value becomes a `ConfigError` that begins with ``what``."""
    try:
        yield
    except FastDiffError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{what}: {error}") from error
