"""One evaluation from its settings to its report: what ``fastdiff eval`` runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.errors import ConfigError
from fastdiff.eval.features import FeatureNet, load_feature_net
from fastdiff.eval.glyphs import GlyphTask, glyph_task, read_as_asked
from fastdiff.eval.judging import Judge
from fastdiff.eval.paired import load_clip, load_lpips
from fastdiff.eval.peers import Peer, default_peers, names
from fastdiff.eval.processes import Processes
from fastdiff.eval.provenance import describe_environment
from fastdiff.eval.reference import ZOO_RENDERS, load_reference
from fastdiff.eval.report import write_report
from fastdiff.eval.report.plots import chosen
from fastdiff.eval.results import Results, collect, provenance
from fastdiff.eval.store import Store
from fastdiff.eval.sweep import MATCHES, Settings, Sweep, SweepError
from fastdiff.eval.tasks import Task, make_task, read_prompts
from fastdiff.eval.ways import MAIN, Way, fewer_steps, merge, parse_ways, plain
from fastdiff.output import staged_folder
from fastdiff.pipelines.calling import call_parameters, load

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.zoo.reader import GlyphReader

STEPS, PEERS = "steps", "peers"
"""Baselines that are no specification: fewer steps, and all other packages."""
SWEEPS = "sweeps"
"""Folder of what was measured, in the folder of the report."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to compare, on which pipeline, and how it is judged.

    Args:
        model: folder, hub name or ``zoo:NAME`` of the pipeline.
        methods: specifications of fastdiff's ways, see `fastdiff.eval.ways`; ``COPY@SPEC`` samples with a copy.
        baselines: what they are compared with: ``steps:N``, ``peers`` for all other packages, one's name for the
            settings of it that are worth a comparison, or its specification. Fewer steps are always among them.
        copies: other weights for the same pipeline, by name.
        num_inference_steps: of full sampling.
        num_samples: images of each way and set of seeds.
        seeds: the first seed of each set; image i starts from the noise of seed + i.
        batch_size: images in one call.
        prompts: file with one prompt in each line.
        class_labels: for a pipeline that samples by class.
        guidance_scale: None for the pipeline's own.
        arguments: further arguments of every call.
        scheduler: class of diffusers that takes the place of the pipeline's.
        reference: what samples are held against, see `fastdiff.eval.reference.load_reference`; None for a zoo model's.
        renders: number of images of a zoo reference.
        features: the feature network, see `fastdiff.eval.features.load_feature_net`; None for a zoo model's, else
            Inception.
        feature_weights: files of weights by what they are for: ``features``, ``lpips``, ``clip``.
        lpips: whether to measure the learned perceptual distance to full sampling.
        clip: whether to measure the agreement with prompts.
        reader: a model that reads glyphs, ``zoo:glyphs-cnn`` or a folder; None for pictures of anything else.
        rounds: timed turns of each way; 0 for no timing.
        timing_batch: images in a timed batch; None finds one that saturates the device.
        device: where to sample.
        dtype: name of the weights' dtype.
        out: folder of the report and of all that was measured; the same command goes on where another stopped.
        trusted: whether ``features`` may name code to import; not where it comes from a file.

    Raises:
        ConfigError: for settings that do not fit together.
    """

    model: str
    methods: Sequence[str] = ()
    baselines: Sequence[str] = (STEPS,)
    copies: Mapping[str, str] = field(default_factory=dict)
    num_inference_steps: int = 50
    num_samples: int = 500
    seeds: Sequence[int] = (0,)
    batch_size: int = 16
    prompts: str | None = None
    class_labels: Sequence[int] | None = None
    guidance_scale: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    reference: str | None = None
    renders: int = ZOO_RENDERS
    features: str | None = None
    feature_weights: Mapping[str, str] = field(default_factory=dict)
    lpips: bool = False
    clip: bool = False
    reader: str | None = None
    rounds: int = 7
    timing_batch: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    out: str = "evaluation"
    trusted: bool = True

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ConfigError(f"Sets of seeds start at different numbers, at least one; got {list(self.seeds)}.")
        starts = sorted(self.seeds)
        if any(later - earlier < self.num_samples for earlier, later in pairwise(starts)):
            raise ConfigError(
                f"Sets of {self.num_samples} seeds that start at {', '.join(map(str, starts))} overlap; "
                f"start them at least {self.num_samples} apart."
            )
        if unknown := set(self.feature_weights) - {"features", "lpips", "clip"}:
            raise ConfigError(f"Weights are for features, lpips or clip; got {', '.join(sorted(unknown))}.")

    def run(self, command: Sequence[str] = sys.argv, *, progress: bool = True) -> Results | None:
        """Measure what is not measured yet and write the report.

        Args:
            command: recorded as what makes these results again.
            progress: whether to show progress bars.

        Returns:
            The results; None in processes other than the first.

        Raises:
            FastDiffError: if the model, the ways or the judge cannot be had, or the folder cannot be written to.
            SweepError: after the report is written, if a way made images that are none.
        """
        with staged_folder(self.out) as folder:
            return _Run(self, progress).results(folder, command)


class _Run:
    """An evaluation at work."""

    def __init__(self, evaluation: Evaluation, progress: bool) -> None:
        self._settings = evaluation
        self._progress = progress
        self._processes = Processes()
        self._device = str(self._processes.device) if self._processes.count > 1 else evaluation.device
        self._pipes = {name: self._load(model) for name, model in self._models.items()}
        self._stores: list[Store] = []

    @property
    def _models(self) -> dict[str, str]:
        return {MAIN: self._settings.model, **self._settings.copies}

    def _load(self, model: str) -> DiffusionPipeline:
        settings = self._settings
        pipe = load(model, self._device, settings.dtype, preset="off")
        pipe.set_progress_bar_config(disable=True)
        if settings.scheduler is not None:
            pipe.scheduler = _scheduler(settings.scheduler).from_config(pipe.scheduler.config)
        return pipe

    @property
    def _pipe(self) -> DiffusionPipeline:
        return self._pipes[MAIN]

    def results(self, folder: Path, command: Sequence[str]) -> Results | None:
        """Sweep, collect and write."""
        error = self._sweep()
        if not self._processes.is_main:
            return None
        results = collect(self._stores, self._header(command))
        write_report(results, self._shown(results), folder)
        if error is not None:
            raise error
        return results

    # -- what is compared ----------------------------------------------------------------------------------------------

    def _ways(self) -> list[Way]:
        settings, steps = self._settings, self._settings.num_inference_steps
        ways = list(fewer_steps(steps))
        for spec in settings.methods:
            copy, mark, rest = spec.rpartition("@")
            ways += parse_ways([rest], steps, model=copy if mark else MAIN)
        for spec in settings.baselines:
            ways += self._baseline(spec)
        return list(merge(ways))

    def _baseline(self, spec: str) -> Sequence[Way]:
        steps = self._settings.num_inference_steps
        if spec == STEPS:
            return ()
        if spec != PEERS and spec not in names():
            return parse_ways([spec], steps)
        peers = [peer for peer in default_peers(self._pipe) if spec in (PEERS, peer.name)]
        return parse_ways(map(str, peers or [Peer.registry[spec]()]), steps)

    # -- sampling and judging ------------------------------------------------------------------------------------------

    def _sweep(self) -> SweepError | None:
        """One sweep for each set of seeds; the first is timed."""
        settings = self._settings
        ways, error = self._ways(), None
        for number, seed in enumerate(settings.seeds):
            task = self._glyphs(seed).task if settings.reader else self._task(seed)
            judge = self._judge(seed)
            sweep = Sweep(
                self._pipes,
                ways,
                task,
                judge,
                Path(settings.out) / SWEEPS / f"seed-{seed}",
                Settings(
                    num_inference_steps=settings.num_inference_steps,
                    num_samples=settings.num_samples,
                    batch_size=settings.batch_size,
                    rounds=0 if number else settings.rounds,
                    timing_batch=settings.timing_batch,
                ),
                judged=judge.describe(),
                processes=self._processes,
                progress=self._progress,
            )
            self._stores.append(sweep.store)
            try:
                sweep.run()
            except SweepError as raised:
                error = raised
            if not number:
                matches = sorted(set((sweep.store.fact(MATCHES) or {}).values()))
                ways = list(merge([*ways, *map(plain, matches)]))
        return error

    def _task(self, seed: int) -> Task:
        settings = self._settings
        return make_task(
            self._pipe,
            prompts=read_prompts(settings.prompts) if settings.prompts else None,
            class_labels=settings.class_labels,
            guidance_scale=settings.guidance_scale,
            arguments=settings.arguments,
            seed=seed,
        )

    def _glyphs(self, seed: int) -> GlyphTask:
        settings = self._settings
        asked = glyph_task(self._pipe, settings.num_samples, seed=seed, guidance_scale=settings.guidance_scale)
        shared = {**asked.task.shared, **settings.arguments}
        return replace(asked, task=replace(asked.task, shared=shared))

    def _judge(self, seed: int) -> Judge:
        settings, weights = self._settings, self._settings.feature_weights
        prompts = read_prompts(settings.prompts) if settings.prompts else []
        reading, said, reference = None, {}, settings.reference
        if settings.reader:
            glyphs = self._glyphs(seed)
            reading = partial(read_as_asked, self._reader, asked=glyphs.asked)
            said = {"reader": settings.reader, "questions": glyphs.questions}
            reference = reference or glyphs.reference
            prompts = prompts or list(glyphs.task.requests.get("prompt", ()))
        if reference is None:
            raise ConfigError(
                "Samples are held against a reference: --reference FOLDER, statistics.npz, datasets:NAME or zoo:glyphs."
            )
        return Judge(
            self._net,
            load_reference(reference, self._net, renders=settings.renders),
            lpips=load_lpips(weights=weights.get("lpips"), device=self._device) if settings.lpips else None,
            clip=load_clip(weights.get("clip"), self._device) if settings.clip else None,
            captions=prompts,
            reading=reading,
            said=said,
        )

    @cached_property
    def _net(self) -> FeatureNet:
        settings = self._settings
        features = settings.features or ("zoo" if settings.reader else "inception")
        weights = settings.feature_weights.get("features")
        return load_feature_net(features, weights, self._device, custom=settings.trusted)

    @cached_property
    def _reader(self) -> GlyphReader:
        from fastdiff import zoo
        from fastdiff.zoo.reader import GlyphReader

        name = self._settings.reader or ""
        folder = zoo.path(name) if name.startswith("zoo:") else name
        try:
            return GlyphReader.from_pretrained(folder).eval().to(self._device)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name!r} cannot be loaded as a reader of glyphs: {error}") from error

    # -- what is told --------------------------------------------------------------------------------------------------

    def _header(self, command: Sequence[str]) -> dict[str, Any]:
        settings = self._settings
        judge = self._judge(settings.seeds[0])
        told = {
            **provenance([Path(command[0]).name, *command[1:]]),
            "model": settings.model,
            "copies": dict(settings.copies),
            "num_inference_steps": settings.num_inference_steps,
            "num_samples": settings.num_samples,
            "seeds": list(settings.seeds),
            "dtype": settings.dtype,
            "scheduler": type(self._pipe.scheduler).__name__,
            "asked": "no guidance" if (scale := self._guidance) is None else f"guidance {scale:g}",
            "judged": judge.describe(),
            "environment": self._stores[0].environment or describe_environment(self._device),
            "packages": {peer.distribution: peer.version() for peer in Peer.registry.values()},
            "settings": self._stores[0].settings,
        }
        if settings.reader:
            told |= {"read": self._glyphs(settings.seeds[0]).read, "floor": self._floor(judge)}
        return told

    @property
    def _guidance(self) -> float | None:
        parameter = call_parameters(self._pipe).get("guidance_scale")
        given = self._settings.guidance_scale
        return None if parameter is None else parameter.default if given is None else given

    def _floor(self, judge: Judge) -> dict[str, Any]:
        """What as many perfect samples would score."""
        glyphs = self._glyphs(self._settings.seeds[0])
        images, asked = glyphs.renders(self._settings.renders, self._settings.num_samples)
        right = read_as_asked(self._reader, images, asked)
        return judge.score(images, reading=lambda _: right)

    def _shown(self, results: Results) -> dict[str, np.ndarray]:
        settings = self._settings
        store, size = self._stores[0], (settings.num_samples, settings.batch_size)
        indices = chosen(settings.num_samples)
        return {point.key: store.samples(point.key, *size).images[indices] for point in results.measured}


def _scheduler(name: str) -> Any:
    """A scheduler class of diffusers'.

    Raises:
        ConfigError: if there is none of this name.
    """
    import diffusers

    # Some names in diffusers stand for packages that are not installed, and raise when touched.
    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ConfigError(f"diffusers has no scheduler {name!r}; name a class such as DDIMScheduler.")
    return cls


def default_reader(model: str) -> str | None:
    """The reader for a shipped model, which samples glyphs; None for any other."""
    return "zoo:glyphs-cnn" if os.fspath(model).startswith("zoo:") else None
