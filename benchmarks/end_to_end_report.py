"""Table and plot of `end_to_end`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastdiff.eval.provenance import describe_machine


@dataclass(frozen=True)
class Build:
    """A way to run a model.

    Args:
        title: in tables.
        kernels: whether `fastdiff.optimize` treats it.
        compiled: whether its blocks are compiled.
        graphs: whether its evaluations are replayed as CUDA graphs.
    """

    title: str
    kernels: bool = False
    compiled: bool = False
    graphs: bool = False


BUILDS = {
    "eager": Build("eager"),
    "kernels": Build("kernels", kernels=True),
    "compile": Build("regional compile", compiled=True),
    "compile-kernels": Build("regional compile + kernels", kernels=True, compiled=True),
    "graphs": Build("kernels + CUDA graphs", kernels=True, graphs=True),
}
PLANS = {
    "full": "full",
    "half": "depth share 0.5",
    "sequential": "encoder propagation, sequential",
    "parallel": "encoder propagation, parallel",
    "uncertainty": "uncertainty exit",
}
HEADS = ("images", "build", "plan", "images/s", "peak GiB", "cold start, s", "speed-up", "by MACs", "realised")
NOT_MEASURED, REFUSED, FAILED = "not measured", "refused", "failed"


def by_macs(row: dict[str, Any]) -> float | None:
    """The speed-up of a row's plan if time were in proportion to multiply-accumulates; None where there is no plan."""
    return 1 / row["macs_share"] if row["macs_share"] else None


def realised(row: dict[str, Any]) -> float | None:
    """The speed-up over eager full sampling, as a multiple of that by multiply-accumulates."""
    expected = by_macs(row)
    return row["measured"]["speedup"]["median"] / expected if row["measured"] and expected else None


def images_per_second(row: dict[str, Any]) -> float:
    """Of a measured row, at its median."""
    return float(row["images"] / median(row["measured"]["seconds"]))


def as_table(results: dict[str, Any]) -> str:
    """The results in Markdown: a table for each model."""
    parts = [*notes(results)]
    for model, about in results["models"].items():
        rows = [row for row in results["rows"] if row["model"] == model]
        if rows:
            parts += ["", f"## {about['name']}", "", _counted(about), "", *_lines(rows), *_reasons(rows)]
    return "\n".join(parts)


def notes(results: dict[str, Any]) -> list[str]:
    """On what and how it was measured."""
    settings = results["settings"]
    how = (
        f"The sampling loop around the denoiser, {settings['steps']} steps of DDIM, or of Euler for models of flows, "
        f"guided; random weights{' of small copies' if settings['small'] else ''}. *Speed-up*: over the eager build "
        "under the full plan, median of pairs (quartiles). *By MACs*: what it would be if time were in proportion to "
        "the plan's multiply-accumulates, which are counted on shapes and not measured; uncertainty modules' own are "
        "left out. *Realised*: the one over the other. *Cold start*: from the plain model to its first finished "
        "evaluation, with nothing compiled beforehand. *Peak*: of memory that torch allocated, weights included. "
        f"Encoder propagation has every {settings['keys']}th evaluation as a key; under *uncertainty exit* every "
        "sample stops half way, and all exits up to there are asked."
    )
    if results["environment"] is None:
        said = "No accelerator was at hand when this file was written; `python benchmarks/end_to_end.py` fills it."
        return [said, "", how]
    measured = f"{settings['rounds']} rounds in {settings['dtype']}, compiled with {settings['backend']}"
    return [f"{measured}, on {describe_machine(results['environment'])}.", "", how]


def _counted(about: dict[str, Any]) -> str:
    return (
        f"{about['parameters'] / 1e6:.1f} million weights in {about['units']} units, {about['macs'] / 1e9:.1f} GMAC "
        "for one evaluation of one row (counted)."
    )


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"| {' | '.join(HEADS)} |", "|---:|---|---|" + "---:|" * (len(HEADS) - 3)]
    for row in rows:
        cells = [str(row["images"]), BUILDS[row["build"]].title, PLANS[row["plan"]], *_numbers(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _numbers(row: dict[str, Any]) -> list[str]:
    expected = by_macs(row)
    macs = f"{expected:.2f}×" if expected else "–"
    if not row["measured"]:
        word = REFUSED if row["refused"] else FAILED if row["failed"] else NOT_MEASURED
        return [word, "–", "–", "–", macs, "–"]
    measured, ratio = row["measured"], row["measured"]["speedup"]
    peak = measured["peak_bytes"]
    return [
        f"{images_per_second(row):.3g}",
        "–" if peak is None else f"{peak / 2**30:.2f}",
        f"{measured['cold_start']:.2f}",
        f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})",
        macs,
        f"{realised(row):.2f}",
    ]


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Why rows have no numbers, and what the library says of those that have; each said once."""
    said: dict[str, list[str]] = {}
    for row in rows:
        place = f"{PLANS[row['plan']]}, {BUILDS[row['build']].title}"
        found = [f"{word}: {row[word]}" for word in (REFUSED, FAILED) if row[word]]
        for why in found + (row["measured"]["notes"] if row["measured"] else []):
            places = said.setdefault(why, [])
            if place not in places:
                places.append(place)
    lines = []
    for why, places in said.items():
        plans = {place.partition(", ")[0] for place in places}
        everywhere = len(places) == len({row["build"] for row in rows}) and len(plans) == 1
        lines.append(f"- {next(iter(plans)) if everywhere else '; '.join(places)}: {why}")
    return ["", *lines] if lines else []


def draw(results: dict[str, Any], path: Path) -> None:
    """Speed-ups of every model as bars, with a line at what each plan has by multiply-accumulates."""
    from matplotlib.figure import Figure

    measured = [row for row in results["rows"] if row["measured"]]
    panels = list(dict.fromkeys((row["model"], row["images"]) for row in measured))
    figure = Figure(figsize=(11, 2.4 * ((len(panels) + 1) // 2) + 0.8), layout="constrained")
    grid = [*figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flat]
    builds = [build for build in BUILDS if any(row["build"] == build for row in measured)]
    for axes, (model, images) in zip(grid, panels, strict=False):
        rows = [row for row in measured if (row["model"], row["images"]) == (model, images)]
        plans = [plan for plan in PLANS if any(row["plan"] == plan for row in rows)]
        for number, build in enumerate(builds):
            shown = [row for row in rows if row["build"] == build]
            places = [plans.index(row["plan"]) + 0.16 * (number - (len(builds) - 1) / 2) for row in shown]
            ratios = [row["measured"]["speedup"] for row in shown]
            spread = [
                [ratio["median"] - ratio["low"] for ratio in ratios],
                [ratio["high"] - ratio["median"] for ratio in ratios],
            ]
            heights = [ratio["median"] for ratio in ratios]
            axes.bar(
                places, heights, 0.15, yerr=spread, label=BUILDS[build].title, color=f"C{number}", error_kw={"lw": 0.8}
            )
        for place, plan in enumerate(plans):
            expected = next(by_macs(row) for row in rows if row["plan"] == plan)
            axes.hlines(expected or 1, place - 0.42, place + 0.42, color="black", linewidth=1)
        axes.set_xticks(range(len(plans)), [PLANS[plan].replace(", ", ",\n") for plan in plans], fontsize=8)
        title = f"{results['models'][model]['name']}, {images} image{'' if images == 1 else 's'} at a time"
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("speed-up", fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(builds), fontsize=8, frameon=False)
    figure.suptitle(f"{results['environment']['device']}; lines: speed-up by multiply-accumulates", fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Software": None})
