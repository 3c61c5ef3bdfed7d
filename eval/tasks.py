"""What is asked of the images: prompts, class labels or nothing, and from which seeds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff.errors import ConfigError
from fastdiff.pipelines.calling import call_parameters

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class Task:
    """What is asked of the images.

    Args:
        requests: arguments of the pipeline's call with one value for each image, over and over: lists, or tensors whose
            first dimension counts; empty if nothing can be asked.
        shared: arguments that all calls have in common, such as the guidance scale.
        seed: image i starts from the noise of ``seed + i``.
        counted_by: argument that says how many images to make where there are no requests.
    """

    requests: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    counted_by: str = "batch_size"

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        """The arguments of a call that makes these images, with noise drawn on the CPU: the same on every device."""
        given: dict[str, Any] = {name: _chosen(values, indices) for name, values in self.requests.items()}
        generators = [torch.Generator("cpu").manual_seed(self.seed + index) for index in indices]
        return (given or {self.counted_by: len(indices)}) | dict(self.shared) | {"generator": generators}

    def describe(self) -> dict[str, Any]:
        """What tells this task from others, JSON-compatible: requests and what is no plain value as a digest."""
        return {
            "requests": {name: _digest(values) for name, values in sorted(self.requests.items())},
            "shared": {name: _plain(value) for name, value in sorted(self.shared.items())},
            "seed": self.seed,
        }


def _chosen(values: Any, indices: Sequence[int]) -> Any:
    places = [index % len(values) for index in indices]
    return values[places] if isinstance(values, torch.Tensor) else [values[place] for place in places]


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return _digest(value)


def _digest(value: Any) -> str:
    if hasattr(value, "shape"):
        array = np.ascontiguousarray(torch.as_tensor(value).detach().float().cpu().numpy())
        content = str(array.shape).encode() + array.tobytes()
    elif isinstance(value, (list, tuple)) and any(hasattr(item, "shape") or hasattr(item, "tobytes") for item in value):
        content = "".join(map(_digest, value)).encode()
    elif hasattr(value, "tobytes"):  # a PIL image
        content = str(getattr(value, "size", "")).encode() + value.tobytes()
    else:
        content = json.dumps(value, default=str).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def make_task(
    pipe: DiffusionPipeline,
    *,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Task:
    """A task that this pipeline can be given.

    Args:
        pipe: the pipeline.
        prompts: one for each image, over and over.
        class_labels: the same for a pipeline that samples by class.
        guidance_scale: classifier-free guidance; None for the pipeline's own default.
        arguments: further arguments of every call.
        seed: image i starts from the noise of ``seed + i``.

    Raises:
        ConfigError: for a negative seed, an empty list, or an argument that the pipeline's call does not have.
    """
    parameters = call_parameters(pipe)
    requests = {name: list(v) for name, v in (("prompt", prompts), ("class_labels", class_labels)) if v is not None}
    shared = dict(arguments or {}) | ({} if guidance_scale is None else {"guidance_scale": guidance_scale})
    if unknown := [name for name in (*requests, *shared) if name not in parameters]:
        raise ConfigError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(sorted(parameters))}."
        )
    if empty := [name for name, values in requests.items() if not values]:
        raise ConfigError(f"There is no {empty[0]} to sample from; give at least one.")
    if seed < 0:
        raise ConfigError(f"Seeds count from 0; got {seed}.")
    counters = [name for name in ("batch_size", "num_images_per_prompt") if name in parameters]
    if not requests and not counters:
        raise ConfigError(f"{type(pipe).__name__} has to be asked for something: give prompts or class labels.")
    return Task(requests, shared, seed, counters[0] if counters else "batch_size")


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts in a text file, one in each line; empty lines count for nothing.

    Raises:
        ConfigError: if the file cannot be read or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a file of prompts, one in each line: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt; it needs one in each line.")
    return prompts
