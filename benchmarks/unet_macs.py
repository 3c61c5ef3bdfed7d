"""What the methods for UNets cost in multiply-accumulates, on Stable Diffusion 1.5 and SDXL at their full size.

    python benchmarks/unet_macs.py --out benchmarks/results/unet_macs.json

The UNets have their published configurations and no weights: torch counts shapes. Takes seconds and no memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import torch
from diffusers import DDIMScheduler

from fastdiff import EncoderPropagation, FeatureInheritance
from fastdiff.backbones import Backbone, view
from fastdiff.cost import UnitCosts, count_macs
from fastdiff.engine.clock import Grid
from fastdiff.methods import Method, PlanRequest
from fastdiff.plan import ComputePlan, write_json

ENCODER = ("conv_in", "down_blocks", "mid_block")
INTERVALS = {2: "2nd", 3: "3rd", 5: "5th"}


@dataclass(frozen=True)
class Setting:
    """A row of the table: a method and the number of evaluations it is planned for."""

    label: str
    method: Method
    steps: int = 50


def settings() -> list[Setting]:
    """All rows."""
    propagation, inheritance = "Encoder propagation", "Feature inheritance"
    return [
        Setting(f"{propagation}, 9 keys of 50", EncoderPropagation()),
        Setting(f"{propagation}, 7 keys of 20", EncoderPropagation(), 20),
        *(Setting(f"DeepCache, every {nth}", FeatureInheritance.deepcache(n)) for n, nth in INTERVALS.items()),
        *(Setting(f"{inheritance}, every {nth}", FeatureInheritance(n)) for n, nth in INTERVALS.items()),
    ]


def costs_of(backbone: Backbone) -> UnitCosts:
    """MACs of every unit for one sample, counted without computing; latency is taken to be as the MACs are."""
    denoiser = backbone.denoiser
    timestep = torch.zeros(1, device=denoiser.device)
    inputs = {"sample": architectures.sample(denoiser, 1), "timestep": timestep}
    macs, rest = count_macs(backbone, inputs | architectures.conditions(denoiser, 1))
    return UnitCosts(backbone.names, macs, rest, macs, rest)


def encoder_share(backbone: Backbone, costs: UnitCosts) -> float:
    """Share of an evaluation's MACs that first convolution, down stages and bottleneck take."""
    is_encoder = [unit.stage.partition(".")[0] in ENCODER for unit in backbone.units]
    return float(costs.macs[is_encoder].sum() / costs.total_macs)


def planned(backbone: Backbone, costs: UnitCosts, setting: Setting) -> ComputePlan:
    """What a setting runs on a DDIM grid."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(setting.steps)
    request = PlanRequest(backbone, Grid.of(scheduler), lambda: costs)
    return setting.method.plan(request).validate(backbone.traits).prune(backbone.traits)


def measured(key: str) -> dict[str, Any]:
    """Everything about one architecture, JSON-compatible."""
    backbone = view(architectures.unet(key, device="meta"))
    costs = costs_of(backbone)
    size = backbone.denoiser.config.sample_size
    return {
        "model": architectures.TITLES[key],
        "latents": [size, size],
        "text_tokens": architectures.TEXT_TOKENS,
        "macs_per_evaluation": costs.total_macs,
        "encoder_share": encoder_share(backbone, costs),
        "rows": [
            {
                "label": setting.label,
                "method": setting.method.to_dict(),
                "steps": setting.steps,
                "macs_share": planned(backbone, costs, setting).cost(costs).macs_share,
            }
            for setting in settings()
        ],
    }


def as_table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    heads = [f"{result['model']} | at best" for result in results]
    lines = [f"| MACs of full sampling | {' | '.join(heads)} |", "|---|" + "---:|---:|" * len(results)]
    for rows in zip(*(result["rows"] for result in results), strict=True):
        cells = [f"{row['macs_share']:.1%} | {1 / row['macs_share']:.2f}×" for row in rows]
        lines.append(f"| {rows[0]['label']} | {' | '.join(cells)} |")
    lines += ["", "*At best*: the speedup of a denoiser whose time is in proportion to its multiply-accumulates."]
    for result in results:
        height, width = result["latents"]
        lines += [
            "",
            f"{result['model']}: {result['macs_per_evaluation'] / 1e9:.1f} GMAC for one evaluation of one sample "
            f"({height}×{width} latents, {result['text_tokens']} text tokens), {result['encoder_share']:.1%} of them "
            "in the encoder: first convolution, down stages and bottleneck.",
        ]
    return "\n".join(lines)


def main() -> None:
    """Count, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the results as JSON, and the table beside it")
    args = parser.parse_args()
    results = [measured(key) for key in architectures.TITLES]
    table = as_table(results)
    print(table)
    if args.out:
        write_json(args.out, {"architectures": results})
        args.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
        print(f"wrote {args.out} and {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
