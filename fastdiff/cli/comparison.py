"""The demo's measurement: every contender samples the same images, in turns, and is timed and judged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from fastdiff.cli.contenders import FINETUNED_FULL, FULL, PLAIN, Contender, contenders
from fastdiff.cli.sampler import Ran, Sampler, load_reader
from fastdiff.cli.tasks import Task
from fastdiff.errors import ConfigError
from fastdiff.eval import Ratio, paired_ratio, psnr, time_interleaved
from fastdiff.eval.glyphs import GlyphJudge, Score

SINGLE_ROUNDS = 5
"""Timed rounds of one image at a time."""

SAMPLING = 0.85
"""Share of the whole work, for the progress bar."""


class Progress:
    """One progress bar with the time left, over work that adds up to 1.

    Args:
        disable: show nothing.
    """

    def __init__(self, *, disable: bool = False) -> None:
        layout = "{percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left  {desc}"
        # No smoothing: contenders differ in speed, so that the latest one says little about those to come.
        self._bar = tqdm(total=1.0, bar_format=layout, smoothing=0, disable=disable)

    def says(self, what: str) -> None:
        """Name what is being done."""
        self._bar.set_description_str(what)

    def advance(self, share: float) -> None:
        """Some share of the work is done."""
        self._bar.update(min(share, 1.0 - self._bar.n))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the demo measures.

    Args:
        model: pipeline that samples glyphs.
        finetuned: copy of it fine-tuned under the schedule ``"ase-demo"``, or None to leave its rows out.
        reader: folder of the `GlyphReader` that judges.
        samples: images of each contender; whole batches are sampled.
        batch: images in one call.
        steps: inference steps of full sampling.
        guidance_scale: classifier-free guidance.
        seed: image i starts from the noise of ``seed + i``.
        renders: held-out renders that the distance is measured to.
        device: where to sample.
        dtype: name of the weights' dtype.
    """

    model: str
    finetuned: str | None
    reader: str
    samples: int
    batch: int
    steps: int
    guidance_scale: float
    seed: int
    renders: int
    device: str
    dtype: str

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("batch", 1), ("steps", 2), ("renders", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is at least {least}; got {getattr(self, name)}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1):
            raise ConfigError(f"--guidance-scale is a number of at least 1; got {self.guidance_scale}.")

    @property
    def rounds(self) -> int:
        """Batches of each contender."""
        return math.ceil(self.samples / self.batch)

    @property
    def count(self) -> int:
        """Images of each contender: the samples asked for, rounded up to whole batches."""
        return self.rounds * self.batch


@dataclass
class Row:
    """What was found out about one contender.

    Args:
        contender: which one.
        images: uint8 of shape ``(samples, 32, 32, 3)``.
        seconds: wall-clock of each batch.
        single_seconds: wall-clock of each call for one image.
        ran: what its calls ran, and what that costs.
        macs_share: of what full sampling spends on an image.
        score: the judge's.
        psnr: to the baseline's images, in dB; infinite for the baseline itself.
        speedup: over the baseline, in batches.
        single_speedup: over the baseline, one image at a time.
        beaten_by: keys of plain rows with fewer steps that are at least as fast and as good.
    """

    contender: Contender
    images: np.ndarray
    seconds: list[float]
    single_seconds: list[float]
    ran: Ran
    macs_share: float
    score: Score
    psnr: float
    speedup: Ratio
    single_speedup: Ratio
    beaten_by: list[str] = field(default_factory=list)

    @property
    def is_baseline(self) -> bool:
        """Whether other rows are compared with this one, and this one with itself."""
        return self.contender.key == self.contender.baseline


@dataclass
class Comparison:
    """Everything that the demo measured.

    Args:
        settings: what was measured.
        task: what was asked of the images.
        rows: one for each contender, in the report's order.
        renders: score of held-out renders: what perfect samples of the same number would get.
        same_work: times of full depth on both sets of weights against each other. They do the same work, so that this
            is 1 up to the measurement's noise; None without the fine-tuned copy.
        sampling_seconds: wall-clock of all sampling.
    """

    settings: Settings
    task: Task
    rows: list[Row]
    renders: Score
    same_work: Ratio | None
    sampling_seconds: float

    def row(self, key: str) -> Row:
        """The row of a contender."""
        return next(row for row in self.rows if row.contender.key == key)


def compare(settings: Settings, progress: Progress | None = None) -> Comparison:
    """Sample, time and judge all contenders.

    Args:
        settings: what to measure.
        progress: told how far the work is.

    Raises:
        FastDiffError: if a model cannot be loaded or used.
    """
    progress = progress or Progress(disable=True)
    progress.says("loading")
    sampler = Sampler(settings)
    field_ = contenders(settings.steps, finetuned=settings.finetuned is not None, unet=sampler.has_unet)
    judge = GlyphJudge(load_reader(settings), settings.renders, subset=sampler.task.subset)
    progress.advance(0.05)

    started = time.perf_counter()
    run = _Run(settings, sampler, {contender.key: contender for contender in field_}, progress)
    single = run.time(rounds=SINGLE_ROUNDS, batch=1)
    batched = run.time(rounds=settings.rounds, batch=settings.batch, keep=True)
    sampling_seconds = time.perf_counter() - started

    progress.says("judging")
    rows = []
    for contender in field_:
        rows.append(_row(contender, run, single, batched, judge, sampler.task))
        progress.advance(0.05 / len(field_))
    mark_beaten(rows)
    same_work = paired_ratio(batched[FULL], batched[FINETUNED_FULL]) if FINETUNED_FULL in batched else None
    renders = judge.score_renders(settings.count, sampler.task.questions)
    return Comparison(settings, sampler.task, rows, renders, same_work, sampling_seconds)


def mark_beaten(rows: Iterable[Row]) -> None:
    """Note for every accelerated row the plain rows with fewer steps that are at least as fast and as good."""
    rows = list(rows)
    plain = [row for row in rows if not row.contender.methods and row.contender.key.startswith(PLAIN)]
    for row in rows:
        if row.contender.methods:
            row.beaten_by = [
                other.contender.key
                for other in plain
                if other.speedup.median >= row.speedup.median
                and other.score.fid <= row.score.fid
                and other.score.correct >= row.score.correct
            ]


class _Run:
    """The contenders at work: collects images, and after each one's first batch what it ran."""

    def __init__(self, settings: Settings, sampler: Sampler, field_: dict[str, Contender], progress: Progress) -> None:
        self._settings = settings
        self._sampler = sampler
        self._field = field_
        self._progress = progress
        self._shares = {key: sampler.planned_share(contender) for key, contender in field_.items()}
        self.images: dict[str, list[np.ndarray]] = {key: [] for key in field_}
        self.ran: dict[str, Ran] = {}

    def time(self, *, rounds: int, batch: int, keep: bool = False) -> dict[str, list[float]]:
        """Let all contenders take turns at sampling; returns seconds by contender.

        Args:
            rounds: turns of each, after one to warm up where images are not kept.
            batch: images in each turn.
            keep: whether the images count.
        """
        warm_up = 0 if keep else 1

        def before(key: str) -> None:
            plural = "s" if batch > 1 else ""
            self._progress.says(f"{self._field[key].label}, {batch} image{plural} at a time")
            self._sampler.prepare(self._field[key])

        def after(key: str) -> None:
            if keep and key not in self.ran:
                self.ran[key] = self._sampler.look(self._field[key])
            self._progress.advance(SAMPLING * self._cost(batch) * self._shares[key] / self._work)

        calls = {key: self._call(contender, batch, keep) for key, contender in self._field.items()}
        return time_interleaved(
            calls, rounds, warm_up=warm_up, device=self._settings.device, before_each=before, after_each=after
        )

    @property
    def _work(self) -> float:
        """Cost of all sampling."""
        turns = (SINGLE_ROUNDS + 1) * self._cost(1) + self._settings.rounds * self._cost(self._settings.batch)
        return turns * sum(self._shares.values())

    @staticmethod
    def _cost(batch: int) -> float:
        """Cost of a call, roughly: what it costs beside its images is worth a few of them."""
        return 3 + batch

    def _call(self, contender: Contender, batch: int, keep: bool) -> Callable[[int], None]:
        def call(index: int) -> None:
            start = max(index, 0) * batch
            images = self._sampler.sample(contender, range(start, start + batch))
            if keep:
                self.images[contender.key].append(images)

        return call


def _row(
    contender: Contender,
    run: _Run,
    single: dict[str, list[float]],
    batched: dict[str, list[float]],
    judge: GlyphJudge,
    task: Task,
) -> Row:
    key, baseline = contender.key, contender.baseline
    images, reference = np.concatenate(run.images[key]), np.concatenate(run.images[baseline])
    return Row(
        contender=contender,
        images=images,
        seconds=batched[key],
        single_seconds=single[key],
        ran=run.ran[key],
        macs_share=run.ran[key].macs / run.ran[baseline].macs,
        score=judge.score(images, task.asked),
        psnr=psnr(images / 255, reference / 255),
        speedup=paired_ratio(batched[baseline], batched[key]),
        single_speedup=paired_ratio(single[baseline], single[key]),
    )
