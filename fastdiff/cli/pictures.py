"""The demo's pictures: the samples side by side, and speed against quality."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastdiff.draw import heat_map
from fastdiff.zoo.data import CHARACTERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastdiff.cli.comparison import Comparison, Row

SHOWN = tuple(range(0, len(CHARACTERS), 2))
"""Samples in the pictures: every second of the first 36, good or bad."""

GROUP_STYLES = {
    "Baseline": ("#000000", "s"),
    "Presets": ("#d55e00", "o"),
    "Training-free methods": ("#0072b2", "^"),
    "Fine-tuned copy": ("#b0508a", "D"),
    "Simply fewer steps": ("#666666", "p"),
}
"""Color and marker of each group of contenders; the markers differ too, for eyes and printers that see no color."""


def shown(row: Row) -> np.ndarray:
    """The samples in the pictures, uint8 of shape ``(samples, 32, 32, 3)``."""
    return row.images[[index for index in SHOWN if index < len(row.images)]]


def strip(row: Row, gap: int = 2) -> Image.Image:
    """A contender's shown samples side by side, with a transparent gap between them."""
    images = shown(row)
    count, height, width, _ = images.shape
    pixels = np.zeros((height, count * (width + gap) - gap, 4), dtype=np.uint8)
    for index, image in enumerate(images):
        left = index * (width + gap)
        pixels[:, left : left + width, :3] = image
        pixels[:, left : left + width, 3] = 255
    return Image.fromarray(pixels)


def draw_samples(comparison: Comparison) -> Figure:
    """The samples of all contenders: a row for each, the same request and seed in a column."""
    from matplotlib import pyplot

    rows = comparison.rows
    strips = [np.asarray(strip(row)) for row in rows]
    height, width = strips[0].shape[:2]
    canvas = np.full((len(rows) * (height + 4) - 4, width, 4), 255, dtype=np.uint8)
    for index, pixels in enumerate(strips):
        top = index * (height + 4)
        canvas[top : top + height] = np.where(pixels[..., 3:] == 0, 255, pixels)
    figure, axes = pyplot.subplots(figsize=(4.8 + width / 70, 0.5 + canvas.shape[0] / 70), layout="constrained")
    axes.imshow(canvas, interpolation="nearest")
    axes.set_anchor("E")  # all the room beside it is for the labels
    labels = [f"{row.contender.title}  {row.speedup.median:.2f}×" for row in rows]
    axes.set_yticks([index * (height + 4) + height / 2 for index in range(len(rows))], labels)
    labels = [comparison.task.label(index) for index in SHOWN if index < len(rows[0].images)]
    axes.set_xticks([index * 34 + 16 for index in range(len(labels))], labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for index in range(1, len(rows)):
        if rows[index].contender.group != rows[index - 1].contender.group:
            axes.axhline(index * (height + 4) - 2.5, color="black", linewidth=0.8, xmin=-0.01, clip_on=False)
    return figure


def draw_trade_off(comparison: Comparison) -> Figure:
    """Distance to held-out renders, and fidelity to full sampling, against speedup. Contenders are numbered."""
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7.5, 9.5), layout="constrained", sharex=True)
    plain = [row for row in comparison.rows if not row.contender.methods and not row.contender.finetuned]
    _draw_line(upper, [(row.speedup.median, row.score.fid) for row in plain])
    _draw_line(lower, [(row.speedup.median, row.psnr) for row in plain if not row.is_baseline])
    _draw_renders(upper, comparison.renders.fid)
    for number, row in enumerate(comparison.rows, 1):
        _draw_contender(upper, row, number, row.score.fid, row.score.fid_interval)
        if math.isfinite(row.psnr):
            _draw_contender(lower, row, number, row.psnr)
    lowest = min(comparison.renders.fid, *(row.score.fid_interval[0] for row in comparison.rows))
    upper.set_ylim(bottom=max(0.0, 0.9 * lowest))
    upper.set_ylabel(f"FID-{comparison.settings.count} on reader features (95 % interval)\nlower is better")
    lower.set_ylabel("PSNR to full sampling, dB\nhigher is closer")
    lower.set_xlabel("speedup over full sampling with the same weights (wall clock, median of pairs, quartiles)")
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small", markerscale=0.6
    )
    for axes in (upper, lower):
        axes.grid(color="#dddddd", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def _draw_line(axes: Axes, points: list[tuple[float, float]]) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), "--", color="#777777", linewidth=1)


def _draw_renders(axes: Axes, distance: float) -> None:
    axes.axhline(distance, color="#009e73", linewidth=1, zorder=0)
    axes.annotate(
        "as many fresh renders",
        (1, distance),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="#00674c",
        fontsize="small",
    )


def _draw_contender(
    axes: Axes, row: Row, number: int, value: float, interval: tuple[float, float] | None = None
) -> None:
    color, marker = GROUP_STYLES[row.contender.group]
    speed = row.speedup
    axes.errorbar(
        speed.median,
        value,
        xerr=[[speed.median - speed.low], [speed.high - speed.median]],
        yerr=None if interval is None else [[value - interval[0]], [interval[1] - value]],
        color=color,
        elinewidth=0.8,
        alpha=0.6,
    )
    label = f"{number}  {_short(row)}"
    axes.plot(speed.median, value, marker, color=color, markersize=13, linestyle="none", label=label)
    axes.annotate(
        str(number), (speed.median, value), color="white", ha="center", va="center_baseline", fontsize="x-small"
    )


def _short(row: Row) -> str:
    """A label that fits into a narrow column."""
    return row.contender.title.replace(" (experimental)", "").replace("Fine-tuned copy", "Fine-tuned")


def draw_plan(row: Row) -> Figure:
    """The heat map of what a contender ran, small enough for several side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.0, 5.2), layout="constrained")
    heat_map(row.ran.plan, axes)
    return figure


def png(picture: Figure | Image.Image, dpi: int = 110) -> bytes:
    """A picture as the bytes of a PNG file; a figure is closed."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, "PNG", optimize=True)
    else:
        from matplotlib import pyplot

        picture.savefig(buffer, format="png", dpi=dpi)
        pyplot.close(picture)
    return buffer.getvalue()


def write_png(path: Path, data: bytes) -> None:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
