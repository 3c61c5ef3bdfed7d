"""What the compatibility suite does with one pipeline, and what it finds: the tests judge it, the table shows it."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import fastdiff
from fastdiff import Action, EncoderPropagation, FastDiffNoEffectWarning, FeatureInheritance
from fastdiff.backbones import Unit, is_control, view
from fastdiff.engine import DenoiserRecord
from fastdiff.errors import FastDiffError
from fastdiff.methods import Method
from tiny import video_pipelines
from tiny.per_sample import one_sample_at_a_time
from tiny.pipeline_base import TinyPipeline
from tiny.pipelines import TINY_PIPELINES
from tiny.sampling import traces
from tiny.staged_pipelines import PRIOR_PIPELINES
from tiny.unet_pipelines import UNET_PIPELINES

TRANSFORMER_PIPELINES: dict[str, TinyPipeline] = TINY_PIPELINES | PRIOR_PIPELINES
PIPELINES: dict[str, TinyPipeline] = UNET_PIPELINES | TRANSFORMER_PIPELINES
VIDEOS = {entry.name for entry in video_pipelines.ENTRIES}
"""Pipelines in which kernels that take one sample at a time would take seconds: every pixel is a sample somewhere."""
STEPS = 6
KEYS = 3
"""Every third evaluation is a key."""
CONTROL = "controlnet"
ROUNDING = 1e-5
"""Bound on what the order of sums changes in a video, in its standard deviations; 6e-6 were measured."""

FULL = FeatureInheritance(interval=1)
LAYERS = "layer reuse"
ONE_BY_ONE, PARALLEL, DEEP = "encoder propagation", "in parallel", "deep features"
METHODS: dict[str, Method] = {
    LAYERS: FeatureInheritance(interval=KEYS, span=(1, None), last_key=False),
    ONE_BY_ONE: EncoderPropagation(keys=KEYS, parallel=False),
    PARALLEL: EncoderPropagation(keys=KEYS),
    DEEP: FeatureInheritance.deepcache(interval=KEYS, branch=0),
}
FOR_TRANSFORMERS, FOR_UNETS = (LAYERS,), (ONE_BY_ONE, PARALLEL, DEEP)


@dataclass(frozen=True)
class Reuse:
    """What one method did in a pipeline.

    Attributes:
        sample: What it sampled.
        cells: Share of the denoisers' cells that were not computed.
        runs_as_planned: Whether the forwards that really ran are those of the plan, for each call and unit; None where
            predictions made ahead turned out to be for other timesteps.
        independent: Whether a call sampled the same again after calls with other prompts, images, seeds and numbers of
            steps, and once with another batch.
        batches: Evaluations that were decoded as one batch.
        reasons: Why calls computed more than planned, or could not be batched.
    """

    sample: torch.Tensor
    cells: float
    runs_as_planned: bool | None
    independent: bool
    batches: int
    reasons: tuple[str, ...]


@dataclass
class Outcome:
    """What the suite found in one pipeline.

    Attributes:
        denoisers: Classes of what was accelerated.
        units: Units of the first of them.
        full_is_plain: Whether a plan that computes everything sampled what the plain pipeline does, bit by bit.
        plain: What the plain pipeline samples.
        reuse: What each method did, by its name here.
        restored: Whether the pipeline samples as before after `disable` and holds no hook.
        refusal: The typed error or warning that said why nothing can be accelerated; empty where something was.
    """

    plain: torch.Tensor
    denoisers: str = ""
    units: int = 0
    full_is_plain: bool = False
    reuse: dict[str, Reuse] = field(default_factory=dict)
    restored: bool = False
    refusal: str = ""

    @property
    def changed(self) -> bool:
        """Whether every method changed the sample, by more than the order of its sums can."""
        bound = 1e-3 * self.plain.std()
        return all(not torch.allclose(reuse.sample, self.plain, rtol=0, atol=bound) for reuse in self.reuse.values())

    @property
    def parallel_difference(self) -> float | None:
        """How far apart evaluations decoded as one batch and one by one came out, in standard deviations of the sample.

        None where there is no batch, or what it made was for other timesteps.
        """
        if PARALLEL not in self.reuse or not self.reuse[PARALLEL].batches or self.reuse[PARALLEL].reasons:
            return None
        difference = (self.reuse[PARALLEL].sample - self.reuse[ONE_BY_ONE].sample).abs().max()
        return float(difference / self.plain.std())


def examine(name: str) -> Outcome:
    """Samples a pipeline plain, under a full plan, with each method, and disabled again."""
    pipe = PIPELINES[name].build()
    own = type(pipe)
    outcome = Outcome(sample(pipe, name))
    before = traces_of(pipe, name)
    try:
        with refusals():
            try_full(pipe, name, outcome)
            for kind in FOR_UNETS if name in UNET_PIPELINES else FOR_TRANSFORMERS:
                exact = kind in (ONE_BY_ONE, PARALLEL) and name not in VIDEOS
                with one_sample_at_a_time() if exact else nullcontext():
                    outcome.reuse[kind] = reuse(pipe, name, kind)
    except (FastDiffError, FastDiffNoEffectWarning) as refusal:
        outcome.refusal = f"{type(refusal).__name__}: {refusal}"
    as_found = type(pipe) is own and traces_of(pipe, name) == before
    outcome.restored = as_found and torch.equal(sample(pipe, name), outcome.plain)
    return outcome


def sample(pipe: DiffusionPipeline, name: str, **arguments: Any) -> torch.Tensor:
    """Returns what one call samples."""
    return PIPELINES[name].sample(pipe, **{"steps": STEPS, **arguments})


def records_of(pipe: Any, name: str) -> dict[str, DenoiserRecord]:
    """Returns the last call's records of the pipeline's denoisers."""
    denoisers = pipe.fastdiff.last_run.denoisers
    return {key: denoisers[key] for key in PIPELINES[name].denoisers}


@contextmanager
def refusals() -> Iterator[None]:
    """Makes the warning that nothing was skipped an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastDiffNoEffectWarning)
        yield


@contextmanager
def enabled(pipe: Any, method: Method) -> Iterator[None]:
    """Accelerates a pipeline for a while."""
    fastdiff.enable(pipe, method)
    try:
        yield
    finally:
        fastdiff.disable(pipe)


def traces_of(pipe: Any, name: str) -> dict[str, list[str]]:
    """Returns what hooks left on the pipeline's denoisers; some pipelines leave something themselves."""
    return {key: traces(getattr(pipe, key)) for key in PIPELINES[name].denoisers}


def try_full(pipe: Any, name: str, outcome: Outcome) -> None:
    """Samples under a plan that computes everything."""
    with enabled(pipe, FULL):
        sampled = sample(pipe, name)
        records = records_of(pipe, name)
    followed = all(record.calls and not record.skipped for record in records.values())
    outcome.full_is_plain = followed and torch.equal(sampled, outcome.plain)
    outcome.denoisers = ", ".join(dict.fromkeys(record.class_name for record in records.values()))
    outcome.units = len(next(iter(records.values())).units)


def reuse(pipe: Any, name: str, kind: str) -> Reuse:
    """Samples with one method, on its own and, enabled anew, after calls that differ in all they can."""
    method = METHODS[kind]
    batches = (2, 1) if kind in (LAYERS, PARALLEL) and "batch" not in PIPELINES[name].ignores else (1,)
    with Executions(pipe, name) as executions, enabled(pipe, method):
        sampled = sample(pipe, name)
        runs = [executions.are_planned(key, record) for key, record in pipe.fastdiff.last_run.denoisers.items()]
        records = records_of(pipe, name).values()
    with enabled(pipe, method):
        for batch in batches:
            sample(pipe, name, seed=3, steps=STEPS - 2, batch=batch)
        again = sample(pipe, name)
    return Reuse(
        sampled,
        cells=sum(record.skipped for record in records)
        / sum(len(record.calls) * len(record.units) for record in records),
        runs_as_planned=None if None in runs else all(runs),
        independent=torch.equal(again, sampled),
        batches=sum(len(record.batches) for record in records),
        reasons=tuple(sorted({reason for record in records for reason in (record.fallbacks | record.one_by_one)})),
    )


class Executions:
    """Counts forwards of a pipeline's units from beneath whatever is put around them.

    Torch runs a module's own hooks even where acceleration answers for it, so the forward itself is counted.

    Args:
        pipe: The pipeline, not accelerated.
        name: Its name.
    """

    def __init__(self, pipe: Any, name: str) -> None:
        keys = [*PIPELINES[name].denoisers, CONTROL]
        models = {key: getattr(pipe, key) for key in keys if hasattr(pipe, key)}
        self._backbones = {key: view(model) for key, model in models.items() if key != CONTROL or is_control(model)}
        self._rows: dict[str, list[Counter[str]]] = {key: [] for key in self._backbones}
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> Executions:
        for key, backbone in self._backbones.items():
            rows = self._rows[key]
            begin = backbone.denoiser.register_forward_pre_hook(lambda *_, rows=rows: rows.append(Counter()))
            self._undo.append(begin.remove)
            for unit in backbone.units:
                self._count(unit, rows)
        return self

    def _count(self, unit: Unit, rows: list[Counter[str]]) -> None:
        forward = unit.module.forward

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            rows[-1][unit.name] += 1
            return forward(*args, **kwargs)

        unit.module.forward = counted
        self._undo.append(lambda: vars(unit.module).pop("forward"))

    def __exit__(self, *_: Any) -> None:
        for undo in self._undo:
            undo()

    def are_planned(self, key: str, record: DenoiserRecord) -> bool | None:
        """Whether the units that ran are those that the record says were computed: all at keys, some in between."""
        computed = np.array([[action == Action.COMPUTE for action in call.actions] for call in record.calls])
        keys = [(call.evaluation - record.calls[0].evaluation) % KEYS == 0 for call in record.calls]
        if not record.fallbacks and not np.array_equal(computed.all(axis=1), keys):
            return False
        ran = np.array([[row[unit] for unit in record.units] for row in self._rows[key]])
        once = ran.max(axis=0)  # a level of Stable Cascade may run several times in one forward
        if not record.batches:
            return np.array_equal(ran, computed * once)
        if record.fallbacks:
            return None
        batched = len(computed) - sum(record.batches) + len(record.batches)
        expected = np.where(computed.all(axis=0), batched, computed.sum(axis=0))
        return np.array_equal(ran.sum(axis=0), expected * once)
