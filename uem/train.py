"""Training of uncertainty modules, exit heads and early-exiting denoisers; as a command, ``fastdiff train-uem``.

``python -m fastdiff.uem.train`` and ``accelerate launch -m fastdiff.uem.train`` are that command too.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs  # type: ignore[import-untyped]
from accelerate.utils import is_tensorboard_available  # type: ignore[import-untyped]

from fastdiff.backbones import view
from fastdiff.engine.heads import ExitHeads
from fastdiff.errors import ConfigError
from fastdiff.output import OutputError
from fastdiff.uem.config import TrainConfig
from fastdiff.uem.files import digest, fingerprint, write_json
from fastdiff.uem.objectives import ExitObjective, Objective, check_objective, make_objective
from fastdiff.uem.recording import denoiser_of
from fastdiff.uem.sources import Share, prepare
from fastdiff.uem.trainer import LOG, Trainer, read_log
from fastdiff.uem.validation import plot

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["TrainConfig", "train"]

PATIENCE = timedelta(days=1)
"""How long a process waits for the others, which may sample or encode for long."""


def train(
    pipe: DiffusionPipeline,
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    requests: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Train for a pipeline, or go on with what an interrupted run left.

    The folder gets what was trained, ``training.json`` with the settings, ``validation.json`` and ``validation.png``,
    ``log.jsonl``, the checkpoint, and the training data unless that has a folder of its own.

    Args:
        pipe: a diffusers pipeline with a supported transformer or UNet, not accelerated.
        config: how to train.
        out: folder for the results.
        requests: what the pipeline is asked for in its calls: lists or tensors with one value for each image, such as
            ``{"prompt": [...]}``; all its classes by default, or the images' labels or captions.
        arguments: further arguments of the pipeline's calls.
        cache: folder for the training data, by default ``data`` in ``out``.
        stop_at: stop after this many steps, as an interruption would; then there is no result.

    Returns:
        The last validation, as in ``validation.json``.

    Raises:
        ConfigError: for settings that do not fit the pipeline.
        TrainingDataError: for too little or too bad data.
        DivergedError: if a loss is no finite number.
        OutputError: if a folder cannot be written to.
        CheckpointError: for a damaged checkpoint.
        ProfileMismatchError: if the folder holds another training run.
        UnsupportedBackboneError: if the denoiser's units cannot be found.
        UnsupportedPipelineError: if the pipeline has no denoiser.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Results cannot be written to {out}: {error}. Name another folder with --out.") from error
    accelerator = _accelerator(config, out)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(accelerator.device)
    component, denoiser = denoiser_of(pipe)
    check_objective(view(denoiser), config)
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    data = prepare(pipe, config, Path(cache) if cache else out / "data", requests, arguments, share)
    objective = make_objective(denoiser, data, config)
    made_by = {"denoiser": fingerprint(denoiser), "requests": digest(_plain({**(requests or {}), **(arguments or {})}))}
    trainer = Trainer(objective, data, config, out, accelerator, made_by)
    if accelerator.is_main_process:
        write_json(out / "training.json", {**config.to_dict(), "rows": data.rows})
    trainer.fit(stop_at)
    if stop_at is not None and stop_at < config.steps:
        return {}
    result = trainer.measured()
    if accelerator.is_main_process:
        try:
            _save(objective, component, out)
            write_json(out / "validation.json", result)
            plot(result, read_log(out / LOG), out / "validation.png")
        except OSError as error:
            raise OutputError(f"Results cannot be written to {out}: {error}.") from error
    for tracker in accelerator.trackers:
        tracker.finish()
    return result


def _accelerator(config: TrainConfig, out: Path) -> Accelerator:
    """What runs the training, with TensorBoard where that is installed."""
    has_tensorboard = is_tensorboard_available()
    handlers = [
        # Blocks that no row of a batch reaches get no gradient.
        DistributedDataParallelKwargs(find_unused_parameters=config.objective == "ase"),
        InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and config.mixed_precision == "fp16":  # accelerate would go on, and scale no loss
        raise ConfigError("mixed_precision='fp16' needs a GPU, and this is the CPU. Give 'bf16' or 'no'.")
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with="tensorboard" if has_tensorboard else None,
            project_dir=out,
            kwargs_handlers=handlers,
        )
    except ValueError as error:  # another precision in this process before
        raise ConfigError(
            f"accelerate cannot compute with mixed_precision={config.mixed_precision!r} on this device: {error}"
        ) from error
    if config.device is not None and torch.device(config.device).type != accelerator.device.type:
        raise ConfigError(
            f"accelerate computes on {accelerator.device}; device is 'cpu' or None, got {config.device!r}."
        )
    if has_tensorboard:
        accelerator.init_trackers("tensorboard")
    elif accelerator.is_main_process:
        print("TensorBoard is not installed (pip install tensorboard); losses go to log.jsonl alone.")
    return accelerator


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _save(objective: Objective, component: str, out: Path) -> None:
    """Write what was trained, without this machine's paths."""
    if isinstance(objective, ExitObjective):
        modules = objective.exits
        if objective.config.objective == "heads":
            heads = ExitHeads(modules.exits, modules.config["width"], objective.config.rank)
            heads.heads.load_state_dict(modules.exit_heads.state_dict())
            heads.save_pretrained(out)
        else:
            modules.save_pretrained(out)
    if objective.config.train_backbone:
        denoiser: Any = objective.denoiser
        denoiser.register_to_config(_name_or_path="")
        denoiser.save_pretrained(out / component)


if __name__ == "__main__":
    sys.argv[1:1] = ["train-uem"]
    runpy.run_module("fastdiff", run_name="__main__")
