"""Table and plot of `kernel_speed`."""

from __future__ import annotations

from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from kernel_checks.listed import COLD, LAUNCH, Case

from fastdiff.eval import Ratio, paired_ratio
from fastdiff.eval.provenance import describe_machine

COPY = "copy"
OURS = "fastdiff"
OTHERS = {
    "eager": "over eager",
    "compiled, default": "over `torch.compile`",
    "compiled, max-autotune": "over `torch.compile`, max-autotune",
}
"""Contenders, and what the column about each is called."""
NOT_MEASURED = "not measured"
TESTS_FAILED = "tests did not pass"


def unmeasured(case: Case, dtype: str, regime: str) -> dict[str, Any]:
    """The row of a case, without times."""
    return {
        "kernel": case.kernel,
        "model": case.model,
        "what": case.what,
        "shape": case.shape,
        "dtype": dtype,
        "regime": regime,
        "bytes": case.moved(getattr(torch, dtype)),
        "tests_passed": None,
        "seconds": None,
    }


def ratio(row: dict[str, Any], name: str) -> Ratio:
    """How many times as long a contender took as the kernel, over pairs; for the copy, the fraction of the floor."""
    return paired_ratio(row["seconds"][name], row["seconds"][OURS])


def shown(row: dict[str, Any]) -> bool:
    """Whether there are times that may be shown: of a kernel whose tests passed in the process that measures."""
    return bool(row["tests_passed"] and row["seconds"])


def slower(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows in which the kernel takes longer than torch's own operations."""
    return [row for row in results["rows"] if shown(row) and ratio(row, "eager").median < 1]


def as_table(results: dict[str, Any]) -> str:
    """The results in Markdown: one table for each kernel."""
    kernels = dict.fromkeys(row["kernel"] for row in results["rows"])
    parts = [*notes(results)]
    for kernel in kernels:
        parts += ["", f"## {kernel}", "", *_lines([row for row in results["rows"] if row["kernel"] == kernel])]
    if any(map(shown, results["rows"])):
        parts += ["", "## Slower than eager", "", *_exclusions(results)]
    return "\n".join(parts)


def notes(results: dict[str, Any]) -> list[str]:
    """On what and how it was measured."""
    if results["environment"] is None:
        return ["No NVIDIA GPU was at hand when this file was written; `python benchmarks/kernel_speed.py` fills it."]
    rounds = results["settings"]["rounds"]
    return [
        f"Medians (quartiles) of {rounds} rounds in which all contenders take turns; ratios are of pairs of one round. "
        f"On {describe_machine(results['environment'])}. *Of the floor* is the time of a copy of as many bytes as must "
        "be read and written, over the kernel's. A ratio above 1 says that the kernel is faster. Cold: inputs are "
        "evicted from the second-level cache before every call. L2-warm: they are in it. Launch-bound: wall-clock time "
        "of calls in a row. Compiled code runs without CUDA graphs.",
    ]


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    heads = ["model", "shape", "dtype", "regime", "MB", "µs", "of the floor", *OTHERS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|" + "---:|" * (len(heads) - 4)]
    for row in rows:
        where = ", ".join(part for part in (row["model"], row["what"]) if part) or "–"
        cells = [where, row["shape"], row["dtype"], row["regime"], f"{row['bytes'] / 1e6:.3g}", *_numbers(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _numbers(row: dict[str, Any]) -> list[str]:
    if not shown(row):
        return [TESTS_FAILED if row["tests_passed"] is False else NOT_MEASURED] * (2 + len(OTHERS))
    times = [1e6 * second for second in row["seconds"][OURS]]
    low, _, high = quantiles(times, n=4, method="inclusive")
    floor = ratio(row, COPY)
    return [
        f"{median(times):.3g} ({low:.3g}–{high:.3g})",
        f"{floor.median:.2f} ({floor.low:.2f}–{floor.high:.2f})",
        *(f"{each.median:.2f}× ({each.low:.2f}–{each.high:.2f})" for each in (ratio(row, name) for name in OTHERS)),
    ]


def _exclusions(results: dict[str, Any]) -> list[str]:
    found = slower(results)
    if not found:
        return ["None of the measured shapes."]
    lines = [
        f"- `{row['kernel']}`: "
        + ", ".join(part for part in (row["model"], row["what"], row["shape"], row["dtype"], row["regime"]) if part)
        + f": {ratio(row, 'eager').median:.2f}×"
        for row in found
    ]
    return ["At these shapes dispatch must not choose the kernel.", "", *lines]


def draw(results: dict[str, Any], path: Path) -> None:
    """Fraction of the copy's speed over the bytes moved, in the cold regime and in the one bound by launches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    kernels = dict.fromkeys(row["kernel"] for row in results["rows"] if shown(row))
    for kernel in kernels:
        rows = [row for row in results["rows"] if row["kernel"] == kernel and shown(row)]
        rows = sorted((row for row in rows if row["regime"] in (COLD, LAUNCH)), key=lambda row: row["bytes"])
        floors = [ratio(row, COPY) for row in rows]
        middles = [floor.median for floor in floors]
        spread = [[f.median - f.low for f in floors], [f.high - f.median for f in floors]]
        axes.errorbar([row["bytes"] / 1e6 for row in rows], middles, spread, fmt="o", ms=4, capsize=2, label=kernel)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(
        xscale="log", ylim=(0, None), xlabel="MB that must be read and written", ylabel="fraction of a copy's speed"
    )
    axes.set_title(results["environment"]["device"])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
