"""Encoder propagation: the encoder runs at key evaluations only, and its features serve the decoder until the next key.

Faster Diffusion (arXiv 2312.09608, section 3). The decoder then reads nothing of the current latents, so that all
evaluations up to the next key can be decoded as one batch, with the same result (section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fastdiff.errors import ConfigError
from fastdiff.methods.base import Method, PlanRequest, check_flag, check_number, inheriting
from fastdiff.plan import ComputePlan

if TYPE_CHECKING:
    from fastdiff.backbones import Backbone

_LDM_RUNS = ((0, 6), (95, 100), (145, 150), (170, 175), (195, 200), (222, 225), (247, 250))
_LDM_SINGLE = (10, 15, 25, 35, 55, 75, 85, 110, 125, 135, 140, 155, 160, 185, 210, 235)
_LDM_KEYS = tuple(sorted({*_LDM_SINGLE, *(key for start, stop in _LDM_RUNS for key in range(start, stop))}))

KEY_SETS: dict[str, tuple[int, tuple[int, ...]]] = {
    "nonuniform-50": (50, (0, 1, 2, 3, 5, 10, 15, 25, 35)),
    "nonuniform-50-II": (50, (0, 10, 11, 12, 15, 20, 25, 30, 35, 45)),
    "nonuniform-50-III": (50, (0, 20, 25, 30, 35, 45, 46, 47, 48, 49)),
    "nonuniform-50-IV": (50, (0, 9, 13, 14, 15, 28, 29, 32, 36, 45)),
    "pro": (75, (0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65)),
    "if-100": (100, tuple(index for index in range(100) if index < 10 or index > 85 or index % 5 == 0)),
    "if-75": (75, tuple(index for index in range(75) if index < 10 or index > 65 or index % 5 == 0)),
    "if-75-II": (75, (0, 1, 2, 3, 5, 10, 15, 25, 35, 45, 55, 65)),
    "if-super-resolution": (50, (*range(20), *range(20, 41, 2), *range(41, 50))),
    "ldm-250": (250, _LDM_KEYS),
}
"""Key evaluations by name, with the number of evaluations they were published for."""

LATENT_CHANNELS = 4
"""Output channels by which a UNet of the latent space is told; the published noise is for these."""

PRIOR_NOISE = 0.003

Keys = str | int | Sequence[int] | Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class EncoderPropagation(Method):
    """Run the encoder at key evaluations only; decode all evaluations up to the next key from its features.

    What is kept is everything the decoder reads: the bottleneck and all long skips, with what ControlNets and T2I-
    Adapters add to them. A ControlNet runs at key evaluations only. On a transformer the first blocks are the encoder.

    Args:
        keys: a name in `KEY_SETS`, rescaled to the call's number of evaluations; ``"uniform-5"`` or 5 for every fifth;
            a list of evaluation indices with 0 among them; or a function from the number of evaluations to such a list.
        parallel: decode the evaluations up to the next key as one batch. The result is the same; the device is used
            better where one evaluation does not fill it. Evaluation 0 is always decoded by itself.
        max_parallel: evaluations in such a batch, at most; by default as many as half of the free memory allows.
        prior_noise: how much of the initial latents is added at each of the last evaluations; None for 0.003 on UNets
            of four latent channels and none elsewhere.
        tau: share of the evaluations, counted from the end, before which it is added.
        inject: ``"before"`` the encoder reads the latents, as the paper has it; ``"official-parallel"``: afterwards,
            as the published parallel code does.
        official_truncate: cut a named set to the call's length in place of rescaling it, as the published code does.
        encoder_share: for transformers, the share of the blocks that count as encoder (18 of 28 as published).
        order: degree of the polynomial through the last keys that features are forecast with, 0 (propagate, as
            published) to 3. Not in the paper.

    Raises:
        ConfigError: for a value out of range; when the plan is made, for keys that do not fit the call, or a model
            that has no encoder to be told from its decoder.
    """

    keys: Any = "nonuniform-50"
    parallel: bool = True
    max_parallel: int | None = None
    prior_noise: float | None = None
    tau: float = 0.5
    inject: str = "before"
    official_truncate: bool = False
    encoder_share: float = 18 / 28
    order: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "parallel")
        check_flag(self, "official_truncate")
        check_number(self, "tau", 0, 1)
        check_number(self, "order", 0, 3, whole=True)
        check_number(self, "encoder_share", 0, 1)
        if self.max_parallel is not None:
            check_number(self, "max_parallel", 1, 10_000, whole=True)
        if self.prior_noise is not None:
            check_number(self, "prior_noise", 0, 1)
        if self.inject not in ("before", "official-parallel"):
            raise ConfigError(f"EncoderPropagation.inject is 'before' or 'official-parallel'; got {self.inject!r}.")
        self._check_keys()

    def _check_keys(self) -> None:
        if isinstance(self.keys, str):
            if self.keys not in KEY_SETS and _interval(self.keys) is None:
                names = ", ".join(KEY_SETS)
                raise ConfigError(f"EncoderPropagation.keys has no set {self.keys!r}; there are uniform-M, {names}.")
        elif isinstance(self.keys, int) and not isinstance(self.keys, bool):
            check_number(self, "keys", 1, 10_000)
        elif isinstance(self.keys, tuple):
            _check_indices(self.keys)
        elif not callable(self.keys):
            raise ConfigError(f"EncoderPropagation.keys is a name, a number, a list or a function; got {self.keys!r}.")

    accelerates_control: ClassVar[bool] = True

    @property
    def is_neutral(self) -> bool:
        """Whether every evaluation is a key."""
        return _interval(self.keys) == 1

    def key_evaluations(self, evaluations: int) -> tuple[int, ...]:
        """The key evaluations of a call with this many, in order.

        Raises:
            ConfigError: if a list or function names evaluations that the call does not make, or leaves out the first.
        """
        interval = _interval(self.keys)
        if interval is not None:
            return tuple(range(0, evaluations, interval))
        if isinstance(self.keys, str):
            steps, keys = KEY_SETS[self.keys]
            scaled = keys if self.official_truncate else (round(key * evaluations / steps) for key in keys)
            return tuple(sorted({key for key in scaled if key < evaluations}))
        keys = tuple(self.keys(evaluations)) if callable(self.keys) else self.keys
        _check_indices(keys)
        if beyond := [key for key in keys if key >= evaluations]:
            raise ConfigError(
                f"EncoderPropagation.keys names evaluation {beyond[0]}, but this call makes {evaluations}, 0 to "
                f"{evaluations - 1}. Give a named set or a function to fit any number of steps."
            )
        return tuple(sorted({int(key) for key in keys}))

    def _is_key(self, evaluations: int) -> np.ndarray:
        return np.isin(np.arange(evaluations), self.key_evaluations(evaluations))

    def plan(self, request: PlanRequest) -> ComputePlan:
        """The encoder is computed in the rows of key evaluations and reused in all others."""
        plan = request.full_plan(self)
        if isinstance(self.keys, tuple) and request.grid.order > 1:
            raise ConfigError(
                f"EncoderPropagation.keys counts evaluations, of which this scheduler makes {plan.evaluations} where "
                "others make half as many: a list for one does not fit the other. Give a named set, a number, or a "
                "function from the number of evaluations to the keys."
            )
        reused, replaced = self._encoded_units(request.backbone)
        table = inheriting(plan, np.isin(plan.units, reused), self._is_key(plan.evaluations), self.order)
        # What a ControlNet made at a key is held by the denoiser that it is for; nothing of it is left to decode.
        how: dict[str, Any] = {"parallel": self.parallel and not request.backbone.is_control, "replaced": replaced}
        if self.order:
            how["forecast_order"] = self.order
        if self.max_parallel is not None:
            how["max_parallel"] = self.max_parallel
        return ComputePlan(table, plan.units, {**plan.meta, **how})

    def _encoded_units(self, backbone: Backbone) -> tuple[list[str], list[str]]:
        """The units whose outputs are reused, and those of them that would be reused by their residuals otherwise."""
        if backbone.is_control:
            return [trait.name for trait in backbone.traits if trait.is_output], []
        if backbone.encoded:
            return list(backbone.encoded), []
        blocks = round(self.encoder_share * len(backbone.units))
        if backbone.level != "layer" or backbone.skip_sites or not 0 < blocks < len(backbone.units):
            raise ConfigError(
                f"EncoderPropagation cannot tell an encoder from a decoder in this {backbone.class_name} of "
                f"{len(backbone.units)} units: it needs a UNet seen by layers, or a transformer without long skips of "
                "which encoder_share leaves blocks on both sides."
            )
        last = backbone.names[blocks - 1]
        return [last], [last]

    def latent_edit(self, backbone: Backbone) -> PriorNoise | None:
        """The prior noise for this model, if any."""
        strength = self.prior_noise
        if strength is None:
            config = getattr(backbone.denoiser, "config", {})
            is_latent = bool(backbone.encoded) and config.get("out_channels") == LATENT_CHANNELS
            strength = PRIOR_NOISE if is_latent else 0.0
        return PriorNoise(strength, self.tau, self.inject == "before") if strength and self.tau else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-compatible form that `from_dict` reads.

        Raises:
            ConfigError: if the keys are a function, which JSON cannot hold.
        """
        if callable(self.keys):
            raise ConfigError("EncoderPropagation.keys is a function, which cannot be saved; give the list it makes.")
        return super().to_dict()


class PriorNoise:
    """Adds a little of the initial latents before each of the last evaluations (Faster Diffusion, section 3.4).

    Args:
        strength: how much.
        tau: share of the evaluations before which it is added, counted from the end.
        before_encoding: whether the encoder of the same evaluation sees it.
    """

    def __init__(self, strength: float, tau: float, before_encoding: bool) -> None:
        self._strength = strength
        self._tau = tau
        self._before_encoding = before_encoding
        self._initial: torch.Tensor | None = None

    def before_step(self, row: int, rows: int, sample: torch.Tensor) -> torch.Tensor:
        """Keep the initial latents; add to them here if the encoder is not to see it."""
        if row == 0:
            self._initial = sample.detach().clone()
        return sample if self._before_encoding else self._added(row, rows, sample)

    def after_step(self, row: int, rows: int, sample: torch.Tensor) -> torch.Tensor:
        """Add to what the next evaluation starts from."""
        return self._added(row + 1, rows, sample) if self._before_encoding and row + 1 < rows else sample

    def _added(self, row: int, rows: int, sample: torch.Tensor) -> torch.Tensor:
        if self._initial is None or row < round(rows * (1 - self._tau)) or self._initial.shape != sample.shape:
            return sample
        return sample + self._strength * self._initial.to(sample.device, sample.dtype)


def _interval(keys: Any) -> int | None:
    """The M of ``M`` or ``"uniform-M"``."""
    if isinstance(keys, int):
        return keys
    name, _, number = keys.rpartition("-") if isinstance(keys, str) else ("", "", "")
    return int(number) if name == "uniform" and number.isdecimal() and int(number) else None


def _check_indices(keys: tuple[Any, ...]) -> None:
    whole = all(isinstance(key, (int, np.integer)) and not isinstance(key, bool) and key >= 0 for key in keys)
    if not whole or 0 not in keys:
        raise ConfigError(
            f"EncoderPropagation.keys are evaluation indices from 0, and 0 is one of them, because nothing is there to "
            f"reuse before it; got {keys!r}."
        )
