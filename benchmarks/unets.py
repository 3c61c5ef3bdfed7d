"""Every method for UNets against full sampling and against simply taking fewer steps, on a shipped model.

    python benchmarks/unets.py --model glyphs-sd
    python benchmarks/unets.py --model glyphs-ddpm --sections ddim
    python benchmarks/unets.py --model glyphs-sd --render        # tables and pictures again, nothing measured

Three sections: 50 DDIM steps, 20 DPM++ steps, and skip-tuning at 9, 19 and 39 evaluations with a sweep of its factor.
In each,

1. all ways of sampling take turns and are timed, some images at a time and one at a time;
2. for every method, the number of plain steps that takes the same time is looked up and timed too;
3. when all sections are timed, every way samples the same images, seeds 0, 1, 2, ..., and a network that reads glyphs
   judges them.

Every row is a few files under --work. What is there is not measured again: an interrupted run goes on where it stopped,
and deleting a row's files measures that row again. Times want a machine that does nothing else. The last step writes
unets_MODEL.json and .md to --out and pictures to --pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.logging import disable_progress_bar
from tqdm import tqdm

from fastdiff import EncoderPropagation, FeatureInheritance, SkipTuning, zoo
from fastdiff.cli.comparison import Settings
from fastdiff.cli.contenders import FULL, UNET_METHODS, Contender, fewer_steps, plain
from fastdiff.cli.sampler import Sampler, load_reader
from fastdiff.cli.tasks import Task
from fastdiff.eval import describe_environment, psnr, time_interleaved
from fastdiff.eval.glyphs import GlyphJudge, Score
from fastdiff.methods.skip_tuning import RHO_BY_EVALUATIONS
from fastdiff.plan import write_json

MODELS = ("glyphs-sd", "glyphs-ddpm")
FREE, SKIP = "Training-free methods", "Skip-tuning"
INTERVALS = {2: "2nd", 3: "3rd", 5: "5th"}
EVALUATIONS = (39, 19, 9)
RHOS = (0.6, 0.7, 0.8, 0.9, 0.95, 1.05)
SINGLE = 1
RENDERS = "renders"
"""Key of the row of held-out renders: what perfect samples of the same number would score."""


@dataclass(frozen=True)
class Section:
    """Rows that are compared with each other.

    Args:
        key: name in files.
        title: name for a person.
        scheduler: class of the solver.
        contenders: the rows that are known beforehand; the first is full sampling.
        samples: images of each.
        finds_matches: whether each method is compared with as many plain steps as take the same time.
    """

    key: str
    title: str
    scheduler: type
    contenders: tuple[Contender, ...]
    samples: int
    finds_matches: bool = True

    @property
    def steps(self) -> int:
        """Steps of full sampling."""
        return self.contenders[0].steps


def solver_section(key: str, name: str, scheduler: type, steps: int, samples: int) -> Section:
    """Every method at one number of steps."""
    inheritance = {
        f"inheritance-{n}": (f"Feature inheritance, every {nth}, forecast", FeatureInheritance(n, order=2))
        for n, nth in INTERVALS.items()
    }
    propagation = {
        f"encoder-propagation-uniform-{n}": (f"Encoder propagation, every {nth}, parallel", EncoderPropagation(n))
        for n, nth in INTERVALS.items()
    }
    methods = UNET_METHODS | propagation | inheritance
    rows = (
        Contender(FULL, f"Full, {steps} steps", "Baseline", steps),
        *(
            Contender(key, label, FREE, steps, (method,))
            for key, (label, method) in sorted(methods.items(), key=lambda item: item[0].partition("-")[0])
        ),
        *map(plain, fewer_steps(steps)),
    )
    return Section(key, f"{steps} {name} steps", scheduler, rows, samples)


def skip_section(samples: int) -> Section:
    """Skip-tuning's factor, swept at each number of evaluations; plain sampling is its factor 1."""
    most, *fewer = EVALUATIONS
    rows = [Contender(FULL, f"Plain, {most} evaluations", "Baseline", most), *map(plain, fewer)]
    for evaluations in EVALUATIONS:
        for rho in sorted({*RHOS, RHO_BY_EVALUATIONS[evaluations]}):
            label = f"Skip-tuning {rho:g}, {evaluations} evaluations"
            rows.append(Contender(skip_key(evaluations, rho), label, SKIP, evaluations, (SkipTuning(rho=rho),)))
    return Section("skip", "Skip-tuning", DPMSolverMultistepScheduler, tuple(rows), samples, finds_matches=False)


def skip_key(evaluations: int, rho: float) -> str:
    """Key of a row of the sweep."""
    return f"skip-{evaluations}-{rho:g}"


def sections(samples: int, sweep_samples: int) -> dict[str, Section]:
    """All sections, by key."""
    made = (
        solver_section("ddim", "DDIM", DDIMScheduler, 50, samples),
        solver_section("dpm", "DPM++", DPMSolverMultistepScheduler, 20, samples),
        skip_section(sweep_samples),
    )
    return {section.key: section for section in made}


# -- what is kept ------------------------------------------------------------------------------------------------------


class Store:
    """The files of a section's rows.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: str, kind: str) -> dict[str, Any] | None:
        """What was measured of a row, ``"time"`` or ``"quality"``; None if it was not yet."""
        path = self.folder / f"{key}.{kind}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, key: str, kind: str, data: dict[str, Any]) -> None:
        """Keep a measurement."""
        write_json(self.folder / f"{key}.{kind}.json", data)

    def images(self, key: str) -> np.ndarray:
        """A row's images, uint8 of shape ``(samples, 32, 32, 3)``."""
        return np.load(self.folder / f"{key}.npy", allow_pickle=False)


def open_work(folder: Path, settings: dict[str, Any]) -> None:
    """Make sure that what a folder holds was measured with the same settings.

    Raises:
        SystemExit: if it was not.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
    kept = json.loads(path.read_text(encoding="utf-8"))
    if differing := [name for name in settings if kept.get(name) != settings[name]]:
        raise SystemExit(
            f"{folder} holds rows measured with another {', '.join(differing)}. Delete it, or choose another --work."
        )


def digest(folder: Path) -> str:
    """A fingerprint of a model's weights."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


# -- measuring ---------------------------------------------------------------------------------------------------------


class Measurement:
    """One section of one model.

    Args:
        section: its rows.
        settings: the model and what it is asked for; see `Settings`.
        store: where rows are kept.
    """

    def __init__(self, section: Section, settings: Settings, store: Store) -> None:
        self._section = section
        self._settings = settings
        self._store = store
        self._sampler = Sampler(settings)
        for pipe in self._sampler.pipes:
            pipe.scheduler = section.scheduler.from_config(pipe.scheduler.config)

    def time_all(self, rounds: int, timing_batch: int) -> None:
        """Time all rows that were not yet, and the plain rows that take as long as a method."""
        rows = list(self._section.contenders)
        presets = {skip_key(evaluations, RHO_BY_EVALUATIONS[evaluations]) for evaluations in EVALUATIONS}
        rows = [row for row in rows if row.group != SKIP or row.key in presets]  # a factor's value takes no time
        self._time(rows, rounds, timing_batch)
        self._time([*rows, *match_rows(self._section, self._store)], rounds, timing_batch)

    @property
    def task(self) -> Task:
        """What is asked of the images."""
        return self._sampler.task

    def sample_all(self, judge: GlyphJudge) -> None:
        """Sample and judge the rows that were not yet."""
        rows = (*self._section.contenders, *match_rows(self._section, self._store))
        for row in tqdm([row for row in rows if not self._store.read(row.key, "quality")], desc=self._section.title):
            self._sample(row, judge)
        if not self._store.read(RENDERS, "quality"):
            fresh = judge.score_renders(self._settings.count, self.task.questions)
            self._store.write(RENDERS, "quality", as_data(fresh))

    def _time(self, rows: Sequence[Contender], rounds: int, batch: int) -> None:
        """Time the rows that were not yet, in turns with full sampling."""
        full, *others = rows
        missing = [row for row in others if not self._store.read(row.key, "time")]
        if not missing:
            return
        field = {row.key: row for row in (full, *missing)}
        seconds = {size: self._take_turns(field, rounds, size) for size in (batch, SINGLE)}
        for key in field:
            if key != FULL or not self._store.read(FULL, "time"):
                times = {str(size): {"seconds": taken[key], "full": taken[FULL]} for size, taken in seconds.items()}
                where = describe_environment(self._settings.device)
                self._store.write(key, "time", {"batch": batch, "times": times, "environment": where})

    def _take_turns(self, field: dict[str, Contender], rounds: int, batch: int) -> dict[str, list[float]]:
        bar = tqdm(total=(rounds + 1) * len(field), desc=f"{self._section.title}: timing {batch} at a time")

        def sampling(row: Contender) -> Callable[[int], None]:
            return lambda index: self._sampler.sample(row, range(max(index, 0) * batch, (max(index, 0) + 1) * batch))

        with bar:
            return time_interleaved(
                {key: sampling(row) for key, row in field.items()},
                rounds,
                device=self._settings.device,
                before_each=lambda key: self._sampler.prepare(field[key]),
                after_each=lambda _: bar.update(),
            )

    def _sample(self, row: Contender, judge: GlyphJudge) -> None:
        """Sample and judge a row's images."""
        count, batch = self._settings.count, self._settings.batch
        self._sampler.prepare(row)
        starts = tqdm(range(0, count, batch), desc=row.label, leave=False)
        images = np.concatenate([self._sampler.sample(row, range(start, start + batch)) for start in starts])
        ran = self._sampler.look(row)
        np.save(self._store.folder / f"{row.key}.npy", images)
        score = judge.score(images, self.task.asked)
        difference = psnr(images / 255, self._store.images(FULL) / 255)
        ran.plan.save(self._store.folder / f"{row.key}.plan.json")
        quality = {
            **as_data(score),
            "psnr": None if np.isinf(difference) else difference,
            "macs": ran.macs,
            "questions": self.task.questions,
            "guided": "guidance_scale" in self.task.shared,
        }
        self._store.write(row.key, "quality", quality)


def as_data(score: Score) -> dict[str, Any]:
    """A score, JSON-compatible."""
    return {**asdict(score), "resampled": score.resampled.tolist()}


def find_matches(section: Section, store: Store) -> dict[str, int]:
    """For every method the number of plain steps that takes the same time, some images at a time.

    Between the timed numbers of steps, time is taken to be linear in them.
    """

    def share(key: str) -> float:
        """Median time as a share of full sampling's in the same round."""
        timed = store.read(key, "time")
        if timed is None:
            raise FileNotFoundError(f"{key} was not timed; {store.folder} lacks it.")
        times = timed["times"][str(timed["batch"])]
        return float(np.median(np.divide(times["seconds"], times["full"])))

    anchors = sorted((share(row.key), row.steps) for row in section.contenders if not row.methods)
    shares, steps = zip((0.0, 0), *anchors, strict=True)
    return {
        row.key: min(section.steps, max(1, round(float(np.interp(share(row.key), shares, steps)))))
        for row in section.contenders
        if row.methods
    }


def match_rows(section: Section, store: Store) -> list[Contender]:
    """The plain rows that take as long as a method and are not among the section's own, most steps first."""
    if not section.finds_matches:
        return []
    known = {row.key for row in section.contenders}
    steps = sorted(set(find_matches(section, store).values()) - {section.steps}, reverse=True)
    return [plain(number) for number in steps if plain(number).key not in known]


# -- the command -------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODELS[0], help="glyphs-sd, glyphs-ddpm, or a folder (default: %(default)s)")
    parser.add_argument("--reader", default="zoo:glyphs-cnn", help="judge of glyphs (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=sections(2, 2), default=[*sections(2, 2)], help="default: all")
    parser.add_argument("--samples", type=int, default=360, help="images of each row (default: %(default)s)")
    parser.add_argument("--sweep-samples", type=int, default=216, help="the same in the sweep (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=36, help="images sampled at a time (default: %(default)s)")
    parser.add_argument("--timing-batch", type=int, default=8, help="images timed at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each row (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="of a guided model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image (default: %(default)s)")
    parser.add_argument("--renders", type=int, default=2000, help="held-out renders (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/unets"), help="rows measured so far (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="(default: %(default)s)")
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"), help="(default: %(default)s)")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    return parser.parse_args()


def settings_of(args: argparse.Namespace, section: Section) -> Settings:
    """What a section measures."""
    return Settings(
        model=f"zoo:{args.model}" if args.model in MODELS else args.model,
        finetuned=None,
        reader=args.reader,
        samples=section.samples,
        batch=args.batch,
        steps=section.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        renders=args.renders,
        device=args.device,
        dtype="float32",
    )


def measured(args: argparse.Namespace) -> list[tuple[Section, Settings, Store]]:
    """Every section that was asked for, measured as far as it was not yet: all times first."""
    folder = args.work / Path(args.model).name
    names = ("samples", "sweep_samples", "batch", "guidance_scale", "seed", "renders", "reader", "device")
    weights = digest(zoo.path(args.model) if args.model in MODELS else Path(args.model))
    open_work(folder, {name: getattr(args, name) for name in names} | {"weights": weights})
    chosen = [sections(args.samples, args.sweep_samples)[key] for key in args.sections]
    kept = [(section, settings_of(args, section), Store(folder / section.key)) for section in chosen]
    if not args.render:
        measurements = [Measurement(*entry) for entry in kept]
        for measurement in measurements:
            measurement.time_all(args.rounds, args.timing_batch)
        settings, task = kept[0][1], measurements[0].task
        judge = GlyphJudge(load_reader(settings), settings.renders, subset=task.subset)
        for measurement in measurements:
            measurement.sample_all(judge)
    return kept


def main() -> None:
    """Measure what is missing and write tables and pictures."""
    import unets_report

    args = parse()
    disable_progress_bar()  # diffusers' own, for every model it loads
    unets_report.write(measured(args), Path(args.model).name, args.out, args.pictures)


if __name__ == "__main__":
    main()
