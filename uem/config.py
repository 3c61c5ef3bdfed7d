"""How uncertainty modules, exit heads and early-exiting denoisers are trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastdiff.errors import ConfigError

OBJECTIVES = ("deediff", "ase", "heads")
TARGETS = ("full", "truth")
PRECISIONS = ("no", "bf16", "fp16")

_COUNTS = (
    *("steps", "batch_size", "gradient_accumulation", "rank", "checkpoint_every", "validate_every"),
    *("record_batch", "evaluations", "num_inference_steps", "validation_rows"),
)
_WEIGHTS = (
    *("learning_rate", "backbone_learning_rate", "weight_decay", "uncertainty_weight", "layerwise_weight"),
    *("distillation", "gradient_clip"),
)
_NO_RESULT = ("checkpoint_every", "validate_every", "device", "validation_rows")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        data: what is trained on: ``"self"``, the calls that the pipeline itself makes; ``"zoo"``, glyphs; a folder of
            images; or ``"datasets:NAME[:SPLIT[:COLUMN]]"``.
        objective: ``"deediff"`` for uncertainty modules and heads, ``"heads"`` for heads alone, ``"ase"`` to fine-tune
            the denoiser for an exit schedule.
        train_backbone: whether the denoiser learns too; else it stays as it is.
        target: what the exits are held against: ``"full"``, the denoiser's own prediction, or ``"truth"``, what images
            and noise say it should be.
        heads: ``"shared"``, ``"per_exit_norm"`` or ``"per_exit"``, as in `UncertaintyModules`.
        rank: channels of the corrections of ``"per_exit"``.
        timestep_aware: whether the modules know the timestep.
        ual: ``"detached"``, ``"paper"``, ``"official"`` or ``"stopping"``: weights of `losses.layerwise_loss`.
        largest_threshold: of ``"stopping"``: thresholds above this are not to be used.
        uncertainty_weight: weight of the uncertainty loss.
        layerwise_weight: weight of the layer-wise loss.
        snr_gamma: for given images, cap of min-SNR weights (arXiv 2303.09556; 5 is usual): a row counts by the error of
            the image that its prediction makes, in units of its noise up to this cap; None for errors of the prediction
            that count alike.
        unconditional: share of the rows that are of the unconditional guidance branch; None for as many as the
            pipeline's calls have, which is half of them.
        distillation: weight of the feature loss, between the exits' corrected hidden states and the last one.
        distillation_stop: step from which on there is no feature loss; None for never.
        schedule: exit schedule of ``"ase"``, as ``NAME:field=value,...``.
        steps: of the optimiser.
        batch_size: rows in each step, of all processes and accumulated parts together.
        learning_rate: of modules and heads, after the warm-up; a cosine takes it down to a hundredth.
        backbone_learning_rate: the same of the denoiser.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW, on matrices only.
        gradient_clip: largest gradient norm; 0 for no limit.
        ema_decay: largest decay of the averaged weights, which are what is validated and saved; 0 for no average.
        gradient_accumulation: parts that a step's rows are worked through in.
        gradient_checkpointing: whether the denoiser's activations are computed twice instead of kept.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        seed: of all randomness.
        checkpoint_every: steps between checkpoints.
        validate_every: steps between validations.
        validation_rows: held-out rows that are looked at in one.
        device: ``"cpu"``, or None for what accelerate chooses.
        samples: images that the pipeline samples, or at most so many of the given ones; None for 288, 2880 glyphs, or
            all.
        record_batch: images in one call of the pipeline.
        evaluations: of each image sampled, how many evaluations are kept, evenly over its steps.
        num_inference_steps: steps of the pipeline's calls; with 20 or more, calls differ by up to 10, so that many
            timesteps occur.
        guidance_scale: of the pipeline's calls; None for its own default.

    Raises:
        ConfigError: for a value that is not allowed, or values that do not go together.
    """

    data: str = "self"
    objective: str = "deediff"
    train_backbone: bool = False
    target: str = "full"
    heads: str = "per_exit"
    rank: int = 32
    timestep_aware: bool = True
    ual: str = "detached"
    largest_threshold: float = 0.25
    uncertainty_weight: float = 1.0
    layerwise_weight: float = 1.0
    snr_gamma: float | None = None
    unconditional: float | None = None
    distillation: float = 0.0
    distillation_stop: int | None = None
    schedule: str = "exit-schedule:preset=ase-demo"
    steps: int = 700
    batch_size: int = 64
    learning_rate: float = 2e-3
    backbone_learning_rate: float = 1e-5
    warmup_steps: int = 50
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.99
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 350
    validation_rows: int = 768
    device: str | None = None
    samples: int | None = None
    record_batch: int = 24
    evaluations: int = 16
    num_inference_steps: int = 50
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        from fastdiff.uem.losses import UAL
        from fastdiff.uem.modules import HEADS

        choices = {
            "objective": OBJECTIVES,
            "target": TARGETS,
            "heads": HEADS,
            "ual": UAL,
            "mixed_precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}.")
        for name in _COUNTS:
            _check(
                type(getattr(self, name)) is int and getattr(self, name) > 0,
                f"{name} is a whole number from 1",
                self,
                name,
            )
        for name in _WEIGHTS:
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, f"{name} is a number from 0", self, name)
        _check(type(self.seed) is int and 0 <= self.seed < 2**31, "seed is a whole number from 0 to 2^31", self, "seed")
        is_threshold = 0 < self.largest_threshold <= 1
        _check(is_threshold, "largest_threshold lies in (0, 1]", self, "largest_threshold")
        is_share = self.unconditional is None or 0 <= self.unconditional <= 1
        _check(is_share, "unconditional lies in [0, 1], or is None", self, "unconditional")
        is_cap = self.snr_gamma is None or (math.isfinite(self.snr_gamma) and self.snr_gamma > 0)
        _check(is_cap, "snr_gamma is a number above 0, or None", self, "snr_gamma")
        _check(0 <= self.ema_decay < 1, "ema_decay lies in [0, 1)", self, "ema_decay")
        _check(self.warmup_steps >= 0, "warmup_steps count from 0", self, "warmup_steps")
        _check(self.samples is None or self.samples > 0, "samples is a whole number from 1, or None", self, "samples")
        self._check_together()

    def _check_together(self) -> None:
        if self.snr_gamma is not None and self.data == "self":
            raise ConfigError("snr_gamma weighs noise that is added to images, and data='self' adds none; give data.")
        if self.target == "truth" and self.data == "self":
            raise ConfigError(
                "target='truth' needs images to know it; data='self' has the denoiser's own predictions. Give data or "
                "leave target='full'."
            )
        if self.objective == "ase" and not self.train_backbone:
            raise ConfigError("objective='ase' fine-tunes the denoiser; give train_backbone=True (--train-backbone).")
        if self.objective == "heads" and (self.train_backbone or self.heads != "per_exit"):
            raise ConfigError(
                "objective='heads' trains heads='per_exit' for a denoiser that stays as it is; got "
                f"heads={self.heads!r}, train_backbone={self.train_backbone}."
            )
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError(
                f"A batch of {self.batch_size} does not divide into {self.gradient_accumulation} parts of one size."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-compatible."""
        return asdict(self)

    def decides(self) -> dict[str, Any]:
        """The fields that the result depends on."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NO_RESULT}

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rates are multiplied by in step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _check(is_allowed: bool, rule: str, config: TrainConfig, name: str) -> None:
    if not is_allowed:
        raise ConfigError(f"{rule}; got {getattr(config, name)!r}.")
