"""What a pipeline is, so that results of different ones are not mixed up."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fastdiff
from fastdiff.eval.provenance import describe_environment

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def describe_pipeline(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Class, weights, dtype and scheduler of a pipeline, JSON-compatible and without the folder it came from."""
    modules = {name: part for name, part in sorted(pipe.components.items()) if isinstance(part, nn.Module)}
    config = {name: str(value) for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return {
        "class": type(pipe).__name__,
        "weights": {name: weights_digest(module) for name, module in modules.items()},
        "dtype": sorted({str(weight.dtype) for module in modules.values() for weight in module.parameters()}),
        "scheduler": {"class": type(pipe.scheduler).__name__, **config},
    }


def weights_digest(module: nn.Module) -> str:
    """A fingerprint of a module's parameters and buffers."""
    content = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and not tensor.is_meta:  # offloaded weights are not here to be looked at
            content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def describe_place(device: torch.device) -> dict[str, Any]:
    """What the last bits of an image depend on besides the pipeline: device, versions and, on CPUs, threads."""
    environment = describe_environment(device)
    place = {name: environment[name] for name in ("device", "torch", "diffusers")}
    place["fastdiff"] = fastdiff.__version__
    return place | ({"threads": environment["torch_threads"]} if device.type == "cpu" else {})
