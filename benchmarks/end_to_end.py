"""How fast published denoisers sample on an accelerator, plain and in all the ways that make them faster.

    python benchmarks/end_to_end.py --out benchmarks/results/end_to_end.json
    python benchmarks/end_to_end.py --models flux.1-dev --builds eager graphs --batches one --steps 10
    python benchmarks/end_to_end.py --small --device cpu --models dit-xl-2-256  # to try it without one

Timed is the sampling loop around the denoiser: guidance and scheduler are in it, text encoders and the decoder of the
latents are not. Weights are random, in the published configurations: what is sampled has no meaning, and no value has
an influence on the time. What is run is a build of the model:

    eager             as diffusers makes it
    kernels           fastdiff.optimize
    compile           compile_repeated_blocks(fullgraph=True): every kind of block is compiled once
    compile-kernels   fastdiff.optimize, then the same
    graphs            fastdiff.optimize, and every evaluation replayed as a CUDA graph

under a plan:

    full              everything is computed
    half              every evaluation exits after half of the blocks
    sequential        encoder propagation, every fifth evaluation a key (UNets)
    parallel          the same, with the evaluations between two keys decoded as one batch (UNets)
    uncertainty       uncertainty modules are asked before every block, and all samples stop half way (transformers)

with one image at a time, and with as many as fill the device. Each row takes turns with the eager build under the full
plan, so that a ratio is one of neighbours in time, and reports images in a second, the most memory that was allocated,
the seconds from the plain model to its first finished evaluation with nothing compiled beforehand, the speed-up, and
how much of the speed-up that the plan has by multiply-accumulates was realised. Combinations that are refused are
listed with the reason.

The file given by --out is written after every row. Rows that it holds already for the same machine, code and settings
are kept, so that an interrupted run goes on where it stopped and models can be measured one by one; on another machine
or with other code all begin anew, and those that are not asked for are listed as not measured. Without an accelerator
nothing is measured, and the table says so; multiply-accumulates are counted in any case.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in map(str, (ROOT / "benchmarks", ROOT / "tests")) if path not in sys.path]

import architectures  # noqa: E402
from architectures.denoisers import PUBLISHED, Denoiser, counted  # noqa: E402
from end_to_end_loop import Sampling, did, forget_compiled, fresh_cache, load_compiler, make  # noqa: E402
from end_to_end_report import BUILDS, PLANS, as_table, draw  # noqa: E402
from kernel_checks.listed import MODELS  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff import EncoderPropagation, ExitSchedule, UncertaintyExit  # noqa: E402
from fastdiff.backbones import Backbone, view  # noqa: E402
from fastdiff.cost import UnitCosts, synchronize  # noqa: E402
from fastdiff.engine.clock import Grid  # noqa: E402
from fastdiff.errors import FastDiffError  # noqa: E402
from fastdiff.eval import describe_environment, paired_ratio  # noqa: E402
from fastdiff.eval.speed import timed_rounds  # noqa: E402
from fastdiff.methods import Method, PlanRequest  # noqa: E402
from fastdiff.plan import write_json  # noqa: E402
from fastdiff.uem import UncertaintyModules, make_modules  # noqa: E402

FULL = "full"
KEYS = 5
"""Every which evaluation is a key of encoder propagation."""
WARM_UP = 2
"""Rounds before those that are timed: a CUDA graph is recorded when a call comes for the second time."""
NEVER, ALWAYS = 1e-6, 1 - 1e-6
"""Thresholds that no mean of sigmoids is below, and that every one is; still asked for, as 0 and 1 are not."""
BATCHES = ("one", "saturating")
SMALL_IMAGES = 2


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Args:
        model: key of the denoiser.
        images: at a time.
        build: how the model is run, a key of `BUILDS`.
        plan: what it computes, a key of `PLANS`.
    """

    model: str
    images: int
    build: str
    plan: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> Cell:
        """The cell of a row."""
        return cls(row["model"], row["images"], row["build"], row["plan"])


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Everything that was asked for."""
    for model in args.models:
        for images in images_of(model, args):
            for build in args.builds:
                for plan in plans_of(model):
                    if plan in args.plans:
                        yield Cell(model, images, build, plan)


def plans_of(model: str) -> tuple[str, ...]:
    """What is run with a model; transformers have no encoder of their own, and of UNets few places to exit at."""
    own = ("uncertainty",) if model not in architectures.TITLES else ("sequential", "parallel")
    return (FULL, "half", *own)


def images_of(model: str, args: argparse.Namespace) -> list[int]:
    """One image and as many as fill the device, or one of the two."""
    published = PUBLISHED[model]
    rows = next(listed.batches[1] for listed in MODELS if listed.name == published.name)
    many = SMALL_IMAGES if args.small else rows // 2 if published.guided else rows
    return [{"one": 1, "saturating": many}[batch] for batch in args.batches]


# -- what is computed --------------------------------------------------------------------------------------------------


def method_of(plan: str, backbone: Backbone, modules: Callable[[], UncertaintyModules]) -> Method | None:
    """The method that makes a plan; None for the full one."""
    if plan in ("sequential", "parallel"):
        return EncoderPropagation(KEYS, parallel=plan == "parallel")
    half = len(backbone.units) // 2
    if plan == "half":
        return ExitSchedule(bin_edges=(0,), depths=(half,))
    if plan == "uncertainty":
        # A decision takes effect one block later, so that no device has to wait for it.
        columns = [backbone.names.index(name) for name in backbone.exits]
        thresholds = tuple(ALWAYS if column >= half - 1 else NEVER for column in columns)
        return UncertaintyExit.of(modules(), bin_edges=(0,), thresholds=thresholds, lookahead=1)
    return None


def macs_share(plan: str, denoiser: Denoiser, backbone: Backbone, costs: UnitCosts, steps: int) -> float:
    """Share of the full plan's multiply-accumulates; those of uncertainty modules are left out.

    Raises:
        FastDiffError: if there is no such plan for the model.
    """
    # Where all samples stop half way, that is the plan which exits there.
    method = method_of("half" if plan == "uncertainty" else plan, backbone, _no_modules)
    if method is None:
        return 1.0
    scheduler = denoiser.scheduler()
    scheduler.set_timesteps(steps)
    made = method.plan(PlanRequest(backbone, Grid.of(scheduler), lambda: costs))
    return made.validate(backbone.traits).prune(backbone.traits).cost(costs).macs_share


def _no_modules() -> UncertaintyModules:
    raise NotImplementedError("Plans are counted without modules.")


def describe(model: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What is counted of a model, and of its plans by name; nothing is computed."""
    denoiser, backbone, costs = counted(model, small=args.small)

    def share(plan: str) -> dict[str, Any]:
        try:
            return {"macs_share": macs_share(plan, denoiser, backbone, costs, args.steps), "refused": None}
        except FastDiffError as error:
            return {"macs_share": None, "refused": str(error)}

    plans = {plan: share(plan) for plan in plans_of(model)}
    parameters = sum(weight.numel() for weight in denoiser.module.parameters())
    return {"parameters": parameters, "units": len(backbone.units), "macs": costs.total_macs}, plans


# -- what is run -------------------------------------------------------------------------------------------------------


def measured(cell: Cell, denoiser: Denoiser, args: argparse.Namespace) -> dict[str, Any]:
    """A cell's times and memory, JSON-compatible; its model takes turns with the plain one."""
    device = denoiser.module.device
    plain = Sampling(denoiser, denoiser.module, cell.images, args.steps)
    plain(1)  # libraries that are loaded, and algorithms that these choose, are no build's own
    arguments = denoiser.arguments(denoiser.latents(1), torch.zeros((), device=device), denoiser.conditions(1))
    modules = partial(_modules, denoiser.module, arguments)
    method = method_of(cell.plan, view(denoiser.module), modules)
    with fresh_cache(args.backend):
        module, how = denoiser.twin(), BUILDS[cell.build]
        sampling = Sampling(denoiser, module, cell.images, args.steps, method, how.graphs)
        synchronize(device)
        start = time.perf_counter()
        make(module, how, args.backend)
        with warnings.catch_warnings():
            # The first evaluation is often computed in full.
            warnings.simplefilter("ignore", fastdiff.FastDiffNoEffectWarning)
            sampling(1)
        synchronize(device)
        cold_start = time.perf_counter() - start
        records: list[Any] = []
        contenders = {"plain": lambda _: plain(), "this": lambda _: records.append(sampling())}
        turns = [*timed_rounds(contenders, WARM_UP + args.rounds, first=-WARM_UP, device=device)]
    seconds = {name: [turn[name].seconds for turn in turns[WARM_UP:]] for name in contenders}
    # What is replayed was allocated when it was recorded, in the rounds before.
    peaks = [turn["this"].peak_bytes for turn in turns]
    return {
        "seconds": seconds["this"],
        "speedup": asdict(paired_ratio(seconds["plain"], seconds["this"])),
        "cold_start": cold_start,
        "peak_bytes": None if None in peaks else max(peaks),
        **did(records[-1]),
    }


def _modules(module: nn.Module, arguments: dict[str, Any]) -> UncertaintyModules:
    torch.manual_seed(0)
    return make_modules(module, arguments).eval().to(module.device)


def tried(cell: Cell, denoiser: Denoiser, args: argparse.Namespace) -> dict[str, Any]:
    """What a row says of a cell: measured, refused by the library, or failed."""
    try:
        return {"measured": measured(cell, denoiser, args)}
    except FastDiffError as error:
        return {"refused": str(error)}
    except Exception as error:  # out of memory, or what a compiler cannot do; the other rows are measured all the same
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"}
    finally:
        forget_compiled()
        gc.collect()
        if denoiser.module.device.type == "cuda":
            torch.cuda.empty_cache()


# -- the command -------------------------------------------------------------------------------------------------------


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (
        ("models", PUBLISHED),
        ("builds", BUILDS),
        ("plans", PLANS),
        ("batches", ("one", "saturating")),
    ):
        text = f"of {', '.join(known)} (default: all)"
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=[*known], metavar="NAME", help=text)
    parser.add_argument("--steps", type=int, default=20, help="of the scheduler (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed pairs (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="the same layouts with fewer blocks, channels and pixels")
    default = "cuda" if torch.cuda.is_available() else None
    parser.add_argument("--device", default=default, help="default: cuda, or no measurement where there is none")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of weights")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results as JSON, the table beside it, and the plot")
    parser.add_argument("--plot", type=Path, help="default: end_to_end.png beside --out, for the repository's in docs")
    args = parser.parse_args(words)
    if args.device == "cpu" and not args.small:
        parser.error("on a CPU there is --small only")
    if min(args.steps, args.rounds) < 1:
        parser.error("--steps and --rounds are numbers from 1")
    if args.out and not args.plot:
        standard = args.out.resolve().parent == (ROOT / "benchmarks/results").resolve()
        args.plot = (ROOT / "docs/images" if standard else args.out.parent) / f"{args.out.stem}.png"
    return args


def sources() -> str:
    """A digest of the code that measured times hold for."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in measured_files())).hexdigest()[:16]


def measured_files() -> list[Path]:
    """What has a part in a measured time."""
    parts = (fastdiff.engine, fastdiff.methods, fastdiff.backbones, fastdiff.kernels.launch, architectures)
    folders = [Path(str(part.__file__)).parent for part in parts]
    files = {Path(__file__), Path(__file__).with_name("end_to_end_loop.py"), Path(str(fastdiff.uem.modules.__file__))}
    files.update(path for folder in folders for kind in ("*.py", "*.json") for path in folder.rglob(kind))
    return sorted(files)


def start(args: argparse.Namespace, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The results before anything is measured now: with the rows of an earlier run, and its times if of one origin."""
    settings = {
        "steps": args.steps,
        "rounds": args.rounds,
        "small": args.small,
        "dtype": args.dtype,
        "backend": args.backend,
        "keys": KEYS,
    }
    origin = {
        "environment": describe_environment(args.device) if args.device else None,
        "sources": sources() if args.device else None,
        "settings": settings,
    }
    results: dict[str, Any] = {**origin, "models": {}, "rows": []}
    listed = [*cells(args)]
    if earlier and earlier["settings"]["small"] == args.small:
        listed += [Cell.of(row) for row in earlier["rows"]]
        if args.device and all(earlier[name] == value for name, value in origin.items()):
            results = earlier
    described = {model: describe(model, args) for model in {cell.model: None for cell in listed}}
    known = {Cell.of(row): row for row in results["rows"]}
    for cell in listed:
        about, plans = described[cell.model]
        results["models"][cell.model] = {"name": PUBLISHED[cell.model].name, **about}
        known.setdefault(cell, {**asdict(cell), **plans[cell.plan], "failed": None, "measured": None})
    # In one order, whatever was measured when.
    results["models"] = {model: results["models"][model] for model in PUBLISHED if model in results["models"]}
    places = [[*PUBLISHED], [], [*BUILDS], [*PLANS]]
    results["rows"] = [known[cell] for cell in sorted(known, key=lambda cell: _place(cell, places))]
    return results


def _place(cell: Cell, places: list[list[str]]) -> list[int]:
    return [order.index(value) if order else value for order, value in zip(places, astuple(cell), strict=True)]


def measure_all(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Measure what was asked for and is not known; each model is on the device for as long as it is measured."""
    asked = set(cells(args))
    open_rows = [row for row in results["rows"] if Cell.of(row) in asked and not (row["measured"] or row["refused"])]
    if open_rows:
        load_compiler(args.device, args.backend)
    progress = tqdm(total=len(open_rows), desc="models, batches, builds and plans")
    for model in args.models:
        rows = [row for row in open_rows if row["model"] == model]
        if not rows:
            continue
        denoiser = Denoiser(model, small=args.small, device=args.device, dtype=getattr(torch, args.dtype))
        for row in rows:
            progress.set_postfix_str(f"{model}, {row['images']} images, {row['build']}, {row['plan']}")
            row.update({"failed": None} | tried(Cell.of(row), denoiser, args))
            write(results, args)
            progress.update()
        del denoiser
        gc.collect()
    progress.close()


def write(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the results as JSON, and the table beside it."""
    if args.out:
        write_json(args.out, results)
        args.out.with_suffix(".md").write_text(as_table(results) + "\n", encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    """Count, measure, print, and write the results."""
    args = parse(words)
    earlier = json.loads(args.out.read_text(encoding="utf-8")) if args.out and args.out.exists() else None
    if not args.device and earlier and earlier["environment"] is not None:
        print(f"There is no accelerator here. {args.out} stays as it was measured elsewhere.")
        return
    results = start(args, earlier)
    if args.device:
        measure_all(results, args)
    write(results, args)
    if args.out and any(row["measured"] for row in results["rows"]):
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(results, args.plot)
    print(as_table(results))


if __name__ == "__main__":
    main()
