"""One resumable training loop for every model of the zoo: AdamW, warm-up and cosine decay, averaged weights.

All randomness of a step comes from a generator seeded with (seed, step), so a resumed run takes exactly the steps
that an uninterrupted one would have taken and no generator state needs saving.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

StepLoss = Callable[[torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """How to train.

    Attributes:
        steps: optimiser steps in all; the learning rate reaches ``final_learning_rate`` at the last one.
        learning_rate: AdamW's learning rate after the warm-up.
        final_learning_rate: the learning rate that the cosine ends at.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay, on matrices only.
        beta2: AdamW's second-moment decay.
        gradient_clip: largest gradient norm.
        ema_decay: largest decay of the averaged weights.
        ema_warmup: let the decay grow with the steps, for a run from scratch; a fine-tune has ``ema_decay`` from its
            first step, on an average that starts as the weights it is given.
        seed: seeds every step's randomness.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 0.01
    beta2: float = 0.99
    gradient_clip: float = 1.0
    ema_decay: float = 0.9995
    ema_warmup: bool = True
    seed: int = 0
    checkpoint_every: int = 500

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step ``step`` (0-based)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step's randomness."""
    return torch.Generator().manual_seed((seed << 32) + step)


def _optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def _averages(model: nn.Module, config: LoopConfig) -> EMAModel:
    warmup = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
    # As it comes, EMAModel lets the first step overwrite the average, and the next ones most of it.
    constant = {"min_decay": config.ema_decay, "update_after_step": -1}
    return EMAModel(model.parameters(), decay=config.ema_decay, **(warmup if config.ema_warmup else constant))


class _Checkpoint:
    """Model, averaged weights and optimiser moments in one safetensors file, the step in its metadata."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel):
        self.path, self.model, self.optimizer, self.ema = path, model, optimizer, ema

    def save(self, step: int) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{index}": value for index, value in enumerate(self.ema.shadow_params)}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".partial")
        metadata = {"step": str(step), "ema_step": str(self.ema.optimization_step)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, written, metadata)
        os.replace(written, self.path)  # an interrupted write never damages the last checkpoint

    def load(self) -> int:
        """Restores everything and returns the number of steps already taken."""
        if not self.path.exists():
            return 0
        tensors = load_file(self.path)
        optimizer_state: dict[int, dict[str, torch.Tensor]] = {}
        self.model.load_state_dict(
            {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        )
        self.ema.shadow_params = [tensors[f"ema.{index}"] for index in range(len(self.ema.shadow_params))]
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                optimizer_state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
        metadata = read_metadata(self.path)
        self.ema.optimization_step = int(metadata["ema_step"])
        return int(metadata["step"])


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def fit(
    model: nn.Module,
    step_loss: StepLoss,
    config: LoopConfig,
    folder: Path,
    *,
    stop_at: int | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
) -> None:
    """Trains ``model`` in place and leaves it with the averaged weights.

    Args:
        model: what to train; parameters that do not require a gradient stay as they are.
        step_loss: gets a step's generator and returns the loss of that step's batch, a scalar tensor.
        config: how to train.
        folder: holds ``checkpoint.safetensors`` (continued from when present), ``config.json`` and ``log.jsonl``.
        stop_at: stop after this many steps, as an interruption would.
        on_checkpoint: called after every checkpoint with the number of steps taken; the model then holds the
            averaged weights.
    """
    optimizer = _optimizer(model, config)
    ema = _averages(model, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    checkpoint = _Checkpoint(folder / "checkpoint.safetensors", model, optimizer, ema)
    first = checkpoint.load()
    last = min(config.steps, stop_at or config.steps)
    model.train()
    losses: list[float] = []
    progress = tqdm(range(first, last), initial=first, total=config.steps, desc=folder.name, mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        loss = step_loss(step_generator(config.seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        ema.step(model.parameters())
        losses.append(loss.item())
        taken = step + 1
        if taken % config.checkpoint_every == 0 or taken == last:
            checkpoint.save(taken)
            mean = sum(losses) / len(losses)
            losses.clear()
            progress.set_postfix(loss=f"{mean:.4f}")
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": taken, "loss": mean}) + "\n")
            if on_checkpoint is not None:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                model.eval()
                on_checkpoint(taken)
                model.train()
                ema.restore(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
