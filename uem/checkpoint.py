"""Checkpoints of training: what is trained, its averages, the optimiser, and the step, in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from fastdiff.errors import ProfileMismatchError
from fastdiff.uem.files import CheckpointError, read_tensors, write_tensors


class Checkpoint:
    """The state of a training run on disk.

    Args:
        path: the file.
        made_by: JSON-compatible; a run that was made by something else is not continued.
        parameters: what is trained, by name.
        averages: of the parameters.
        optimizer: of the parameters.
        scaler: scales the gradients of half precision; None without.
    """

    def __init__(
        self,
        path: Path,
        made_by: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
        averages: EMAModel,
        optimizer: Any,
        scaler: Any = None,
    ) -> None:
        self.path, self.made_by, self.parameters = path, dict(made_by), parameters
        self.averages, self.optimizer, self.scaler = averages, optimizer, scaler

    def save(self, step: int) -> None:
        """Write the state after so many steps.

        Raises:
            OutputError: if it cannot be written; the last checkpoint stays as it was.
        """
        tensors: dict[str, torch.Tensor] = {f"model.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"ema.{index}": value for index, value in enumerate(self.averages.shadow_params)}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        described = {
            "step": step,
            "ema_step": self.averages.optimization_step,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "made_by": self.made_by,
        }
        write_tensors(self.path, tensors, described)

    def load(self) -> int:
        """Restore the state.

        Returns:
            The number of steps taken; 0 if there is no checkpoint.

        Raises:
            CheckpointError: if the file is damaged.
            ProfileMismatchError: if it is of a run with other settings.
        """
        if not self.path.exists():
            return 0
        tensors, described = read_tensors(self.path)
        made_by = described.get("made_by", {})
        different = [name for name, value in self.made_by.items() if made_by.get(name) != value]
        if different:
            was = ", ".join(f"{name}={made_by.get(name)!r}" for name in different)
            raise ProfileMismatchError(
                f"{self.path} is of a training run with {was}. Give these settings to go on with it, or another folder "
                "with --out."
            )
        try:
            self._restore(tensors, described)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.path} does not hold the state of this training run: {error}") from error
        return int(described["step"])

    def _restore(self, tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
            for index, average in enumerate(self.averages.shadow_params):
                average.copy_(tensors[f"ema.{index}"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                state.setdefault(int(number), {})[name] = value.clone()  # the file may be replaced under it
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.averages.optimization_step = described["ema_step"]
        if self.scaler is not None:
            self.scaler.load_state_dict(described["scaler"])
