"""The results of an evaluation: what every way of sampling gained and cost, and where the numbers come from."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import fastdiff
from fastdiff.errors import ConfigError
from fastdiff.eval.judging import CRITERIA, change, pooled, verdict
from fastdiff.eval.points import Point, Timing, read_points
from fastdiff.eval.store import Store
from fastdiff.eval.ways import BASELINE, FEWER_STEPS, MAIN

SCHEMA_VERSION = 1
KINDS = ("baseline", "fastdiff", "peer", "steps")
"""Kinds of rows, in the order in which they are shown."""
HEAVY = ("values", "resampled")
"""What a criterion is computed from; it stays in the folder of the sweep."""


@dataclass(frozen=True)
class Results:
    """What an evaluation found out.

    Args:
        header: settings, environment and whatever else all rows have in common, JSON-compatible.
        points: one for each way of sampling, in the order in which they are shown.
        batch: images at a time in the timing that speedups are told from first; None if nothing was timed.
    """

    header: Mapping[str, Any]
    points: Sequence[Point]
    batch: int | None

    def point(self, key: str) -> Point:
        """The point of a way."""
        return next(point for point in self.points if point.key == key)

    @property
    def measured(self) -> list[Point]:
        """The points that could be sampled."""
        return [point for point in self.points if point.quality is not None]

    @property
    def criteria(self) -> list[str]:
        """The criteria that at least one point has."""
        return [name for name in CRITERIA if any(name in (point.quality or {}) for point in self.points)]

    def timing(self, point: Point) -> Timing | None:
        """How fast a point is, in batches."""
        return None if self.batch is None else point.timings.get(self.batch)

    def match(self, point: Point) -> Point | None:
        """Plain sampling in the time that the point takes."""
        found = [other for other in self.measured if other.key == point.same_time]
        return found[0] if found else None

    def verdict(self, point: Point) -> str | None:
        """What the point is to plain sampling in the same time: better, worse, mixed or level."""
        match = self.match(point)
        if match is None or point.quality is None or match.quality is None:
            return None
        return verdict(point.quality, match.quality)

    def speedup(self, point: Point) -> float | None:
        """The median speedup, in batches."""
        timing = self.timing(point)
        return None if timing is None else timing.speedup.median

    def dominated(self, criterion: str, among: Sequence[Point] | None = None) -> set[str]:
        """Keys of the points that another is at least as fast as and at least as good, and better in one of them.

        Args:
            criterion: what is good.
            among: the points that are compared; None for all.
        """
        better = CRITERIA[criterion].better
        places = {
            point.key: (self.speedup(point) or 0.0, better * point.quality[criterion]["value"])
            for point in (self.measured if among is None else among)
            if point.quality and criterion in point.quality and self.speedup(point) is not None
        }
        return {
            key
            for key, place in places.items()
            if any(other != place and other[0] >= place[0] and other[1] >= place[1] for other in places.values())
        }


def collect(
    stores: Sequence[Store],
    header: Mapping[str, Any],
    *,
    keys: Collection[str] | None = None,
    batch: int | None = None,
) -> Results:
    """Read what one sweep for each set of seeds left; the first was timed.

    Args:
        stores: the sweeps' folders.
        header: what is to be said of all rows.
        keys: of the ways that are wanted; None for all that the folders hold.
        batch: images at a time in the timing that speedups are told from first; None for the largest.

    Raises:
        StoreError: if a folder holds no sweep.
    """
    sets = [{point.key: point for point in read_points(store)} for store in stores]
    wanted = [key for key in sets[0] if keys is None or key in keys]
    points = [_over_sets([found[key] for found in sets if key in found], len(sets)) for key in wanted]
    timed = stores[0].timed_batches
    results = Results(header, points, batch if batch in timed else max(timed, default=None))
    return replace(results, points=sorted(points, key=lambda point: _place(results, point)))


def _over_sets(points: Sequence[Point], sets: int) -> Point:
    """One point of those that differ in their seeds only; it has images only if every set of seeds has."""
    errors = [_without_folders(point.error) for point in points if point.error is not None]
    qualities = [_finite(point.quality) for point in points if point.quality is not None]
    complete = len(qualities) == sets and not errors
    return replace(
        points[0],
        quality=pooled(qualities) if complete else None,
        notes=list(dict.fromkeys(note for point in points for note in point.notes)),
        error=errors[0] if errors else None,
    )


def _finite(quality: Mapping[str, Any]) -> dict[str, Any]:
    """Without the criteria whose value was not finite."""
    return {name: told for name, told in quality.items() if told.get("value") is not None}


_FOLDERS = re.compile(r"(?<![\w:/.])(?:/|[A-Za-z]:\\)(?:[^\s/\\'\"]+[/\\])+(?=[^\s/\\'\"])")


def _without_folders(error: Mapping[str, str]) -> dict[str, str]:
    """An error without the folders in its message: results are published, and say nothing of a user's disk."""
    return {**error, "message": _FOLDERS.sub("", error["message"])}


def kind_of(point: Point) -> str:
    """One of `KINDS`."""
    if point.is_baseline or point.way["group"] == BASELINE:
        return "baseline"
    if point.way["peer"] is not None:
        return "peer"
    return "steps" if point.way["plain"] else "fastdiff"


def group_of(point: Point) -> str:
    """What the rows that a point stands with have in common, for a person."""
    name, model = point.way["group"], point.way["model"]
    titles = {BASELINE: "Full sampling", FEWER_STEPS: "Fewer steps"}
    title: str = titles.get(name, name.replace("-", " ").capitalize() if kind_of(point) == "fastdiff" else name)
    return title if model == MAIN else f"{title}, {model}"


def name_of(way: Mapping[str, Any]) -> str:
    """A row's name where its group does not stand beside it.

    Args:
        way: what ``way.json`` says of it, or a point of ``results.json``.
    """
    label, group = way["label"] or way["spec"], way["group"]
    tells_group = all(part in label for part in group.split(" + "))
    name = label if way["plain"] or tells_group else f"{group}: {label}"
    return name if way["model"] == MAIN else f"{way['model']}: {name}"


def _place(results: Results, point: Point) -> tuple[Any, ...]:
    """Baselines first, then groups by kind, each from slow to fast; what could not be sampled ends its group."""
    way, speedup = point.way, results.speedup(point) or float("inf")
    copy = way["model"] != MAIN, way["model"]
    return KINDS.index(kind_of(point)), way["group"], copy, speedup, -way["num_inference_steps"], point.key


# -- where the numbers come from ---------------------------------------------------------------------------------------


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """When, by which command and with which commit of fastdiff an evaluation was made."""
    return {"date": date.today().isoformat(), "command": shlex.join(command), "commit": _commit()}


def _commit() -> str | None:
    """The commit of the checkout that fastdiff runs from; None for an installed package."""
    asked = ["git", "-C", str(Path(fastdiff.__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return told.stdout.strip() or None if told.returncode == 0 else None


# -- as data -----------------------------------------------------------------------------------------------------------


def as_data(results: Results) -> dict[str, Any]:
    """Everything but the images, JSON-compatible."""
    return {
        "schema_version": SCHEMA_VERSION,
        **results.header,
        "timing_batch": results.batch,
        "points": [_point_data(results, point) for point in results.points],
    }


def _point_data(results: Results, point: Point) -> dict[str, Any]:
    match = results.match(point)
    return {
        "key": point.key,
        "baseline": point.baseline,
        "kind": kind_of(point),
        **point.way,
        "error": dict(point.error) if point.error else None,
        "notes": list(point.notes),
        "timings": {str(batch): asdict(timing) for batch, timing in point.timings.items()},
        "macs_per_image": point.macs,
        "macs_share": point.macs_share,
        "depth": point.depth,
        "quality": {name: _light(told) for name, told in (point.quality or {}).items()},
        "same_time": match.key if match else None,
        "changes_to_same_time": _changes(point, match),
        "changes_to_full": _changes(point, results.point(point.baseline)) if not point.is_baseline else {},
        "verdict": results.verdict(point),
    }


def _light(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name not in HEAVY}


def _changes(point: Point, other: Point | None) -> dict[str, Any]:
    """Differences in every criterion with their standard errors."""
    ours, others = point.quality or {}, (other.quality if other else None) or {}
    found = {name: change(ours[name], others[name]) for name in CRITERIA if name in ours and name in others}
    return {name: {"value": value, "error": error} for name, (value, error) in found.items()}


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the ``results.json`` of an evaluation.

    Raises:
        ConfigError: if it is none, or one of another version.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as the results of an evaluation: {error}") from error
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != SCHEMA_VERSION or "points" not in data:
        raise ConfigError(
            f"{path} holds no results of `fastdiff eval` in version {SCHEMA_VERSION}; its schema_version is {found!r}."
        )
    return dict(data)
