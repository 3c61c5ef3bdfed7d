"""What is learned from a batch: the losses of each objective, and what they train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from fastdiff.backbones import Backbone, view
from fastdiff.errors import ConfigError
from fastdiff.methods import ExitSchedule
from fastdiff.methods.exit_schedule import exit_at_depths
from fastdiff.uem import losses
from fastdiff.uem.config import TrainConfig
from fastdiff.uem.data import Batch, TrainingData
from fastdiff.uem.modules import UncertaintyModules, check_unet_heads
from fastdiff.uem.readout import ExitOutputs, ExitReadout, make_modules

Losses = dict[str, torch.Tensor]
"""Terms of a loss by name, as they are logged; their sum is ``"loss"``."""


class Objective(nn.Module):
    """A denoiser and what is trained with it, in one module whose forward gives the losses of a batch.

    Args:
        denoiser: the denoiser.
        config: how to train.
    """

    denoiser: Any

    def __init__(self, denoiser: Any, config: TrainConfig) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config
        # Not in training mode, in which denoisers drop labels and more with randomness of their own.
        denoiser.eval().requires_grad_(config.train_backbone)
        if config.gradient_checkpointing:
            try:
                denoiser.enable_gradient_checkpointing()
            except (AttributeError, ValueError) as error:
                raise ConfigError(f"{type(denoiser).__name__} has no gradient checkpointing.") from error

    def watching(self, batch: Batch) -> AbstractContextManager[None]:
        """Around forward and backward of a batch: the hooks that they need."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class ExitObjective(Objective):
    """DeeDiff's losses, or those of heads alone.

    Args:
        denoiser: the denoiser.
        modules: uncertainty modules and heads.
        config: how to train.
    """

    exits: UncertaintyModules

    def __init__(self, denoiser: nn.Module, modules: UncertaintyModules, config: TrainConfig) -> None:
        super().__init__(denoiser, config)
        self.exits = modules.train()
        self.readout = ExitReadout(denoiser, modules)
        modules.uncertainty.requires_grad_(config.objective == "deediff")

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Around forward and backward of a batch: the exits are read."""
        with self.readout:
            yield

    def uncertainty(self, found: ExitOutputs) -> list[torch.Tensor]:
        """The modules' maps of all exits, each of shape ``(batch, tokens, numbers of a token)``."""
        return [self.exits.maps(exit, state, found.timesteps) for exit, state in enumerate(found.hidden)]

    def target(self, found: ExitOutputs, batch: Batch) -> torch.Tensor:
        """What the exits are held against, float32 of the sample's shape."""
        return (found.full.detach() if self.config.target == "full" else batch.truth).float()

    def forward(self, batch: Batch, distils: bool) -> Losses:
        """The losses of a batch.

        Args:
            batch: the rows.
            distils: whether hidden states are compared as well.
        """
        config, found = self.config, self.readout(**batch.arguments)
        target = self.target(found, batch)
        parts: Losses = {}
        if config.objective == "deediff":
            maps = self.uncertainty(found)
            labels = losses.token_labels(found.predictions, target, maps)
            parts["uncertainty"] = config.uncertainty_weight * losses.uncertainty_loss(maps, labels)
            if found.predictions.requires_grad:  # there is nothing to learn for shared heads of a frozen denoiser
                uncertainty = mean_uncertainty(maps)
                layerwise = losses.layerwise_loss(
                    found.predictions, target, uncertainty, config.ual, config.largest_threshold, batch.weights
                )
                parts["layerwise"] = config.layerwise_weight * layerwise
        else:
            errors = losses.row_errors(found.predictions, target, batch.weights)
            parts["layerwise"] = config.layerwise_weight * errors.mean()
        if config.train_backbone:
            parts["simple"] = losses.row_errors(found.full, batch.truth, batch.weights).mean()
        if distils and found.read.requires_grad:
            parts["distillation"] = config.distillation * losses.feature_loss(
                found.read.flatten(3), found.last.flatten(2)
            )
        return {"loss": torch.stack([*parts.values()]).sum(), **parts}


def mean_uncertainty(maps: list[torch.Tensor]) -> torch.Tensor:
    """Of each exit and sample, shape ``(exits, batch)``."""
    return torch.stack([map_.mean((1, 2)) for map_ in maps])


class ScheduleObjective(Objective):
    """ASE's loss: each sample is predicted with as many blocks as the schedule has for its timestep (section 3.2).

    Args:
        denoiser: the denoiser; its timestep embedder stays as it is.
        config: how to train.

    Raises:
        ConfigError: if the schedule is none, or not of timesteps.
    """

    def __init__(self, denoiser: nn.Module, config: TrainConfig) -> None:
        super().__init__(denoiser, config)
        from fastdiff.spec import parse_method

        schedule = parse_method(config.schedule)
        if not isinstance(schedule, ExitSchedule) or schedule.space != "timestep" or schedule.heads is not None:
            raise ConfigError(
                f"schedule is an exit schedule of timesteps, without heads, such as 'exit-schedule:preset=ase-demo'; "
                f"got {config.schedule!r}."
            )
        self.schedule = schedule
        self._backbone = view(denoiser)
        for module in denoiser.modules():
            if isinstance(module, TimestepEmbedding):
                module.requires_grad_(False)

    def depths(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Blocks to run at each timestep, int64 of shape ``(batch,)``."""
        depths = self.schedule.depths_for(self._backbone, timesteps.cpu().numpy())
        return torch.as_tensor(depths, device=timesteps.device)

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Around forward and backward of a batch: its samples exit at their depths."""
        with exit_at_depths(self.denoiser, self.depths(batch.timesteps), self.schedule.order):
            yield

    def predict(self, batch: Batch) -> torch.Tensor:
        """The denoiser's prediction, without variances."""
        channels = batch.truth.shape[1]
        prediction: torch.Tensor = self.denoiser(**batch.arguments, return_dict=False)[0][:, :channels]
        return prediction

    def forward(self, batch: Batch, distils: bool) -> Losses:
        """The losses of a batch; there is nothing to distil."""
        simple = losses.row_errors(self.predict(batch), batch.truth, batch.weights).mean()
        return {"loss": simple, "simple": simple}


def check_objective(backbone: Backbone, config: TrainConfig) -> None:
    """Refuse what cannot be trained for a denoiser, before anything is computed.

    Raises:
        ConfigError: if samples cannot stop in it, or not in the way that is asked for.
    """
    if not backbone.exits:
        raise ConfigError(f"Samples cannot stop early in a {backbone.class_name}, so there are no exits to train.")
    if backbone.up_steps and config.objective != "deediff":
        raise ConfigError(
            f"Exit schedules are for transformers, and {backbone.class_name} is a UNet: objective='deediff' trains its "
            f"exits; got {config.objective!r}."
        )
    if backbone.up_steps:
        check_unet_heads(config.heads)


def make_objective(denoiser: nn.Module, data: TrainingData, config: TrainConfig) -> Objective:
    """The objective that a configuration names, with new modules drawn by its seed.

    Raises:
        ConfigError: if the denoiser has no exits of this kind.
        UnsupportedBackboneError: if its units cannot be found.
    """
    if config.objective == "ase":
        return ScheduleObjective(denoiser, config)
    example = data.example().to(next(denoiser.parameters()).device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        modules = make_modules(
            denoiser.eval(),
            example.arguments,
            heads=config.heads,
            rank=config.rank,
            timestep_aware=config.timestep_aware,
        )
    return ExitObjective(denoiser, modules.to(example.truth.device), config)
