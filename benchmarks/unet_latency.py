"""Latency of the methods for UNets on an accelerator, on Stable Diffusion 1.5 and SDXL at their full size.

    python benchmarks/unet_latency.py --out benchmarks/results/unet_latency.json
    python benchmarks/unet_latency.py --small --device cpu      # small copies of the models, to try it without one

Timed is the sampling loop around the denoiser, guided, so that a batch of 8 images is 16 rows. Weights are random: what
is sampled has no meaning, and neither has any value an influence on the time. The methods take turns, so that every
ratio is one of neighbours in time. What the file given by --out holds already for the same machine is kept, and the
file is written after every group, so that an interrupted run goes on where it stopped.

Without an accelerator nothing is measured, and the table says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import architectures
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from tqdm import tqdm

from fastdiff import EncoderPropagation, FeatureInheritance
from fastdiff.engine import sampling_run
from fastdiff.eval import describe_environment, paired_ratio, time_interleaved
from fastdiff.eval.provenance import describe_machine
from fastdiff.methods import Method
from fastdiff.plan import write_json

FULL = "full"
GUIDANCE = 7.5
METHODS: dict[str, Method | None] = {
    FULL: None,
    "encoder propagation, sequential": EncoderPropagation(parallel=False),
    "encoder propagation, parallel": EncoderPropagation(),
    "DeepCache, every 3rd": FeatureInheritance.deepcache(3),
}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Group:
    """Runs that are compared with each other.

    Args:
        model: key of the architecture.
        dtype: name of the weights' dtype.
        batch: images at a time.
    """

    model: str
    dtype: str
    batch: int


def sampling(denoiser: UNet2DConditionModel, batch: int, steps: int, method: Method | None) -> Callable[[int], Any]:
    """A guided sampling loop; returns what the method did in it, or None for the plain denoiser."""
    given = architectures.conditions(denoiser, 2 * batch)
    noise = architectures.sample(denoiser, batch)

    @torch.no_grad()
    def loop(_: int) -> Any:
        scheduler, latents = DDIMScheduler(), noise
        run = sampling_run(denoiser, method, scheduler=scheduler) if method else nullcontext()
        with run as sampled:
            scheduler.set_timesteps(steps, device=denoiser.device)
            for timestep in scheduler.timesteps:
                predicted = denoiser(torch.cat([latents, latents]), timestep, **given).sample
                plain, conditional = predicted.chunk(2)
                guided = plain + GUIDANCE * (conditional - plain)
                latents = scheduler.step(guided, timestep, latents).prev_sample
        return sampled and sampled.record.denoisers["denoiser"]

    return loop


def measured(group: Group, small: bool, device: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each method, JSON-compatible."""
    denoiser = architectures.unet(group.model, small=small, device=device, dtype=getattr(torch, group.dtype))
    loops = {name: sampling(denoiser, group.batch, steps, method) for name, method in METHODS.items()}
    records: dict[str, Any] = {}

    def timed(name: str) -> Callable[[int], None]:
        return lambda index: records.update({name: loops[name](index)})

    seconds = time_interleaved({name: timed(name) for name in loops}, rounds, device=device)
    rows = []
    for name in METHODS:
        record = records[name]
        did = {"peak_bytes": record.peak_bytes, "batches": record.batches} if record else {}
        speedup = asdict(paired_ratio(seconds[FULL], seconds[name]))
        rows.append({**asdict(group), "method": name, "seconds": seconds[name], "speedup": speedup, **did})
    return rows


def unmeasured(group: Group) -> list[dict[str, Any]]:
    """The same rows without a measurement."""
    return [{**asdict(group), "method": name, "seconds": None, "speedup": None} for name in METHODS]


def as_table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    steps = results["settings"]["steps"]
    lines = [
        f"| model | dtype | batch | full, ms for one evaluation | {' | '.join(list(METHODS)[1:])} |",
        "|---|---|---:|---:|" + "---:|" * (len(METHODS) - 1),
    ]
    groups: dict[Group, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(Group(row["model"], row["dtype"], row["batch"]), []).append(row)
    for group, rows in groups.items():
        cells = [architectures.TITLES[group.model], group.dtype, str(group.batch)]
        for row in rows:
            if row["seconds"] is None:
                cells.append(NOT_MEASURED)
            elif row["method"] == FULL:
                cells.append(f"{1000 * median(row['seconds']) / steps:.1f}")
            else:
                ratio = row["speedup"]
                cells.append(f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes(results)])


def notes(results: dict[str, Any]) -> list[str]:
    """On what and how it was measured."""
    settings = results["settings"]
    if results["environment"] is None:
        return ["No accelerator was at hand when this file was written; `python benchmarks/unet_latency.py` fills it."]
    small = "small copies of the models, " if settings["small"] else ""
    return [
        f"Speedup over full sampling of the same batch: {small}{settings['steps']} DDIM steps, guided, median of "
        f"{settings['rounds']} pairs (quartiles), on {describe_machine(results['environment'])}."
    ]


def start(args: argparse.Namespace) -> dict[str, Any]:
    """What is known before measuring: rows of an earlier run on the same machine with the same settings."""
    environment = describe_environment(args.device) if args.device else None
    settings = {"steps": args.steps, "rounds": args.rounds, "small": args.small, "guidance": GUIDANCE}
    results = {"environment": environment, "settings": settings, "rows": []}
    if args.device and args.out and args.out.exists():
        earlier = json.loads(args.out.read_text(encoding="utf-8"))
        if (earlier["environment"], earlier["settings"]) == (environment, settings):
            return earlier
    return results


def groups_of(args: argparse.Namespace) -> Iterator[Group]:
    """The groups that were asked for."""
    for model in args.model:
        for dtype in args.dtype:
            for batch in args.batch:
                yield Group(model, dtype, batch)


def write(results: dict[str, Any], out: Path | None) -> None:
    """Write the results as JSON, and the table beside it."""
    if out:
        write_json(out, results)
        out.with_suffix(".md").write_text(as_table(results) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=architectures.TITLES, default=[*architectures.TITLES])
    parser.add_argument(
        "--dtype", nargs="+", default=["float16", "bfloat16"], choices=["float16", "bfloat16", "float32"]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images at a time (default: 1 8)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="paired runs (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="the same layouts with fewer channels and pixels")
    default = "cuda" if torch.cuda.is_available() else None
    parser.add_argument("--device", default=default, help="default: cuda, or no measurement where there is none")
    parser.add_argument("--out", type=Path, help="also write the results as JSON, and the table beside it")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the results."""
    args = parse()
    results = start(args)
    known = {Group(row["model"], row["dtype"], row["batch"]) for row in results["rows"]}
    for group in tqdm([group for group in groups_of(args) if group not in known], desc="models, dtypes and batches"):
        rows = measured(group, args.small, args.device, args.steps, args.rounds) if args.device else unmeasured(group)
        results["rows"] += rows
        write(results, args.out)
    print(as_table(results))


if __name__ == "__main__":
    main()
