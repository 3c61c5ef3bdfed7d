"""What fastdiff itself costs: a full plan against the plain pipeline, and exits against their share of the depth.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

The model has the size of DiT-S/2 at 256 px: 12 blocks, width 384, 256 tokens, random weights; batch 8, and
16 where each sample exits on its own.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import fastdiff
from fastdiff.engine import sampling_run
from fastdiff.eval.provenance import describe_environment, describe_machine
from fastdiff.eval.speed import Ratio, paired_ratio, time_interleaved
from fastdiff.plan import write_json
from fastdiff.uem import UncertaintyModules, make_modules

BLOCKS, BATCH, MANY = 12, 8, 16
FULL_LIMIT, EXIT_MARGIN, OWN_EXIT_MARGIN = 1.02, 0.03, 0.10


def dit_s_2() -> DiTPipeline:
    """A DiT pipeline of that size whose decoder costs next to nothing."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=BLOCKS, sample_size=32, in_channels=4, out_channels=4
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_overhead(pipe: DiTPipeline, steps: int, rounds: int, device: str) -> Ratio:
    """Time of the pipeline with a full plan over the plain pipeline's."""

    def sample(_: int) -> Any:
        generator = torch.Generator(device).manual_seed(0)
        return pipe([0] * BATCH, guidance_scale=1.0, num_inference_steps=steps, generator=generator, output_type="np")

    def with_full_plan(index: int) -> Any:
        fastdiff.enable(pipe, fastdiff.ExitSchedule("full"))
        return sample(index)

    @contextmanager
    def disabled_after(_: str) -> Iterator[None]:
        yield
        fastdiff.disable(pipe)

    contenders = {"plain": sample, "full plan": with_full_plan}
    seconds = time_interleaved(contenders, rounds, device=device, around=disabled_after)
    return paired_ratio(seconds["full plan"], seconds["plain"])


class Evaluations:
    """Some evaluations of the denoiser, one after the other.

    Args:
        pipe: the pipeline.
        batch: samples.
        steps: evaluations.
        device: where.
    """

    def __init__(self, pipe: DiTPipeline, batch: int, steps: int, device: str) -> None:
        self.denoiser = pipe.transformer
        self.timesteps = torch.linspace(999, 0, steps)
        self.calls = [
            {
                "hidden_states": torch.randn(batch, 4, 32, 32, device=device, dtype=self.denoiser.dtype),
                "timestep": timestep.to(device).expand(batch),
                "class_labels": torch.zeros(batch, dtype=torch.long, device=device),
            }
            for timestep in self.timesteps
        ]

    def __call__(self, method: fastdiff.Method) -> float:
        """Run them; returns the share of blocks that ran, of all samples together."""
        with torch.no_grad(), sampling_run(self.denoiser, method, timesteps=self.timesteps) as sampling:
            for call in self.calls:
                self.denoiser(**call)
                sampling.tick()
        return sampling.record.denoisers["denoiser"].computed_share

    def timed(self, methods: dict[str, fastdiff.Method], rounds: int, device: str) -> dict[str, Ratio]:
        """Time with each method over that with the first."""
        contenders = {name: partial(self._once, method) for name, method in methods.items()}
        seconds = time_interleaved(contenders, rounds, device=device)
        first, *others = methods
        return {name: paired_ratio(seconds[name], seconds[first]) for name in others}

    def _once(self, method: fastdiff.Method, _: int) -> None:
        self(method)


def exit_shares(pipe: DiTPipeline, steps: int, rounds: int, device: str) -> Iterator[tuple[str, Ratio, float]]:
    """Time of the denoiser that exits after so many blocks over its full time."""
    methods = {
        f"exit after {depth} of {BLOCKS} blocks": fastdiff.ExitSchedule(bin_edges=(0,), depths=(depth,))
        for depth in (BLOCKS, BLOCKS * 3 // 4, BLOCKS // 2, BLOCKS // 4)
    }
    shares = {name: method.depths[0] / BLOCKS for name, method in methods.items()}
    for name, ratio in Evaluations(pipe, BATCH, steps, device).timed(methods, rounds, device).items():
        yield f"{name} / full denoiser", ratio, shares[name] + EXIT_MARGIN


def own_exits(pipe: DiTPipeline, steps: int, rounds: int, device: str) -> Iterator[tuple[str, Ratio, float]]:
    """Time of the denoiser where each sample exits on its own over its full time."""
    evaluations = Evaluations(pipe, MANY, steps, device)
    modules = make_modules(pipe.transformer, evaluations.calls[0])
    for module in modules.uncertainty:
        torch.nn.init.normal_(module.probe.weight, std=0.2)  # so that samples are told apart
    modules.to(device)
    methods: dict[str, fastdiff.Method] = {"full": fastdiff.ExitSchedule("full")}
    shares: dict[str, float] = {}
    for wanted in (0.75, 0.5, 0.25):
        method, share = at_share(evaluations, modules, wanted)
        name = f"each sample on its own, {share:.0%} of the blocks"
        methods[name], shares[name] = method, share
    for name, ratio in evaluations.timed(methods, rounds, device).items():
        yield f"{name}, batch {MANY} / full denoiser", ratio, shares[name] + OWN_EXIT_MARGIN


def at_share(
    evaluations: Evaluations, modules: UncertaintyModules, wanted: float
) -> tuple[fastdiff.UncertaintyExit, float]:
    """Exits whose share of the blocks is near a wanted one, and that share."""
    low, high = 0.0, 1.0
    found: list[tuple[float, fastdiff.UncertaintyExit, float]] = []
    for _ in range(12):
        method = fastdiff.UncertaintyExit.of(modules, threshold=(low + high) / 2)
        share = evaluations(method)
        found.append((abs(share - wanted), method, share))
        low, high = (low, method.threshold) if share < wanted else (method.threshold, high)
    _, method, share = min(found, key=itemgetter(0))
    return method, share


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="paired runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="evaluations in a run (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    args = parser.parse_args()

    warnings.simplefilter("ignore", fastdiff.FastDiffNoEffectWarning)  # full depth is part of the comparison
    environment = describe_environment(args.device)
    pipe = dit_s_2().to(args.device)
    rows = [("full plan / plain pipeline", pipeline_overhead(pipe, args.steps, args.rounds, args.device), FULL_LIMIT)]
    for measured_rows in (exit_shares, own_exits):
        rows += measured_rows(pipe, args.steps, args.rounds, args.device)
    table = as_table(rows, environment)
    print(table)
    if args.out:
        measured = [{"what": what, **vars(ratio), "target": limit} for what, ratio, limit in rows]
        settings = {"blocks": BLOCKS, "batch": BATCH, "steps": args.steps}
        write_json(args.out, {"measured": measured, "settings": settings, "environment": environment})
        args.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
        print(f"wrote {args.out} and {args.out.with_suffix('.md')}")


def as_table(rows: list[tuple[str, Ratio, float]], environment: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        f"{BLOCKS} blocks of width 384, 256 tokens, batch {BATCH}, on {describe_machine(environment)}.",
        "",
        "| time ratio | median | quartiles | target | pairs |",
        "|---|---|---|---|---|",
    ]
    for what, ratio, limit in rows:
        lines.append(
            f"| {what} | {ratio.median:.3f} | {ratio.low:.3f} to {ratio.high:.3f} | {limit:.3f} | {ratio.pairs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
