"""A resumable comparison of ways of sampling: all are timed against full sampling, then sample and are judged.

Whatever is finished is on disk, see `fastdiff.eval.store`. The same command after an interruption goes on where it
stopped; another one with more ways, more images or another judge makes what is missing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from fastdiff.errors import ConfigError, FastDiffError, FastDiffNoEffectWarning
from fastdiff.eval.fingerprint import describe_pipeline, describe_place
from fastdiff.eval.processes import Processes
from fastdiff.eval.provenance import describe_environment
from fastdiff.eval.sampling import BadImageError, Samples, batches, call, sample_applied
from fastdiff.eval.speed import Turn, is_out_of_memory, paired_ratio, saturating_batch, take_turn, timed_rounds
from fastdiff.eval.store import Store, StoreError
from fastdiff.eval.ways import MAIN, Way, merge, plain
from fastdiff.eval.work import Work, counted_macs, denoisers_of, recorded_work

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.eval.tasks import Task

Judge = Callable[[Samples, Samples], Mapping[str, Any]]
"""Says how good samples are, JSON-compatible; the second ones are full sampling's, of the same seeds and weights."""

MATCHES = "matches"
"""Fact: for every accelerated way, the number of plain steps that takes the same time."""

BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left{postfix}"


class SweepError(FastDiffError, RuntimeError):
    """A sweep in which something went wrong that the rest of it did not need; everything else is finished."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to sample and to time.

    Args:
        num_inference_steps: of full sampling.
        num_samples: images of each way.
        batch_size: images in one call.
        rounds: timed turns of each way, at one image and at a batch each; 0 for no timing.
        timing_batch: images in a timed batch; None for the one that saturates the device.
        matches: whether plain sampling that takes as long as each accelerated way is compared too; needs timing.

    Raises:
        ConfigError: for numbers that are too small.
    """

    num_inference_steps: int
    num_samples: int
    batch_size: int
    rounds: int = 7
    timing_batch: int | None = None
    matches: bool = True

    def __post_init__(self) -> None:
        for name, least in (("num_inference_steps", 1), ("num_samples", 1), ("batch_size", 1), ("rounds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is at least {least}; got {getattr(self, name)}.")
        if self.timing_batch is not None and self.timing_batch < 1:
            raise ConfigError(f"timing_batch is at least 1, or None; got {self.timing_batch}.")


class Sweep:
    """A comparison of ways of sampling.

    Args:
        pipes: the pipeline, or several by the names that ways have in ``model``. Their scheduler is part of the
            settings; switch off their progress bars.
        ways: what to compare; full sampling is always among them.
        task: what is asked of the images.
        judge: says how good they are.
        folder: where everything is kept.
        settings: how much to sample and to time.
        judged: tells one judge from others, JSON-compatible (metrics, feature network, reference); where it differs
            from that of an earlier run, images are judged again.
        processes: those that share the work.
        progress: whether to show progress bars.

    Raises:
        ConfigError: if a way is for a pipeline that is not there.
    """

    def __init__(
        self,
        pipes: DiffusionPipeline | Mapping[str, DiffusionPipeline],
        ways: Sequence[Way],
        task: Task,
        judge: Judge,
        folder: str | os.PathLike[str],
        settings: Settings,
        *,
        judged: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
        progress: bool = True,
    ) -> None:
        self._pipes = pipes if isinstance(pipes, Mapping) else {MAIN: pipes}
        self._task = task
        self._judge = judge
        self._settings = settings
        self._judged = {"samples": settings.num_samples, **(judged or {})}
        self._processes = processes or Processes(cpu=self._device.type == "cpu")
        self._progress = progress and self._processes.is_main
        if unknown := {way.model for way in ways} - set(self._pipes):
            raise ConfigError(f"There are ways for the pipelines {sorted(unknown)}; there is {sorted(self._pipes)}.")
        full = settings.num_inference_steps
        baselines = [way.baseline(full) for way in ways] or [plain(full, is_baseline=True)]
        self._ways = merge([*baselines, *ways])
        self._baselines = merge(baselines)
        self._baseline_keys = {way.key for way in self._baselines}
        self._full = full
        self._prepared: dict[str, Way] = {}
        self._failed: set[str] = set()
        self.store = Store(folder)

    def run(self) -> Store:
        """Do what is not done yet.

        Returns:
            What is on disk.

        Raises:
            ConfigError: if the folder holds results with other settings.
            StoreError: if it cannot be written to.
            BadImageError: if full sampling makes images that are none.
            SweepError: if another way does, when everything else is finished.
        """
        self._processes.on_main(self._open)
        ways = self._ways
        if self._settings.rounds:
            self._processes.on_main(lambda: self._time_all(ways))
            if self._settings.matches:
                found = self._processes.on_main(lambda: self._find_matches(ways))
                ways = merge([*ways, *(plain(steps, model=model) for model, steps in found)])
                self._processes.on_main(lambda: self._time_all(ways))
        self._processes.on_main(lambda: self._add(ways))
        self._sample_all(ways)
        self._raise_bad_images(ways)
        return self.store

    def _add(self, ways: Sequence[Way]) -> None:
        for way in ways:
            self.store.add(way)

    def _open(self) -> None:
        settings = self._settings
        self.store.open(
            {
                "num_inference_steps": settings.num_inference_steps,
                "batch_size": settings.batch_size,
                "task": self._task.describe(),
                "models": {name: describe_pipeline(pipe) for name, pipe in self._pipes.items()},
                "place": describe_place(self._device),
            }
        )

    @property
    def _device(self) -> torch.device:
        return torch.device(next(iter(self._pipes.values())).device)

    def _bar(self, what: str, total: float) -> tqdm:
        # No smoothing: ways differ in speed, so that the latest one says little about those to come.
        return tqdm(total=total, desc=what, bar_format=BAR, smoothing=0, disable=not self._progress)

    # -- ways that cannot be sampled -----------------------------------------------------------------------------------

    @contextmanager
    def _excused(self, way: Way) -> Iterator[dict[str, str]]:
        """Within the block, an error that only concerns this way is noted in what is yielded."""
        error: dict[str, str] = {}
        try:
            yield error
        except Exception as raised:
            if isinstance(raised, StoreError) or way.key in self._baseline_keys:
                raise
            # What other packages raise may be anything; fastdiff's own is a reason, or a fault of its own.
            if not (isinstance(raised, FastDiffError) or way.peer is not None or is_out_of_memory(raised)):
                raise
            error.update(kind=type(raised).__name__, message=str(raised))

    def _ready(self, way: Way) -> Way:
        """A way with what its peer measures on the pipeline first."""
        if way.key not in self._prepared:
            ready = way
            if way.peer is not None:
                steps = way.num_inference_steps
                once = partial(call, self._pipes[way.model], plain(steps, model=way.model), self._task, range(1))
                ready = replace(way, peer=way.peer.prepared(self._pipes[way.model], steps, once))
            self._prepared[way.key] = ready
        return self._prepared[way.key]

    # -- timing --------------------------------------------------------------------------------------------------------

    def _time_all(self, ways: Sequence[Way]) -> None:
        """Time what was not timed often enough, one image at a time and in batches."""
        for batch in sorted({1, self._timing_batch()}):
            self._time(ways, batch)

    def _timing_batch(self) -> int:
        """Images in a timed batch."""
        if self._settings.timing_batch is not None:
            return self._settings.timing_batch
        batch = self.store.fact("saturating_batch")
        if batch is None:
            way = self._baselines[0]
            pipe = self._pipes[way.model]
            batch = saturating_batch(lambda size: call(pipe, way, self._task, range(size)), device=self._device)
            self.store.add_fact("saturating_batch", batch)
        return int(batch)

    def _time(self, ways: Sequence[Way], batch: int) -> None:
        """Time ways in rounds, each of which holds full sampling too and is kept when it ends."""
        if not (missing := self._missing_rounds(ways, batch)):
            return
        able = [way for way in ways if way.key in missing]
        members = merge([*(way.baseline(self._full) for way in able), *able])
        with self._bar(f"timing {batch} at a time", len(members)) as bar, _heard():
            able = [way for way in members if self._warms_up(way, batch, bar)]
            bar.reset(sum(missing.get(way.key, 0) for way in able))
            while missing := self._missing_rounds(able, batch):
                timed = [way for way in able if way.key in missing]
                members = merge([*(way.baseline(self._full) for way in timed), *timed])
                for turns in self._rounds(members, min(missing.values()), batch):
                    self.store.add_round(batch, turns, describe_environment(self._device))
                    bar.update(len(timed))

    def _missing_rounds(self, ways: Sequence[Way], batch: int) -> dict[str, int]:
        """How often ways are still to be timed, for those that are."""
        rounds = self.store.rounds(batch)
        done = {way.key: len(paired_seconds(rounds, way.key, way.baseline(self._full).key)[0]) for way in ways}
        return {key: self._settings.rounds - count for key, count in done.items() if count < self._settings.rounds}

    def _warms_up(self, way: Way, batch: int, bar: tqdm) -> bool:
        """Make one call that is not timed; whether the way can be sampled."""
        if way.key in self._failed:
            return False
        bar.set_postfix_str(way.label)
        with self._excused(way) as error:
            pipe, ready = self._pipes[way.model], self._ready(way)
            with ready.applied(pipe):
                take_turn(partial(call, pipe, ready, self._task, range(batch)), self._device, denoisers_of(pipe))
        self.store.set_error(way.key, error or None)
        bar.update()
        if error:
            self._failed.add(way.key)
        return not error

    def _rounds(self, ways: Sequence[Way], rounds: int, batch: int) -> Iterator[dict[str, Turn]]:
        field = {way.key: self._ready(way) for way in ways}

        def sampling(way: Way) -> Callable[[int], Any]:
            pipe = self._pipes[way.model]
            return lambda index: call(pipe, way, self._task, range(index * batch, (index + 1) * batch))

        return timed_rounds(
            {key: sampling(way) for key, way in field.items()},
            rounds,
            first=len(self.store.rounds(batch)),
            device=self._device,
            denoisers=lambda key: denoisers_of(self._pipes[field[key].model]),
            around=lambda key: field[key].applied(self._pipes[field[key].model]),
        )

    def _find_matches(self, ways: Sequence[Way]) -> list[tuple[str, int]]:
        """The plain ways that take as long as an accelerated one, by pipeline and steps; once found, they stay."""
        found = dict(self.store.fact(MATCHES) or {})
        rounds = self.store.rounds(self._timing_batch())
        shares = {}
        for way in ways:
            own, full = paired_seconds(rounds, way.key, way.baseline(self._full).key)
            if own:
                shares[way.key] = 1 / paired_ratio(full, own).median
        for way in ways:
            if not way.is_plain and way.key in shares and way.key not in found:
                plainly = [other for other in ways if other.is_plain and other.model == way.model]
                timed = {other.num_inference_steps: shares[other.key] for other in plainly if other.key in shares}
                found[way.key] = steps_in_time(shares[way.key], timed)
        self.store.add_fact(MATCHES, found)
        return sorted({(way.model, found[way.key]) for way in ways if way.key in found})

    # -- sampling ------------------------------------------------------------------------------------------------------

    def _sample_all(self, ways: Sequence[Way]) -> None:
        """Sample and judge what was not yet; full sampling's images are looked at again, as others need them."""
        needed = self._baseline_keys
        todo = [way for way in ways if way.key in needed or self.store.quality(way.key, self._judged) is None]
        numbered = list(enumerate(batches(self._settings.num_samples, self._settings.batch_size)))
        part = self._processes.share(numbered)
        costs = self._expected(todo)
        with self._bar("sampling", len(part) * sum(costs.values())) as bar:
            for way in todo:
                bar.set_postfix_str(way.label)
                step = partial(bar.update, costs[way.key])
                errors = self._processes.together(partial(self._sample, way, part, step))
                self._processes.on_main(partial(self._finish, way, next(filter(None, errors), None)))

    def _expected(self, ways: Sequence[Way]) -> dict[str, int]:
        """What a batch of each way costs, roughly, in full sampling's steps: as timed, as far as that was done."""
        rounds = self.store.rounds(max(self.store.timed_batches, default=1))
        pairs = {way.key: paired_seconds(rounds, way.key, way.baseline(self._full).key) for way in ways}
        timed = {key: self._full / paired_ratio(full, own).median for key, (own, full) in pairs.items() if own}
        # Whole numbers, which add up to the bar's total.
        return {way.key: max(1, round(timed.get(way.key, way.num_inference_steps))) for way in ways}

    def _sample(self, way: Way, part: Sequence[tuple[int, range]], after_each: Callable[[], Any]) -> dict[str, str]:
        """Make this process's batches of a way; returns the error for which that cannot be done."""
        with self._excused(way) as error:
            for number, indices in part:
                if not self.store.has_batch(way.key, number):
                    self._make_batch(way, number, indices)
                after_each()
        return error

    def _make_batch(self, way: Way, number: int, indices: range) -> None:
        pipe, ready = self._pipes[way.model], self._ready(way)
        with _heard() as notes, ready.applied(pipe):
            samples = sample_applied(pipe, ready, self._task, indices)
            work = recorded_work(pipe, len(indices))
            if ready.peer is not None and ready.peer.engaged(pipe) is False:
                notes.append(f"{ready.peer.name} left nothing out.")
        if number == 0:
            if not way.methods:
                work = Work(self._count_macs(ready, indices))
            self.store.set_notes(way.key, notes)
        self.store.add_batch(way.key, number, samples, work)

    def _count_macs(self, way: Way, indices: range) -> float | None:
        """MACs for one image, counted in a call of its own: counting is slow and might change what is computed."""
        pipe = self._pipes[way.model]
        chosen = indices[:1] if way.is_plain else indices
        with way.applied(pipe):
            macs = counted_macs(pipe, lambda: call(pipe, way, self._task, chosen))
        return macs / len(chosen) or None

    def _finish(self, way: Way, error: Mapping[str, str] | None) -> None:
        """Judge a way's images, or keep why there are none."""
        self.store.set_error(way.key, error)
        if error is not None or self.store.quality(way.key, self._judged) is not None:
            return
        size = self._settings.num_samples, self._settings.batch_size
        samples = self.store.samples(way.key, *size)
        full = self.store.samples(way.baseline(self._full).key, *size)
        if not way.is_plain and np.array_equal(samples.images, full.images):
            told = "Its images are full sampling's: it changed nothing."
            self.store.set_notes(way.key, [*dict.fromkeys([*self.store.notes(way.key), told])])
        self.store.set_quality(way.key, self._judged, self._judge(samples, full))

    def _raise_bad_images(self, ways: Sequence[Way]) -> None:
        errors = [error for way in ways if (error := self.store.error(way.key)) is not None]
        bad = [error["message"] for error in errors if error["kind"] == BadImageError.__name__]
        if bad:
            raise SweepError(
                f"{len(bad)} of {len(ways)} ways made images that are none; the others are finished. {bad[0]}"
            )


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Within the block, warnings that a method had no effect are noted instead of shown."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FastDiffNoEffectWarning)
        yield notes
    for warning in caught:
        if issubclass(warning.category, FastDiffNoEffectWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def paired_seconds(rounds: Sequence[Mapping[str, Turn]], key: str, baseline: str) -> tuple[list[float], list[float]]:
    """A way's seconds and its baseline's, of the rounds that hold both."""
    both = [turns for turns in rounds if key in turns and baseline in turns]
    return [turns[key].seconds for turns in both], [turns[baseline].seconds for turns in both]


def steps_in_time(share: float, plain_shares: Mapping[int, float]) -> int:
    """The number of plain steps that takes some share of full sampling's time.

    Between the timed numbers of steps, time is taken to be linear in them.

    Args:
        share: of full sampling's time.
        plain_shares: shares of the timed numbers of steps, among them full sampling's, the largest.
    """
    shares, steps = zip((0.0, 0), *sorted((taken, count) for count, taken in plain_shares.items()), strict=True)
    return min(max(plain_shares), max(1, round(float(np.interp(share, shares, steps)))))
