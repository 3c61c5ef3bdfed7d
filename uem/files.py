"""Files of training: written so that none is ever half there, and fingerprints of what made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from fastdiff.errors import FastDiffError
from fastdiff.output import OutputError

_FINGERPRINT_VALUES = 4096


class CheckpointError(FastDiffError, OSError):
    """A file of training that cannot be read: cut off, overwritten, or of another program."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON-compatible metadata to a safetensors file, which replaces an older one at once.

    Raises:
        OutputError: if it cannot be written, such as on a full disk; an older file stays as it was.
    """
    # Copies, because two names for one tensor have no place in the format.
    content = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    _replace(path, save(content, {name: json.dumps(value) for name, value in metadata.items()}))


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a file, which replaces an older one at once.

    Raises:
        OutputError: if it cannot be written; an older file stays as it was.
    """
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text to a file, which replaces an older one at once.

    Raises:
        OutputError: if it cannot be written; an older file stays as it was.
    """
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error}. What was written before it is intact; make room, and the same command "
            "goes on."
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), {name: json.loads(value) for name, value in metadata.items()}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut off: {error}. Delete it, and the same command makes it anew."
        ) from error


def fingerprint(module: nn.Module) -> str:
    """Stands for a module's class, configuration and weights; of each tensor a sample of its values is looked at."""
    state = hashlib.sha256(type(module).__name__.encode())
    config: Any = getattr(module, "config", {})  # transformers' configurations are no mappings
    config = config if isinstance(config, Mapping) else config.to_dict()
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    state.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        flat = value.detach().flatten()
        chosen = flat[:: max(1, len(flat) // _FINGERPRINT_VALUES)].cpu().double()
        state.update(f"{name}{tuple(value.shape)}".encode() + chosen.numpy().tobytes())
    return state.hexdigest()


def digest(description: Any) -> str:
    """Stands for something JSON-compatible."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()
