"""Sampling the same images with different exits, and what is seen of it: depths, uncertainties and true errors."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

import fastdiff
from fastdiff.backbones import unwrap, view
from fastdiff.engine.record import DenoiserRecord
from fastdiff.errors import ConfigError, FastDiffError, FastDiffNoEffectWarning
from fastdiff.methods import Method
from fastdiff.methods.uncertainty_exit import UncertaintyExit
from fastdiff.uem.readout import ExitReadout

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Tell = Callable[[int], None]
"""Told how many calls of the pipeline were made."""

Z = 1.96
"""Normal quantile of a 95 % interval."""


class Task(Protocol):
    """What is asked of the images, such as `fastdiff.eval.tasks.make_task` returns."""

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        """The arguments of a pipeline's call that makes these images, each from a seed of its own."""

    def describe(self) -> dict[str, Any]:
        """What tells it from others, JSON-compatible."""


@dataclass(frozen=True, eq=False)
class Observed:
    """What some samples did.

    Args:
        images: in [0, 1], float of shape ``(samples, height, width, channels)``.
        depths: units that each sample ran, int64 of shape ``(evaluations, samples)``; evaluation 0 is the noisiest.
        price: share of a full evaluation's multiply-accumulates that each depth costs, shape ``(units + 1,)``.
        seconds: that the pipeline's calls took.
    """

    images: np.ndarray
    depths: np.ndarray
    price: np.ndarray
    seconds: float

    @property
    def shares(self) -> np.ndarray:
        """Share of the full multiply-accumulates that each sample cost, shape ``(samples,)``."""
        return self.price[self.depths].mean(0)

    @property
    def share(self) -> float:
        """Share of the full multiply-accumulates of all samples."""
        return float(self.shares.mean())

    def psnr(self, full: Observed) -> Psnr:
        """How near the images are to those of full sampling."""
        squares = np.square(np.asarray(self.images, np.float64) - full.images).reshape(len(full.images), -1).mean(1)
        error = float(squares.mean())
        if error == 0:
            return Psnr(None, None)
        relative = float(squares.std(ddof=1)) / error / np.sqrt(len(squares))
        return Psnr(float(-10 * np.log10(error)), float(Z * relative * 10 / np.log(10)))


@dataclass(frozen=True)
class Psnr:
    """Peak signal-to-noise ratio in dB, from the squared error over all pixels; None where there is no error at all.

    Args:
        value: of all images.
        margin: half the 95 % interval, from how the images' squared errors differ.
    """

    value: float | None
    margin: float | None

    def __str__(self) -> str:
        return "equal" if self.value is None else f"{self.value:.2f} ± {self.margin:.2f}"


@dataclass(frozen=True, eq=False)
class Watched:
    """What the exits found in full sampling, and how wrong their predictions would have been.

    Args:
        run: what the samples did, which is everything.
        uncertainties: as they are compared with thresholds, float64 of shape ``(evaluations, exits, samples)``.
        errors: mean absolute difference between an exit's prediction and the denoiser's, the larger of the guidance
            branches in one batch; same shape.
        columns: of the exits, the number of the first unit that would not run, ascending, shape ``(exits,)``.
        timesteps: shape ``(evaluations,)``.
        units: names of the denoiser's units.
        meta: of the full plan.
    """

    run: Observed
    uncertainties: np.ndarray
    errors: np.ndarray
    columns: np.ndarray
    timesteps: np.ndarray
    units: tuple[str, ...]
    meta: Mapping[str, Any]


class Observer:
    """Samples a task's images with different methods.

    Args:
        pipe: the pipeline; `restoring` gives back its own methods.
        task: what to ask for, and from which seeds.
        num_inference_steps: of the pipeline's calls.
        batch_size: images in one call.
        tell: told of every call.
    """

    def __init__(
        self, pipe: DiffusionPipeline, task: Task, num_inference_steps: int, batch_size: int, tell: Tell
    ) -> None:
        self._pipe = pipe
        self._task = task
        self._steps = num_inference_steps
        self._batch_size = batch_size
        self._tell = tell
        self._price: np.ndarray | None = None

    def calls(self, indices: range) -> list[range]:
        """The images of each call."""
        starts = range(indices.start, indices.stop, self._batch_size)
        return [range(start, min(start + self._batch_size, indices.stop)) for start in starts]

    def sample(self, methods: Method | Sequence[Method], indices: range) -> Observed:
        """Sample images with some methods."""
        fastdiff.enable(self._pipe, methods)
        return _joined([self._sample(batch) for batch in self.calls(indices)])

    def _sample(self, indices: range) -> Observed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastDiffNoEffectWarning)  # of a threshold that is being tried
            images = self._call(indices)
        self._tell(1)
        run = self._pipe.fastdiff.last_run
        name, record = next((name, record) for name, record in run.denoisers.items() if record.calls)
        if self._price is None:
            assert record.measure is not None
            costs = record.measure()
            outputs = view(getattr(self._pipe, name)).outputs
            macs, always = costs.macs.copy(), costs.fixed_macs + costs.macs[outputs.start :].sum()
            macs[outputs.start :] = 0
            self._price = (np.append(0, np.cumsum(macs)) + always) / costs.total_macs
        return Observed(images, _depths(record, len(indices)), self._price, run.seconds)

    def _call(self, indices: range) -> np.ndarray:
        """Call the pipeline.

        Raises:
            ConfigError: if it refuses the arguments, or makes no images.
        """
        arguments = {**self._task.arguments(indices), "num_inference_steps": self._steps, "output_type": "np"}
        device = getattr(self._pipe, "device", torch.device("cpu"))
        # Some pipelines do not hand their generators on to the scheduler, which then draws from the global one.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(indices[0])
            try:
                images: Any = getattr(self._pipe(**arguments), "images", None)
            except FastDiffError:
                raise
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{type(self._pipe).__name__} does not sample this task: {error}") from error
        made = len(images) if isinstance(images, np.ndarray) else 0
        if made != len(indices):
            raise ConfigError(
                f"Calibration compares images, one for each seed: {type(self._pipe).__name__} made {made} as arrays "
                f"where it was asked for {len(indices)}."
            )
        return images

    def watch(self, method: UncertaintyExit, indices: range) -> Watched:
        """Sample images in full, and see what every exit finds.

        Raises:
            ProfileMismatchError: if the method's modules are for another denoiser.
        """
        parts = [self._watch(method, batch) for batch in self.calls(indices)]
        first = parts[0]
        return Watched(
            _joined([part.run for part in parts]),
            np.concatenate([part.uncertainties for part in parts], 2),
            np.concatenate([part.errors for part in parts], 2),
            first.columns,
            first.timesteps,
            first.units,
            first.meta,
        )

    def _watch(self, method: UncertaintyExit, indices: range) -> Watched:
        seen: dict[tuple[int, int], torch.Tensor] = {}
        fastdiff.enable(self._pipe, method.watched(lambda row, column, found: _note(seen, row, column, found)))
        name = next(iter(self._pipe.fastdiff.to_dict()["denoisers"]))
        denoiser = unwrap(getattr(self._pipe, name))
        with _noted_calls(denoiser) as calls:
            run = self._sample(indices)
        record = self._pipe.fastdiff.last_run.denoisers[name]
        rows, columns = (sorted(set(numbers)) for numbers in zip(*seen, strict=True))
        found = np.stack([[seen[row, column].double().cpu().numpy() for column in columns] for row in rows])
        fastdiff.disable(self._pipe)
        names = [record.units[column] for column in columns]
        errors = _errors(denoiser, method, [calls[index] for index in _first_calls(record)], len(indices), names)
        plan = record.plans[-1]
        timesteps = np.array(plan.meta["timesteps"], float)[rows]
        return Watched(run, found, errors, np.array(columns), timesteps, record.units, plan.meta)


@contextmanager
def restoring(pipe: DiffusionPipeline) -> Iterator[None]:
    """After the block the pipeline is accelerated as it was before it, or not at all."""
    before = pipe.fastdiff.methods if fastdiff.is_enabled(pipe) else None
    shows = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**shows, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**shows)
        fastdiff.disable(pipe)
        if before is not None:
            fastdiff.enable(pipe, before)


def _note(seen: dict[tuple[int, int], torch.Tensor], row: int, column: int, found: torch.Tensor) -> None:
    seen.setdefault((row, column), found.clone())


def _joined(parts: Sequence[Observed]) -> Observed:
    images = np.concatenate([part.images for part in parts])
    depths = np.concatenate([part.depths for part in parts], 1)
    return Observed(images, depths, parts[0].price, sum(part.seconds for part in parts))


def _first_calls(record: DenoiserRecord) -> list[int]:
    """Numbers of the calls of each evaluation's first guidance branch, which the others follow."""
    numbers: dict[int, int] = {}
    for number, made in enumerate(record.calls):
        numbers.setdefault(made.evaluation, number)
    return list(numbers.values())


def _depths(record: DenoiserRecord, samples: int) -> np.ndarray:
    """Units that each sample ran in each evaluation, shape ``(evaluations, samples)``."""
    calls = [record.calls[number] for number in _first_calls(record)]
    return np.stack(
        [
            np.full(samples, sum(action == 0 for action in made.actions)) if made.depths is None else made.depths
            for made in calls
        ]
    )


@contextmanager
def _noted_calls(denoiser: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Within the block, the arguments of a denoiser's calls are noted by their names."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(type(denoiser).forward)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, *given = signature.bind(module, *args, **kwargs).arguments.items()
        calls.append({name: value for name, value in given if name != "return_dict"})

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def _errors(
    denoiser: nn.Module, method: UncertaintyExit, calls: Sequence[dict[str, Any]], samples: int, exits: Sequence[str]
) -> np.ndarray:
    """How wrong the exits are in some calls, shape ``(calls, exits, samples)``."""
    modules = method.modules()
    chosen = [modules.exits.index(name) for name in exits]
    errors = []
    with ExitReadout(denoiser, modules) as readout:
        for arguments in calls:
            outputs = readout(**arguments)
            error = (outputs.predictions[chosen] - outputs.full).float().abs().flatten(2).mean(2)
            errors.append(error.unflatten(1, (-1, samples)).amax(1).double().cpu().numpy())
    return np.stack(errors)
