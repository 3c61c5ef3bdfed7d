"""The demo's report: one HTML file that needs nothing else, neither network nor neighbours."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from fastdiff.cli.pictures import SHOWN, png, strip
from fastdiff.cli.report_template import TEMPLATE
from fastdiff.cli.results import change_text, distance_text, headline, notes, psnr_text
from fastdiff.eval.provenance import describe_machine

if TYPE_CHECKING:
    from fastdiff.cli.comparison import Comparison


def render(comparison: Comparison, data: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The report as HTML.

    Args:
        comparison: what was measured.
        data: the same as `fastdiff.cli.results.as_data` gives it.
        images: PNG files by name: ``"trade-off"``, and ``"plans/KEY"`` for each contender.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        psnr=psnr_text, distance=distance_text, change=change_text, percent=_percent, fixed=_fixed
    )
    labels = {row.contender.key: row.contender.label for row in comparison.rows}
    groups = [(group, list(rows)) for group, rows in groupby(comparison.rows, key=lambda row: row.contender.group)]
    return environment.from_string(TEMPLATE).render(
        comparison=comparison,
        settings=comparison.settings,
        environment=data["environment"],
        machine=describe_machine(data["environment"]),
        date=data["date"],
        data_rows={row["key"]: row for row in data["rows"]},
        groups=groups,
        labels=labels,
        shown_labels=[comparison.task.label(index) for index in SHOWN if index < comparison.settings.count],
        headline=headline(comparison),
        notes=notes(comparison),
        scores={row.contender.key: row.score for row in comparison.rows},
        fastest=max(row.speedup.median for row in comparison.rows),
        strips={row.contender.key: _inline(png(strip(row))) for row in comparison.rows},
        pictures={name: _inline(picture) for name, picture in images.items()},
        planned=[row for row in comparison.rows if row.contender.methods],
    )


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"


def _fixed(number: float, digits: int) -> str:
    return f"{number:.{digits}f}"


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
