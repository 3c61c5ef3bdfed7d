"""What fastdiff itself costs: a full plan against the plain pipeline, and exits against their share of the depth.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

The model has the size of DiT-S/2 at 256 px: 12 blocks, width 384, 256 tokens, batch 8, random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import fastdiff
from fastdiff.engine import sampling_run
from fastdiff.eval.provenance import describe_environment, describe_machine
from fastdiff.eval.speed import Ratio, paired_ratio, time_interleaved
from fastdiff.plan import write_json

BLOCKS, BATCH = 12, 8
FULL_LIMIT, EXIT_MARGIN = 1.02, 0.03


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


def exit_shares(pipe: DiTPipeline, steps: int, rounds: int, device: str) -> dict[int, Ratio]:
    """Time of the denoiser that exits after so many blocks over its full time."""
    latents = torch.randn(BATCH, 4, 32, 32, device=device, dtype=pipe.transformer.dtype)
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)
    timesteps = torch.linspace(999, 0, steps)

    def run(depth: int) -> Callable[[int], None]:
        def evaluate(_: int) -> None:
            schedule = fastdiff.ExitSchedule(bin_edges=(0,), depths=(depth,))
            with torch.no_grad(), sampling_run(pipe.transformer, schedule, timesteps=timesteps) as sampling:
                for timestep in timesteps:
                    pipe.transformer(latents, timestep=timestep.to(device).expand(BATCH), class_labels=labels)
                    sampling.tick()

        return evaluate

    depths = (BLOCKS, BLOCKS * 3 // 4, BLOCKS // 2, BLOCKS // 4)
    seconds = time_interleaved({str(depth): run(depth) for depth in depths}, rounds, device=device)
    return {depth: paired_ratio(seconds[str(depth)], seconds[str(BLOCKS)]) for depth in depths[1:]}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="paired runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="evaluations in a run (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    args = parser.parse_args()

    environment = describe_environment(args.device)
    pipe = dit_s_2().to(args.device)
    rows = [("full plan / plain pipeline", pipeline_overhead(pipe, args.steps, args.rounds, args.device), FULL_LIMIT)]
    for depth, ratio in exit_shares(pipe, args.steps, args.rounds, args.device).items():
        rows.append((f"exit after {depth} of {BLOCKS} blocks / full denoiser", ratio, depth / BLOCKS + EXIT_MARGIN))
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
