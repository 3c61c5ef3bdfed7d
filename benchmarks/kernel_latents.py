"""How far the kernels' rounding carries a sample from where the model's own operations carry it, from the same noise.

    python benchmarks/kernel_latents.py --out benchmarks/results/kernel_latents.json
    python benchmarks/kernel_latents.py --models glyphs-dit --images 4 --steps 5

The shipped models sample in half precision: as they are, after fastdiff.optimize, and after optimize(rounding=
"match_eager"), which rounds where torch's operations do. Compared are the final latents: with those in float32, which
says how far half precision goes astray anyway, and with those of the same precision as the model is. The error is the
root mean square of the difference over that of the other's latents, of each image.

On an NVIDIA GPU the kernels run; elsewhere their references in torch do, which compute the same and round alike.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tqdm import tqdm

import fastdiff
from fastdiff import zoo
from fastdiff.eval.provenance import describe_environment, describe_machine
from fastdiff.models import pipeline_class
from fastdiff.plan import write_json

MODELS = ("glyphs-dit", "glyphs-uvit", "glyphs-sd")
DTYPES = ("bfloat16", "float16")
GUIDANCE = 1.5
EAGER = "as it is"
BUILDS = {EAGER: None, "optimised": "fused", "optimised, match_eager": "match_eager"}


@dataclass(frozen=True)
class Row:
    """One build of one model.

    Attributes:
        model: name in the zoo.
        dtype: of weights and latents.
        build: key of `BUILDS`.
        to_float32: error against float32 of each image.
        to_eager: error against the model as it is in the same dtype, of each image.
        identical: images whose latents are those of the model as it is, bit for bit.
    """

    model: str
    dtype: str
    build: str
    to_float32: list[float]
    to_eager: list[float]
    identical: int


def conditions(pipe: DiffusionPipeline, images: int) -> dict[str, Any]:
    """What the denoiser is asked for, in float32: nothing in the first half of the rows, something in the second."""
    if "text_encoder" in pipe.components:
        letters = [chr(ord("A") + index % 26) for index in range(images)]
        prompts = [f"a red letter {letter} on a white background" for letter in letters]
        asked, nothing = pipe.encode_prompt(prompts, pipe.device, 1, True, [""] * images)
        return {"encoder_hidden_states": torch.cat([nothing, asked])}
    labels = torch.arange(images, device=pipe.device) % 36
    null = getattr(pipe.transformer, "null_label", None) or pipe.transformer.config["num_embeds_ada_norm"]
    return {"class_labels": torch.cat([torch.full_like(labels, null), labels])}


@torch.no_grad()
def sampled(denoiser: Any, noise: torch.Tensor, given: dict[str, Any], steps: int) -> torch.Tensor:
    """Final latents of a guided sampling loop in the denoiser's dtype, in float64."""
    given = {name: value.to(denoiser.dtype) if value.is_floating_point() else value for name, value in given.items()}
    latents, scheduler = noise.to(denoiser.dtype), DDIMScheduler()
    scheduler.set_timesteps(steps, device=noise.device)
    for timestep in scheduler.timesteps:
        rows = torch.cat([latents, latents])
        predicted = denoiser(rows, timestep.expand(len(rows)), **given).sample[:, : latents.shape[1]]
        plain, conditional = predicted.chunk(2)
        predicted = plain + GUIDANCE * (conditional - plain)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents.double()


@contextmanager
def built(denoiser: Any, build: str) -> Iterator[None]:
    """Within the block a denoiser is optimised as a build says."""
    if BUILDS[build] is not None:
        fastdiff.optimize(denoiser, rounding=BUILDS[build])
    try:
        yield
    finally:
        fastdiff.restore(denoiser)


def error(latents: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Of each image."""
    difference, size = ((part.square().flatten(1).mean(1).sqrt()) for part in (latents - other, other))
    errors: list[float] = (difference / size).tolist()
    return errors


def measure(model: str, dtypes: list[str], images: int, steps: int, device: str) -> Iterator[Row]:
    """The rows of one model."""
    folder = str(zoo.path(f"zoo:{model}"))
    pipe = pipeline_class(folder).from_pretrained(folder).to(device)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    size = denoiser.config["sample_size"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, denoiser.config["in_channels"], size, size, generator=generator).to(device)
    given = conditions(pipe, images)
    exact = sampled(denoiser, noise, given, steps)
    for dtype in dtypes:
        rounded = copy.deepcopy(denoiser).to(getattr(torch, dtype))
        eager = sampled(rounded, noise, given, steps)
        for build in BUILDS:
            with built(rounded, build):
                latents = sampled(rounded, noise, given, steps)
            identical = int((latents == eager).flatten(1).all(1).sum())
            yield Row(model, dtype, build, error(latents, exact), error(latents, eager), identical)


def as_table(rows: list[Row], settings: dict[str, Any], environment: dict[str, Any]) -> str:
    """The results in Markdown."""
    how = "the kernels" if environment["device"] != "cpu" else "the kernels' references in torch"
    lines = [
        f"{settings['images']} images, {settings['steps']} steps, by {how}, on {describe_machine(environment)}.",
        "",
        "| model | dtype | build | error to float32 | error to the model as it is | same bits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = " | ".join(map(spread, (row.to_float32, row.to_eager)))
        lines.append(f"| {row.model} | {row.dtype} | {row.build} | {errors} | {row.identical} of {len(row.to_eager)} |")
    return "\n".join(lines)


def spread(errors: list[float]) -> str:
    """Median and quartiles in percent."""
    low, middle, high = (100 * torch.tensor(errors).quantile(share).item() for share in (0.25, 0.5, 0.75))
    return "0" if not max(errors) else f"{middle:.2g} % ({low:.2g} to {high:.2g})"


def main(words: list[str] | None = None) -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], metavar="DTYPE")
    parser.add_argument("--images", type=int, default=12, help="of each model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of the scheduler (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the results as JSON, and the table beside it")
    args = parser.parse_args(words)
    if torch.device(args.device).type == "cpu":
        os.environ["FASTDIFF_KERNELS"] = "torch"
    rows: list[Row] = []
    for model in tqdm(args.models):
        rows += measure(model, args.dtypes, args.images, args.steps, args.device)
    settings = {"images": args.images, "steps": args.steps, "guidance": GUIDANCE}
    environment = describe_environment(args.device)
    table = as_table(rows, settings, environment)
    print(table)
    if args.out:
        write_json(args.out, {"rows": [*map(asdict, rows)], "settings": settings, "environment": environment})
        args.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
        print(f"wrote {args.out} and {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
