"""The results as one HTML file that needs nothing else, neither network nor neighbours."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import groupby

import numpy as np
from jinja2 import Environment, StrictUndefined

from fastdiff.eval.judging import CRITERIA
from fastdiff.eval.points import Timing
from fastdiff.eval.provenance import describe_machine
from fastdiff.eval.report import texts
from fastdiff.eval.report.headline import headline
from fastdiff.eval.report.plots import as_bytes, chosen, strip
from fastdiff.eval.report.tables import name_of, notes
from fastdiff.eval.report.template import TEMPLATE
from fastdiff.eval.results import Results, group_of


def render(results: Results, images: Mapping[str, np.ndarray], pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        results: the rows.
        images: those that are shown, uint8 of shape ``(n, height, width, 3)`` by key.
        pictures: PNG files by name: ``"trade-off-CRITERION"``, and ``"plans/KEY"``.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    speedups = [results.speedup(point) or 0.0 for point in results.points]
    environment.filters.update(
        name=name_of,
        speedup=lambda timing: texts.median(timing.speedup if timing else None),
        bar=_bar,
        percent=texts.percent,
        fixed=lambda number, digits: f"{number:.{digits}f}",
        seconds=texts.seconds,
        value=lambda told, name: texts.value(name, told),
    )
    matched = any(results.match(point) for point in results.points)
    criteria = results.criteria
    timed = (1 if results.batch else 0) + (1 if results.batch not in (None, 1) else 0)
    environment_told = dict(results.header["environment"])
    return environment.from_string(TEMPLATE).render(
        results=results,
        header=results.header,
        headline=headline(results),
        machine=describe_machine(environment_told),
        facts={**environment_told, "commit": results.header["commit"], "date": results.header["date"]},
        groups=[(group, list(points)) for group, points in groupby(results.points, key=group_of)],
        criteria=criteria,
        floor=results.header.get("floor"),
        catalogue=CRITERIA,
        columns=timed + 1 + len(criteria) + matched,
        matched=matched,
        fastest=max(speedups),
        shown=len(chosen(results.header["num_samples"])),
        strips={key: _inline(as_bytes(strip(shown))) for key, shown in images.items()},
        plots=[name for name in criteria if f"trade-off-{name}" in pictures],
        pictures={name: _inline(picture) for name, picture in pictures.items()},
        planned=[point for point in results.measured if f"plans/{point.key}" in pictures],
        notes=notes(results),
    )


def _bar(timing: Timing | None, fastest: float) -> str:
    return "0" if timing is None else f"{100 * timing.speedup.median / fastest:.1f}"


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
