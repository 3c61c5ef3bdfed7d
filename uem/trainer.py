"""The training loop: accelerate runs it on whatever there is, and it goes on exactly where it stopped.

All randomness of a step comes from its seed and number, and is drawn for all processes alike; each takes its part. So a
run that went on after an interruption takes the steps that an uninterrupted one would have taken, and several processes
take those of one, up to rounding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from fastdiff.errors import ConfigError, FastDiffError
from fastdiff.output import OutputError
from fastdiff.uem.checkpoint import Checkpoint
from fastdiff.uem.config import TrainConfig
from fastdiff.uem.data import Drawn, TrainingData
from fastdiff.uem.files import write_text
from fastdiff.uem.objectives import ExitObjective, Objective
from fastdiff.uem.validation import measure, summary

LOG, CHECKPOINT = "log.jsonl", "checkpoint.safetensors"
LOG_EVERY = 10


class DivergedError(FastDiffError, ArithmeticError):
    """A loss that is no finite number.

    Args:
        message: what was found, and what to do.
        step: number of the step, from 1.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step's randomness."""
    return torch.Generator().manual_seed((seed << 32) + step)


class Trainer:
    """Trains an objective.

    Args:
        objective: what to train, on the accelerator's device.
        data: rows to train and to validate on.
        config: how to train.
        folder: for checkpoints and logs.
        accelerator: runs it.
        made_by: what tells this run from others, beside the configuration; JSON-compatible.

    Raises:
        ConfigError: if the batch cannot be shared between the processes.
    """

    def __init__(
        self,
        objective: Objective,
        data: TrainingData,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
        made_by: dict[str, Any],
    ) -> None:
        parts = accelerator.num_processes * config.gradient_accumulation
        if config.batch_size % parts:
            raise ConfigError(
                f"A batch of {config.batch_size} rows does not divide into parts of one size for "
                f"{accelerator.num_processes} processes that accumulate {config.gradient_accumulation} each."
            )
        self.objective, self.data, self.config, self.folder = objective, data, config, folder
        self.accelerator = accelerator
        self._parameters = objective.trained()
        if not self._parameters:
            raise ConfigError("There is nothing to train.")
        # Together, because sharding gives the optimiser other parameters.
        self._model, self._optimizer = accelerator.prepare(objective, _optimizer(self._parameters, config))
        self._averages = _averages(list(self._parameters.values()), config)
        self._checkpoint = Checkpoint(
            folder / CHECKPOINT,
            {**config.decides(), **made_by},
            self._parameters,
            self._averages,
            self._optimizer,
            accelerator.scaler,
        )

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return bool(self.accelerator.is_main_process)

    def fit(self, stop_at: int | None = None) -> None:
        """Train, and leave the objective with the averaged weights.

        Args:
            stop_at: stop after this many steps, as an interruption would.

        Raises:
            DivergedError: if a loss is no finite number; the last checkpoint stays.
            CheckpointError: if there is a checkpoint that cannot be read.
            OutputError: if the folder cannot be written to; the last checkpoint stays.
        """
        first = self._checkpoint.load()
        self._cut_log(first)
        last = min(self.config.steps, stop_at or self.config.steps)
        bar = tqdm(
            range(first, last),
            initial=first,
            total=self.config.steps,
            desc="training",
            unit="step",
            disable=not self.is_main,
            mininterval=1,
        )
        started, since = time.perf_counter(), []
        for step in bar:
            since.append(self._step(step))
            taken = step + 1
            if taken % LOG_EVERY == 0 or taken == last:
                means = {
                    name: sum(terms[name] for terms in since) / len(since)
                    for name in since[-1]
                    if all(name in terms for terms in since)
                }
                since.clear()
                bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
                rate = self._optimizer.param_groups[0]["lr"]
                seconds = round(time.perf_counter() - started, 2)
                self._log({"step": taken, **means, "learning_rate": rate, "seconds": seconds})
            if taken % self.config.checkpoint_every == 0 or taken == last:
                if self.is_main:
                    self._checkpoint.save(taken)
                self.accelerator.wait_for_everyone()
            if taken % self.config.validate_every == 0 and taken < self.config.steps:
                self._log_validation(taken, self.validate())
        self.accelerator.wait_for_everyone()
        self._averages.copy_to(self._parameters.values())

    def _step(self, step: int) -> dict[str, float]:
        """One step of the optimiser; returns the terms of its loss."""
        config, accelerator = self.config, self.accelerator
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * config.learning_rate_factor(step)
        distils = config.distillation > 0 and (config.distillation_stop is None or step < config.distillation_stop)
        totals: dict[str, torch.Tensor] = {}
        for drawn in self._parts(self.data.draw(step_generator(config.seed, step), config.batch_size)):
            batch = self.data.batch(drawn).to(accelerator.device)
            with accelerator.accumulate(self._model), self.objective.watching(batch):
                terms = self._model(batch, distils)
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0) + value.detach() / config.gradient_accumulation
                accelerator.backward(terms["loss"])
        means = {name: float(accelerator.reduce(value, "mean")) for name, value in totals.items()}
        if not all(map(torch.isfinite, map(torch.tensor, means.values()))):
            self._diverged(step + 1, means)
        if config.gradient_clip:
            accelerator.clip_grad_norm_(self._parameters.values(), config.gradient_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._averages.step(self._parameters.values())
        return means

    def _parts(self, drawn: Drawn) -> Iterator[Drawn]:
        """This process's parts of a step's rows, one after the other."""
        processes, parts = self.accelerator.num_processes, self.config.gradient_accumulation
        size = len(drawn) // (processes * parts)
        for part in range(parts):
            start = (part * processes + self.accelerator.process_index) * size
            yield drawn.part(slice(start, start + size))

    def _diverged(self, step: int, means: dict[str, float]) -> None:
        kept = step - 1 - (step - 1) % self.config.checkpoint_every
        saved = f"The checkpoint of step {kept} is kept" if kept else "There is no checkpoint yet"
        told = ", ".join(f"{name} {value:g}" for name, value in means.items())
        raise DivergedError(
            f"The loss is no finite number in step {step} ({told}). {saved}. Try a smaller learning rate, or full "
            "precision.",
            step=step,
        )

    # -- validation ----------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the objective has the averaged weights."""
        parameters = list(self._parameters.values())
        self._averages.store(parameters)
        self._averages.copy_to(parameters)
        try:
            yield
        finally:
            self._averages.restore(parameters)

    def validate(self) -> dict[str, Any]:
        """Measure the averaged weights on the rows held out; the same in all processes."""
        with self.averaged():
            return self.measured()

    def measured(self) -> dict[str, Any]:
        """Measure the weights as they are."""
        process, count = self.accelerator.process_index, self.accelerator.num_processes

        def share(items: Sequence[Any]) -> Sequence[Any]:
            return items[process::count]

        rows = measure(self.objective, self.data, share, gather_object)
        exits = self.objective.exits.exits if isinstance(self.objective, ExitObjective) else ["as scheduled"]
        return summary(rows, exits, 1000)

    # -- logs ----------------------------------------------------------------------------------------------------------

    def _log(self, entry: dict[str, Any]) -> None:
        if self.is_main:
            try:
                with (self.folder / LOG).open("a", encoding="utf-8") as log:
                    log.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise OutputError(f"{self.folder / LOG} cannot be written: {error}.") from error
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=entry["step"])

    def _log_validation(self, step: int, result: dict[str, Any]) -> None:
        found = {f"rank_correlation_{name}": value for name, value in result.get("rank_correlation", {}).items()}
        found["rmse"] = sum(result["rmse"]) / len(result["rmse"])
        self._log({"step": step, **{f"validation_{name}": value for name, value in found.items() if value is not None}})

    def _cut_log(self, step: int) -> None:
        """Forget what was logged after the checkpoint."""
        path = self.folder / LOG
        if self.is_main and path.exists():
            kept = [entry for entry in read_log(path) if entry["step"] <= step]
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, but for a last line that is cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate for the denoiser and one for all else, and weight decay on matrices alone."""
    groups = []
    for is_backbone, rate in ((True, config.backbone_learning_rate), (False, config.learning_rate)):
        own = [value for name, value in parameters.items() if name.startswith("denoiser.") == is_backbone]
        for is_matrix, decay in ((True, config.weight_decay), (False, 0.0)):
            chosen = [value for value in own if (value.ndim >= 2) == is_matrix]
            if chosen:
                groups.append({"params": chosen, "base": rate, "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def _averages(parameters: list[nn.Parameter], config: TrainConfig) -> EMAModel:
    """Averages that forget the first steps of what starts untrained, and start as a copy of what is fine-tuned."""
    if config.objective == "ase":
        # As it comes, EMAModel lets the first step overwrite the average, and the next ones most of it.
        return EMAModel(parameters, decay=config.ema_decay, min_decay=config.ema_decay, update_after_step=-1)
    return EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
