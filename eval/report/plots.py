"""Plots of quality against measured speedup, and pictures of the same seeds sampled in every way."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastdiff.draw import heat_map
from fastdiff.eval.judging import CRITERIA, Z, is_equal_to_full, standard_error
from fastdiff.eval.report import texts
from fastdiff.eval.report.tables import name_of, title
from fastdiff.eval.results import Results, group_of, kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastdiff.eval.points import Point

WIDE = 8
"""Ratio of the largest value in a plot to the smallest from which on the scale is logarithmic."""
SHOWN = 16
"""Images of each row in the pictures."""

THUMBNAIL = 96
"""Pixels of an image's longer side in the pictures, at most."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0508a", "#8c6d1f", "#56b4e9", "#5b4bb5", "#7f9c1f")
MARKERS = "o^sDvP*X<>"
FADED = 0.3
LABEL = 40
"""Characters of a label in a picture, at most."""
LABEL_PLACES = [(x, y) for y in (5, -5, 14, -14, 24, -24, 36, -36) for x in (5, -5, 0)]
"""Where a label may stand beside its point, in points of type, the best place first."""


# -- quality against speedup -------------------------------------------------------------------------------------------


def draw_trade_off(results: Results, criterion: str) -> Figure:
    """A criterion against speedup: one line for each group, fewer steps and other packages among them.

    A line goes through the points of its group that no other of the group beats in both. Points that another of any
    group beats are faded; those that none beats carry their names.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 6.5), layout="constrained")
    dominated = results.dominated(criterion)
    shown = [point for point in results.measured if is_drawn(results, point, criterion)]
    styles = _styles(shown)
    for group, (color, marker, line) in styles.items():
        members = sorted((p for p in shown if group_of(p) == group), key=lambda point: results.speedup(point) or 0.0)
        beaten = results.dominated(criterion, members)
        best = [_place(results, point, criterion) for point in members if point.key not in beaten]
        axes.plot(*zip(*best, strict=True), line, color=color, linewidth=1, alpha=0.5)
        axes.plot([], [], marker, color=color, linestyle=line, linewidth=1, label=group)
        for point in members:
            _draw_point(axes, results, point, criterion, color, marker, point.key in dominated)
    _draw_floor(axes, results, criterion)
    _spread(axes, [_value(point, criterion) for point in shown])
    axes.set_xlabel("speedup over full sampling (wall clock, median of pairs; quartiles)")
    word = "higher" if CRITERIA[criterion].better > 0 else "lower"
    axes.set_ylabel(f"{title(criterion)} (95 % interval)\n{word} is better")
    axes.grid(color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    front = [point for point in shown if point.key not in dominated]
    labels = [(texts.shortened(name_of(point), LABEL), _place(results, point, criterion)) for point in front]
    _label(figure, axes, labels, [_place(results, point, criterion) for point in shown])
    return figure


def _spread(axes: Axes, values: Sequence[float]) -> None:
    """Takes a logarithmic scale where a few values would press all others together."""
    if min(values, default=0) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log", subs=(2, 5))
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")


def _place(results: Results, point: Point, criterion: str) -> tuple[float, float]:
    return results.speedup(point) or 0.0, _value(point, criterion)


def _label(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, tuple[float, float]]],
    taken: Sequence[tuple[float, float]],
) -> None:
    """Write labels beside points where they cover neither points nor each other; one without room is left out."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the layout, on which distances depend
    axes.set_autoscale_on(False)
    frame = axes.get_window_extent()
    points = axes.transData.transform(taken)
    used = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for name, place in labels:
        for x, y in LABEL_PLACES:
            text = axes.annotate(
                name, place, (x, y), textcoords="offset points", fontsize="x-small",
                ha="left" if x > 0 else "right" if x < 0 else "center", va="bottom" if y > 0 else "top",
            )  # fmt: skip
            box = text.get_window_extent()
            if box.count_overlaps(used) or not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0):
                text.remove()
                continue
            used.append(box)
            break


def is_drawn(results: Results, point: Point, criterion: str) -> bool:
    """Whether a point has a place in a plot; that of images which equal full sampling's is beyond every axis."""
    told = (point.quality or {}).get(criterion)
    if told is None or results.speedup(point) is None:
        return False
    return not (criterion == "psnr" and is_equal_to_full(told))


def _styles(points: Sequence[Point]) -> dict[str, tuple[str, str, str]]:
    """Color, marker and line of each group; markers and lines differ too, for eyes and printers that see no color."""
    lines = {"baseline": "-", "fastdiff": "-", "peer": ":", "steps": "--"}
    groups = list(dict.fromkeys((group_of(point), kind_of(point)) for point in points))
    grey = {"baseline": ("#000000", "s"), "steps": ("#666666", "p")}
    styles, used = {}, 0
    for group, kind in groups:
        color, marker = grey.get(kind, (COLORS[used % len(COLORS)], MARKERS[used % len(MARKERS)]))
        used += kind not in grey
        styles[group] = (color, marker, lines[kind])
    return styles


def _value(point: Point, criterion: str) -> float:
    assert point.quality is not None
    return float(CRITERIA[criterion].scale * point.quality[criterion]["value"])


def _draw_point(
    axes: Axes, results: Results, point: Point, criterion: str, color: str, marker: str, faded: bool
) -> None:
    timing = results.timing(point)
    assert timing is not None
    assert point.quality is not None
    speed, value = timing.speedup, _value(point, criterion)
    error = CRITERIA[criterion].scale * Z * (standard_error(point.quality[criterion]) or 0.0)
    axes.errorbar(
        speed.median,
        value,
        xerr=[[speed.median - speed.low], [speed.high - speed.median]],
        yerr=error or None,
        fmt=marker,
        color=color,
        markersize=7,
        elinewidth=0.8,
        alpha=FADED if faded else 1.0,
    )


def _draw_floor(axes: Axes, results: Results, criterion: str) -> None:
    floor: Mapping[str, Any] | None = (results.header.get("floor") or {}).get(criterion)
    if floor is None:
        return
    value = CRITERIA[criterion].scale * floor["value"]
    low, high = axes.get_ylim()
    if not low - (high - low) <= value <= high + (high - low):  # far away, it would only press the points together
        return
    axes.axhline(value, color="#00674c", linewidth=1)
    axes.annotate(
        "perfect samples", (1, value), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", color="#00674c", fontsize="small",
    )  # fmt: skip


# -- pictures ----------------------------------------------------------------------------------------------------------


def chosen(count: int) -> list[int]:
    """Which of so many images are shown: as far apart as possible, good or bad."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, SHOWN))})


def strip(images: np.ndarray, gap: int = 2) -> Image.Image:
    """Images side by side, with a transparent gap between them.

    Args:
        images: uint8 of shape ``(n, height, width, 3)``.
        gap: pixels between two of them.
    """
    small = [np.asarray(_thumbnail(image)) for image in images]
    height, width = small[0].shape[:2]
    pixels = np.zeros((height, len(small) * (width + gap) - gap, 4), dtype=np.uint8)
    for index, image in enumerate(small):
        left = index * (width + gap)
        pixels[:, left : left + width, :3] = image
        pixels[:, left : left + width, 3] = 255
    return Image.fromarray(pixels)


def _thumbnail(image: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return picture


def draw_samples(results: Results, images: Mapping[str, np.ndarray]) -> Figure:
    """The same seeds sampled in every way: a row for each, one seed and request in a column.

    Args:
        results: the rows.
        images: uint8 of shape ``(n, height, width, 3)`` by key, the same seeds in each.
    """
    from matplotlib import pyplot

    points = [point for point in results.measured if point.key in images]
    strips = [np.asarray(strip(images[point.key])) for point in points]
    height, width = strips[0].shape[:2]
    step = height + 4
    canvas = np.full((len(points) * step - 4, width, 4), 255, dtype=np.uint8)
    for index, pixels in enumerate(strips):
        canvas[index * step : index * step + height] = np.where(pixels[..., 3:] == 0, 255, pixels)
    scale = 70 * height / 32
    figure, axes = pyplot.subplots(figsize=(5 + width / scale, 0.3 + canvas.shape[0] / scale), layout="constrained")
    axes.imshow(canvas, interpolation="nearest")
    axes.set_anchor("E")  # all the room beside it is for the labels
    labels = [
        f"{texts.shortened(name_of(point), LABEL)}  {texts.median(t.speedup if (t := results.timing(point)) else None)}"
        for point in points
    ]
    axes.set_yticks([index * step + height / 2 for index in range(len(points))], labels)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def draw_plan(point: Point) -> Figure:
    """The heat map of what a row ran, small enough for several side by side."""
    from matplotlib import pyplot

    assert point.plan is not None
    figure, axes = pyplot.subplots(figsize=(5.0, 5.2), layout="constrained")
    heat_map(point.plan, axes)
    return figure


# -- files -------------------------------------------------------------------------------------------------------------


def as_bytes(picture: Figure | Image.Image, kind: str = "png", dpi: int = 110) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, kind.upper(), optimize=True)
    else:
        # Without a date, so that the same results make the same file.
        metadata = {"Date": None} if kind == "svg" else None
        picture.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()
