"""The demo's pictures: the samples side by side, and speed against quality."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastdiff.cli.contenders import FULL
from fastdiff.draw import heat_map
from fastdiff.zoo.data import CHARACTERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastdiff.cli.comparison import Comparison, Row

SHOWN = tuple(range(0, len(CHARACTERS), 2))
"""Samples in the pictures: every second character, the first of each, good or bad."""

GROUP_STYLES = {
    "Baseline": ("#000000", "s"),
    "Presets": ("#d55e00", "o"),
    "Training-free methods": ("#0072b2", "^"),
    "Fine-tuned copy": ("#cc79a7", "D"),
    "Simply fewer steps": ("#777777", "x"),
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
    """The samples of all contenders: a row for each, the same character and seed in a column."""
    from matplotlib import pyplot

    rows = comparison.rows
    strips = [np.asarray(strip(row)) for row in rows]
    height, width = strips[0].shape[:2]
    canvas = np.full((len(rows) * (height + 4) - 4, width, 4), 255, dtype=np.uint8)
    for index, pixels in enumerate(strips):
        top = index * (height + 4)
        canvas[top : top + height] = np.where(pixels[..., 3:] == 0, 255, pixels)
    figure, axes = pyplot.subplots(figsize=(3.3 + width / 70, 0.5 + canvas.shape[0] / 70), layout="constrained")
    axes.imshow(canvas, interpolation="nearest")
    labels = [f"{row.contender.label}  {row.speedup.median:.2f}×" for row in rows]
    axes.set_yticks([index * (height + 4) + height / 2 for index in range(len(rows))], labels)
    characters = [CHARACTERS[comparison.settings.characters[index]] for index in SHOWN if index < len(rows[0].images)]
    axes.set_xticks([index * 34 + 16 for index in range(len(characters))], characters)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for index in range(1, len(rows)):
        if rows[index].contender.group != rows[index - 1].contender.group:
            axes.axhline(index * (height + 4) - 2.5, color="black", linewidth=0.8, xmin=-0.01, clip_on=False)
    return figure


def draw_trade_off(comparison: Comparison) -> Figure:
    """Distance to real glyphs against speedup: right is faster, down is better."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 5.4), layout="constrained")
    for group, (color, marker) in GROUP_STYLES.items():
        rows = [row for row in comparison.rows if row.contender.group == group]
        if rows:
            _draw_group(axes, rows, group, color, marker)
    plain = [row for row in comparison.rows if not row.contender.methods and not row.contender.finetuned]
    axes.plot(
        [row.speedup.median for row in plain], [row.score.fid for row in plain], "--", color="#777777", linewidth=1
    )
    axes.axhline(comparison.renders.fid, color="#009e73", linewidth=1)
    axes.annotate(
        "as many fresh renders",
        (1, comparison.renders.fid),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="#00674c",
        fontsize="small",
    )
    axes.set_xlabel("speedup over full sampling with the same weights (wall clock, median of pairs; quartiles)")
    axes.set_ylabel(f"FID-{comparison.settings.count} on reader features (95 % interval), lower is better")
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize="small")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _draw_group(axes: Axes, rows: list[Row], group: str, color: str, marker: str) -> None:
    speed = np.array([[row.speedup.median, row.speedup.low, row.speedup.high] for row in rows]).T
    distance = np.array([[row.score.fid, *row.score.fid_interval] for row in rows]).T
    axes.errorbar(
        speed[0],
        distance[0],
        xerr=[speed[0] - speed[1], speed[2] - speed[0]],
        yerr=[distance[0] - distance[1], distance[2] - distance[0]],
        fmt=marker,
        color=color,
        label=group,
        markersize=6,
        elinewidth=0.8,
    )
    for row in rows:
        if row.contender.key == FULL:
            continue
        axes.annotate(
            _short(row),
            (row.speedup.median, row.score.fid),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize="x-small",
            color=color,
        )


def _short(row: Row) -> str:
    """A label that fits beside a marker."""
    return row.contender.key.replace("feature-inheritance", "inheritance").replace("preset-", "").replace("-", " ")


def draw_plan(row: Row) -> Figure:
    """The heat map of what a contender ran."""
    figure = heat_map(row.plan).figure
    return figure  # type: ignore[return-value]  # matplotlib's stubs allow for figures inside figures


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
