"""One evaluation from its settings to its report: what ``fastdiff eval`` runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff.backbones import view
from fastdiff.errors import ConfigError, FastDiffError, UnsupportedBackboneError
from fastdiff.eval.features import FeatureNet, load_feature_net
from fastdiff.eval.glyphs import GlyphTask, glyph_task, read_as_asked
from fastdiff.eval.judging import Judge
from fastdiff.eval.paired import ClipScorer, Lpips, load_clip, load_lpips
from fastdiff.eval.peers import Peer, default_peers, names
from fastdiff.eval.processes import Processes
from fastdiff.eval.provenance import describe_environment, package_version
from fastdiff.eval.reference import ZOO_RENDERS, Reference, load_reference
from fastdiff.eval.report import write_report
from fastdiff.eval.report.plots import chosen
from fastdiff.eval.results import Results, collect, provenance
from fastdiff.eval.sampling import sample
from fastdiff.eval.store import Store
from fastdiff.eval.sweep import MATCHES, Settings, Sweep, SweepError
from fastdiff.eval.tasks import Task, make_task, read_prompts
from fastdiff.eval.ways import MAIN, Way, fewer_steps, merge, parse_ways, plain
from fastdiff.eval.work import denoisers_of
from fastdiff.output import OutputError, staged_folder
from fastdiff.pipelines.calling import call_parameters, load

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.zoo.reader import GlyphReader

STEPS, PEERS = "steps", "peers"
"""Baselines that are no specification: fewer steps, and all other packages."""
SWEEPS = "sweeps"
"""Folder of what was measured, in the folder of the report."""
TOLD = (
    *("methods", "baselines", "batch_size", "guidance_scale", "class_labels", "arguments", "renders", "features"),
    *("lpips", "clip", "reader", "rounds", "timing_batch"),
)
"""Settings that the results tell as they were given; those that name files of the user's are told by content."""
LIBRARIES = ("torchmetrics", "torch-fidelity", "clean-fid", "torchvision", "scipy", "datasets", "pillow", "matplotlib")
"""What the metrics and pictures may come from."""


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
        self._check_seeds()
        self.sweep_settings()
        if unknown := set(self.feature_weights) - {"features", "lpips", "clip"}:
            raise ConfigError(f"Weights are for features, lpips or clip; got {', '.join(sorted(unknown))}.")
        if MAIN in self.copies:
            raise ConfigError(f"{MAIN!r} is the pipeline itself; give its copy another name.")
        for spec in self.methods:
            if (copy := _of_copy(spec)[0]) not in (MAIN, *self.copies):
                raise ConfigError(f"{spec!r} is for a copy {copy!r}, which is none of {[*self.copies]} (--copy).")
        if self.reference is None and self.reader is None:
            raise ConfigError(
                "Samples are held against a reference: --reference FOLDER, statistics.npz, datasets:NAME or zoo:glyphs."
            )
        if self.reader is not None and (self.prompts or self.class_labels):
            raise ConfigError(
                "Glyphs that are read are asked for by themselves, every character in turn. To choose prompts or class "
                "labels, leave out the reader (--reader none)."
            )
        if self.clip and self.prompts is None and self.reader is None:
            raise ConfigError("A CLIP score compares images with prompts; give them with --prompts.")

    def _check_seeds(self) -> None:
        starts = sorted(self.seeds)
        if not starts or starts[0] < 0:
            raise ConfigError(f"Sets of seeds start at numbers from 0, at least one; got {list(self.seeds)}.")
        if any(later - earlier < self.num_samples for earlier, later in pairwise(starts)):
            raise ConfigError(
                f"Sets of {self.num_samples} seeds that start at {', '.join(map(str, starts))} overlap; "
                f"start them at least {self.num_samples} apart."
            )
        if self.num_samples < 2:
            raise ConfigError(f"A set of images is compared, two at least; got num_samples {self.num_samples}.")

    def sweep_settings(self, *, timed: bool = True) -> Settings:
        """How much a sweep samples and times."""
        return Settings(
            num_inference_steps=self.num_inference_steps,
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            rounds=self.rounds if timed else 0,
            timing_batch=self.timing_batch,
        )

    def run(self, command: Sequence[str] | None = None, *, progress: bool = True) -> Results | None:
        """Measure what is not measured yet and write the report.

        Args:
            command: recorded as what makes these results again; None for this process's own.
            progress: whether to show progress bars.

        Returns:
            The results; None in processes other than the first.

        Raises:
            FastDiffError: if the model, the ways or the judge cannot be had, or the folder cannot be written to.
            SweepError: after the report is written, if a way made images that are none.
        """
        run = _Run(self, progress)
        error = run.sweep()
        if not run.is_main:
            return None
        command = command or [Path(sys.argv[0]).name, *sys.argv[1:]]
        try:
            with staged_folder(self.out) as folder:
                results = run.report(folder, command)
        except OSError as raised:
            if isinstance(raised, FastDiffError):
                raise
            raise OutputError(
                f"The report cannot be written to {self.out}: {raised}. What was measured is kept: make room and "
                "repeat the command."
            ) from raised
        if error is not None:
            raise SweepError(f"{error} The report in {self.out} has the rest.") from error
        return results


class _Run:
    """An evaluation at work."""

    def __init__(self, evaluation: Evaluation, progress: bool) -> None:
        self._settings = evaluation
        self._progress = progress
        self._processes = Processes(cpu=torch.device(evaluation.device).type == "cpu")
        self._device = str(self._processes.device) if self._processes.count > 1 else evaluation.device
        self._stores: list[Store] = []

    @property
    def is_main(self) -> bool:
        """Whether this process writes the report."""
        return self._processes.is_main

    def sweep(self) -> SweepError | None:
        """One sweep for each set of seeds; the first is timed.

        Returns:
            The error about images that are none, if there are such.
        """
        # The first process goes ahead: the others then find what it has downloaded and computed, and what is wrong
        # with the settings is said once.
        self._processes.on_main(self._prepare)
        if not self.is_main:
            self._prepare()
        error = None
        for number, seed in enumerate(self._settings.seeds):
            sweep = self._sweep(seed, timed=not number)
            self._stores.append(sweep.store)
            if not number:
                self._processes.on_main(self._rehearse)
            try:
                sweep.run()
            except SweepError as raised:
                error = raised
            if not number:
                self._ways = self._with_matches(sweep.store)
        return error

    def report(self, folder: Path, command: Sequence[str]) -> Results:
        """Collect and write."""
        store, steps = self._stores[0], self._settings.num_inference_steps
        keys = {self._baseline.key, *(way.key for way in self._ways)} | {way.baseline(steps).key for way in self._ways}
        batch = self._settings.timing_batch or store.fact("saturating_batch")
        results = collect(self._stores, self._header(command), keys=keys, batch=batch)
        write_report(results, self._shown(results), folder)
        return results

    # -- before anything is sampled ------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Read and load everything that may turn out not to be there."""
        self._ways = self._parsed_ways()
        for seed in self._settings.seeds:
            self._task(seed)
            self._judge(seed)

    def _rehearse(self) -> None:
        """Sample one image, to learn that it cannot be judged now and not after all of them."""
        if self._stores[0].quality(self._baseline.key) is None:
            first = self._settings.seeds[0]
            self._judge(first).check(sample(self._pipe, self._baseline, self._task(first), range(1)).images)

    @property
    def _baseline(self) -> Way:
        return plain(self._settings.num_inference_steps, is_baseline=True)

    @cached_property
    def _pipes(self) -> dict[str, DiffusionPipeline]:
        models = {MAIN: self._settings.model, **self._settings.copies}
        return {name: self._load(model) for name, model in models.items()}

    @property
    def _pipe(self) -> DiffusionPipeline:
        return self._pipes[MAIN]

    def _load(self, model: str) -> DiffusionPipeline:
        settings = self._settings
        scheduler = None if settings.scheduler is None else scheduler_class(settings.scheduler)
        pipe = load(model, self._device, settings.dtype, preset="off")
        pipe.set_progress_bar_config(disable=True)
        if scheduler is not None:
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        return pipe

    # -- what is compared ----------------------------------------------------------------------------------------------

    def _parsed_ways(self) -> list[Way]:
        settings, steps = self._settings, self._settings.num_inference_steps
        ways = list(fewer_steps(steps))
        for spec in settings.methods:
            copy, rest = _of_copy(spec)
            ways += parse_ways([rest], steps, model=copy, units=_units(self._pipes[copy]))
        for spec in settings.baselines:
            ways += self._parsed_baseline(spec)
        return list(merge(ways))

    def _parsed_baseline(self, spec: str) -> Sequence[Way]:
        steps = self._settings.num_inference_steps
        if spec == STEPS:
            return ()
        if spec != PEERS and spec not in names():
            return parse_ways([spec], steps, units=_units(self._pipe))
        peers = [peer for peer in default_peers(self._pipe) if spec in (PEERS, peer.name)]
        return parse_ways(map(str, peers or [Peer.registry[spec]()]), steps)

    def _with_matches(self, store: Store) -> list[Way]:
        """All ways, with the plain ones that were found to take the same time."""
        found = store.fact(MATCHES) or {}
        matches = [plain(found[way.key], model=way.model) for way in self._ways if way.key in found]
        return list(merge([*self._ways, *matches]))

    # -- sampling and judging ------------------------------------------------------------------------------------------

    def _sweep(self, seed: int, *, timed: bool) -> Sweep:
        judge = self._judge(seed)
        return Sweep(
            self._pipes,
            self._ways,
            self._task(seed),
            judge,
            Path(self._settings.out) / SWEEPS / f"seed-{seed}",
            self._settings.sweep_settings(timed=timed),
            judged=judge.describe(),
            processes=self._processes,
            progress=self._progress,
        )

    def _task(self, seed: int) -> Task:
        settings = self._settings
        if settings.reader:
            return self._glyphs(seed).task
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
        settings = self._settings
        reading, said = None, {}
        prompts = read_prompts(settings.prompts) if settings.prompts else []
        if settings.reader:
            glyphs = self._glyphs(seed)
            reading = partial(read_as_asked, self._reader, asked=glyphs.asked)
            said = {"reader": settings.reader, "questions": glyphs.questions}
            prompts = list(glyphs.task.requests.get("prompt", ()))
        return Judge(
            self._net,
            self._reference,
            lpips=self._lpips,
            clip=self._clip,
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
    def _reference(self) -> Reference:
        settings = self._settings
        source = settings.reference or self._glyphs(settings.seeds[0]).reference
        return load_reference(source, self._net, renders=settings.renders)

    @cached_property
    def _lpips(self) -> Lpips | None:
        settings = self._settings
        return (
            load_lpips(weights=settings.feature_weights.get("lpips"), device=self._device) if settings.lpips else None
        )

    @cached_property
    def _clip(self) -> ClipScorer | None:
        settings = self._settings
        return load_clip(settings.feature_weights.get("clip"), self._device) if settings.clip else None

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
        settings, store = self._settings, self._stores[0]
        judge = self._judge(settings.seeds[0])
        told = {
            **provenance(command),
            "model": settings.model,
            "copies": dict(settings.copies),
            "num_inference_steps": settings.num_inference_steps,
            "num_samples": settings.num_samples,
            "seeds": list(settings.seeds),
            "dtype": settings.dtype,
            "scheduler": type(self._pipe.scheduler).__name__,
            "asked": "no guidance" if (scale := self._guidance) is None else f"guidance {scale:g}",
            "judged": judge.describe(),
            "options": {name: getattr(settings, name) for name in TOLD},
            "processes": self._processes.count,
            "environment": store.environment or describe_environment(self._device),
            "packages": _packages(),
            "settings": store.settings,
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


def _of_copy(spec: str) -> tuple[str, str]:
    """The pipeline that a specification is for, and the specification without its name."""
    found = re.match(r"\s*([\w.-]+)@(.*)", spec, re.DOTALL)
    return (found[1], found[2]) if found else (MAIN, spec)


def _units(pipe: DiffusionPipeline) -> int | None:
    """The number of units of a pipeline's denoiser; None for one that fastdiff does not know."""
    try:
        return len(view(denoisers_of(pipe)[0]).units)
    except (UnsupportedBackboneError, IndexError):
        return None


def _packages() -> dict[str, str | None]:
    """Versions of what may take part beside what `describe_environment` tells: peers and metrics' libraries."""
    names = sorted({peer.distribution for peer in Peer.registry.values()} | set(LIBRARIES))
    return {name: package_version(name) for name in names}


def scheduler_class(name: str) -> Any:
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
