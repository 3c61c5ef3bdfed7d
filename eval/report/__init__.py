"""What people see of an evaluation: tables, plots, pictures and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdiff.eval.report.page import render
from fastdiff.eval.report.plots import as_bytes, draw_plan, draw_samples, draw_trade_off, is_drawn
from fastdiff.eval.report.tables import as_csv, as_markdown, deciding_criteria
from fastdiff.eval.results import Results, as_data
from fastdiff.plan import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]


def write_report(results: Results, images: Mapping[str, np.ndarray], folder: Path) -> None:
    """Write ``results.json``, ``.csv``, ``.md`` and in brief ``summary.md``, plots, the plans and ``report.html``.

    Args:
        results: the rows.
        images: those that are shown, uint8 of shape ``(n, height, width, 3)`` by key; the same seeds in each.
        folder: where to.
    """
    pictures = {}
    for name, figure in _figures(results, images).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pictures[name] = as_bytes(figure, dpi=150)
        (folder / f"{name}.png").write_bytes(pictures[name])
        if name.startswith("trade-off"):
            (folder / f"{name}.svg").write_bytes(as_bytes(figure, "svg"))
    for point in results.points:
        if point.plan is not None:
            point.plan.save(folder / "plans" / f"{point.key}.json")
    write_json(folder / "results.json", as_data(results))
    (folder / "results.csv").write_text(as_csv(results), encoding="utf-8")
    (folder / "results.md").write_text(as_markdown(results), encoding="utf-8")
    (folder / "summary.md").write_text(as_markdown(results, brief=True), encoding="utf-8")
    (folder / "report.html").write_text(render(results, images, pictures), encoding="utf-8")


def _figures(results: Results, images: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """All figures by name."""
    from matplotlib import pyplot

    with pyplot.rc_context({"backend": "Agg", "svg.hashsalt": "fastdiff"}):
        figures = {"samples": draw_samples(results, images)}
        for name in deciding_criteria(results):
            if sum(is_drawn(results, point, name) for point in results.points) > 1:
                figures[f"trade-off-{name}"] = draw_trade_off(results, name)
        figures |= {f"plans/{point.key}": draw_plan(point) for point in results.measured if point.plan is not None}
        for figure in figures.values():
            pyplot.close(figure)
    return figures
