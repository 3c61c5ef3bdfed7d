"""A compute plan as text for the terminal and as a heat map for a person to read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from fastdiff.errors import FastDiffError
from fastdiff.plan import Action, ComputePlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHARACTERS = {
    Action.COMPUTE: "#",
    Action.FORECAST: "~",
    Action.REUSE: "=",
    Action.SKIP: "-",
    Action.DROP: ".",
    Action.EXIT: "x",
}
"""ASCII, so that a plan can be printed to any terminal and pasted into any log."""

COLORS = {
    Action.COMPUTE: "#14264f",
    Action.FORECAST: "#e69f00",
    Action.REUSE: "#56b4e9",
    Action.SKIP: "#f7ea6c",
    Action.DROP: "#8a8a8a",
    Action.EXIT: "#ececec",
}
"""Told apart under every common form of colour blindness and by brightness alone where neighbours are likely."""

MEANINGS = {
    Action.COMPUTE: "compute",
    Action.FORECAST: "forecast from earlier evaluations",
    Action.REUSE: "reuse an earlier evaluation",
    Action.SKIP: "skip",
    Action.DROP: "not needed",
    Action.EXIT: "exited",
}

NAMES = {
    Action.COMPUTE: "compute",
    Action.FORECAST: "forecast",
    Action.REUSE: "reuse",
    Action.SKIP: "skip",
    Action.DROP: "not needed",
    Action.EXIT: "exited",
}
"""Short enough for a legend of one line."""

MAX_LISTS = 6
"""More runs of units than this mean that a denoiser takes its lists in turn; they are then drawn as one."""


class PlottingUnavailableError(FastDiffError, ImportError):
    """A picture was asked for and matplotlib is not installed."""


@dataclass(frozen=True)
class UnitGroup:
    """Units that follow each other in one block list.

    Args:
        name: of the list, e.g. ``"transformer_blocks"``.
        start: first column.
        stop: the column after the last.
    """

    name: str
    start: int
    stop: int

    @property
    def label(self) -> str:
        """Name and number of units."""
        return f"{self.name} ({self.stop - self.start})"


def unit_groups(units: Sequence[str]) -> list[UnitGroup]:
    """The block lists that a plan's columns come from, in order."""
    groups: list[UnitGroup] = []
    for name, run in groupby(unit.rpartition(".")[0] or unit for unit in units):
        start = groups[-1].stop if groups else 0
        groups.append(UnitGroup(name, start, start + len(list(run))))
    if len(groups) > MAX_LISTS:
        names = dict.fromkeys(group.name for group in groups)
        return [UnitGroup(" and ".join(names) if len(names) <= MAX_LISTS else "units", 0, len(units))]
    return groups


def actions_present(plan: ComputePlan) -> list[Action]:
    """The actions that occur in a plan, in the order of the enumeration."""
    return [action for action in Action if (plan.table == action).any()]


def headline(plan: ComputePlan) -> str:
    """Methods and computed share in one line."""
    methods = " + ".join(map(str, plan.meta.get("methods", []))) or "plan"
    return f"{methods}: computes {plan.share:.1%} of {plan.evaluations} × {len(plan.units)} cells"


def mean_depth(plan: ComputePlan) -> str:
    """How many units run in an evaluation on average, without those of a U-ViT that only merge a long skip."""
    merges = plan.meta.get("merges", [])
    runs = plan.table[:, ~np.isin(plan.units, merges)] == Action.COMPUTE
    return f"{runs.sum() / len(runs):.2f} of {runs.shape[1]} {'blocks' if merges else 'units'} run on average"


def row_timesteps(plan: ComputePlan) -> list[float] | None:
    """The timestep of each row, or None where the plan does not tell."""
    timesteps = plan.meta.get("timesteps")
    if not isinstance(timesteps, (list, tuple)) or len(timesteps) != plan.evaluations:
        return None
    return [float(timestep) for timestep in timesteps]


# -- text --------------------------------------------------------------------------------------------------------------


def as_text(plan: ComputePlan, width: int = 100) -> str:
    """The plan as text: one line per run of equal rows, one character per unit.

    Where the units do not fit, a character stands for several: the digit is then the tenths of them that are computed,
    and a letter of the legend means that all of them do the same.

    Args:
        plan: the plan.
        width: characters per line that the table keeps to, at least 40.
    """
    width = max(width, 40)
    timesteps = row_timesteps(plan)
    runs = list(_equal_rows(plan.table))
    heads = [_row_head(first, last, timesteps) for first, last in runs]
    margin = max(map(len, heads))
    groups = unit_groups(plan.units)
    per_character = _units_per_character(groups, width - margin - 2)
    lines = [_clip(headline(plan), width), mean_depth(plan), ""]
    lines += [" " * margin + "  " + line for line in _column_heads(groups, per_character, width - margin - 2)]
    for head, (first, _) in zip(heads, runs, strict=True):
        cells = " ".join(_cells(plan.table[first, group.start : group.stop], per_character) for group in groups)
        lines.append(f"{head:<{margin}}  {cells}")
    return "\n".join([*lines, "", *_legend(plan, per_character, width)])


def _equal_rows(table: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last index of each run of equal rows."""
    for _, run in groupby(range(len(table)), key=lambda row: table[row].tobytes()):
        rows = list(run)
        yield rows[0], rows[-1]


def _row_head(first: int, last: int, timesteps: list[float] | None) -> str:
    rows = f"{first}" if first == last else f"{first}-{last}"
    if timesteps is None:
        return rows
    span = f"{timesteps[first]:.4g}" if first == last else f"{timesteps[first]:.4g}..{timesteps[last]:.4g}"
    return f"{rows:<7} t={span}"


def _units_per_character(groups: Sequence[UnitGroup], width: int) -> int:
    """The smallest number of units for each character with which a row fits."""

    def needed(per_character: int) -> int:
        return sum(math.ceil((group.stop - group.start) / per_character) + 1 for group in groups) - 1

    largest = max(group.stop - group.start for group in groups)
    return next((count for count in range(1, largest) if needed(count) <= width), largest)


def _column_heads(groups: Sequence[UnitGroup], per_character: int, width: int) -> Iterator[str]:
    """The names of the block lists, each above its first unit; one line for each, as they may be longer than theirs."""
    start = 0
    for group in groups:
        yield _clip(" " * start + group.label, width)
        start += math.ceil((group.stop - group.start) / per_character) + 1


def _cells(actions: np.ndarray, per_character: int) -> str:
    pieces = [actions[start : start + per_character] for start in range(0, len(actions), per_character)]
    return "".join(_character(piece) for piece in pieces)


def _character(actions: np.ndarray) -> str:
    if (actions == actions[0]).all():
        return CHARACTERS[Action(int(actions[0]))]
    # Never 0: a cell in which something runs must not look like one in which nothing does.
    tenths = math.ceil(10 * float((actions == Action.COMPUTE).mean()))
    return str(min(tenths, 9))


def _legend(plan: ComputePlan, per_character: int, width: int) -> Iterator[str]:
    for action in actions_present(plan):
        yield f"{CHARACTERS[action]} {MEANINGS[action]}"
    if per_character > 1:
        yield _clip(f"one character is {per_character} units; a digit is the tenths of them that are computed", width)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


# -- picture -----------------------------------------------------------------------------------------------------------


def heat_map(plan: ComputePlan, axes: Axes | None = None) -> Axes:
    """The plan as a matplotlib heat map: evaluations from top to bottom, units from left to right.

    Args:
        plan: the plan.
        axes: where to draw; by default a new figure of a size that fits the plan.

    Returns:
        The axes; ``axes.figure.savefig(...)`` writes the picture.

    Raises:
        PlottingUnavailableError: if matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.colors import BoundaryNorm, ListedColormap
    except ImportError as error:
        raise PlottingUnavailableError(
            "Drawing a plan needs matplotlib, which is not installed: pip install matplotlib. "
            "ComputePlan.render() draws it as text without."
        ) from error
    if axes is None:
        _, axes = pyplot.subplots(figsize=_figure_size(plan), layout="constrained")
    colors = ListedColormap([COLORS[action] for action in Action])
    norm = BoundaryNorm([action - 0.5 for action in Action] + [len(Action) - 0.5], len(Action))
    axes.imshow(plan.table, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    _draw_grid(plan, axes)
    _label_rows(plan, axes)
    _label_units(plan, axes)
    _draw_legend(plan, axes)
    _draw_title(plan, axes)
    return axes


def _figure_size(plan: ComputePlan) -> tuple[float, float]:
    """Inches; a cell is about as wide as it is high until there are many."""
    rows, units = plan.table.shape
    return min(max(2.0 + 0.22 * units, 6.0), 11.0), min(max(1.7 + 0.14 * rows, 3.4), 9.0)


def _draw_grid(plan: ComputePlan, axes: Axes) -> None:
    """Thin lines around every cell, and thick ones between block lists."""
    rows, units = plan.table.shape
    axes.set_xticks(np.arange(1, units) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, rows) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.4 if max(rows, units) > 30 else 0.8)
    axes.tick_params(which="minor", length=0)
    for group in unit_groups(plan.units)[1:]:
        axes.axvline(group.start - 0.5, color="white", linewidth=4)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label_rows(plan: ComputePlan, axes: Axes) -> None:
    rows = plan.evaluations
    step = math.ceil(rows / 10)
    shown = [row for row in range(0, rows, step) if row == 0 or rows - 1 - row > step / 2]
    shown = sorted({*shown, rows - 1})
    timesteps = row_timesteps(plan)
    axes.set_yticks(shown, [str(row) if timesteps is None else f"{row}  t={timesteps[row]:.4g}" for row in shown])
    axes.set_ylabel("evaluation, noisiest first")


def _label_units(plan: ComputePlan, axes: Axes) -> None:
    groups = unit_groups(plan.units)
    step = 1 if len(plan.units) <= 28 else 5 * math.ceil(len(plan.units) / 140)
    ticks = [column for group in groups for column in range(group.start, group.stop, step)]
    labels = [str(index) for group in groups for index in range(0, group.stop - group.start, step)]
    axes.set_xticks(ticks, labels)
    axes.tick_params(axis="x", labelsize="small")
    staggered = _names_collide(groups)
    for index, group in enumerate(groups):
        axes.annotate(
            group.label,
            ((group.start + group.stop - 1) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -36 if staggered and index % 2 else -22),
            textcoords="offset points",
            ha="center",
            va="top",
        )


def _names_collide(groups: Sequence[UnitGroup]) -> bool:
    """Whether some list is too short for its name to fit beside its neighbours'."""
    return len(groups) > 1 and min(group.stop - group.start for group in groups) < groups[-1].stop / 4


def _draw_legend(plan: ComputePlan, axes: Axes) -> None:
    from matplotlib.patches import Patch

    actions = actions_present(plan)
    patches = [Patch(facecolor=COLORS[action], edgecolor="#777777", linewidth=0.5) for action in actions]
    axes.legend(
        patches,
        [NAMES[action] for action in actions],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=4.8,  # in font sizes: below the names of the block lists, whatever the figure's height
        ncols=min(len(actions), 4),
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
    )


def _draw_title(plan: ComputePlan, axes: Axes) -> None:
    # matplotlib's own wrapping goes by the figure's edge and cuts lines off beside other axes.
    inches = axes.get_window_extent().width / axes.figure.dpi
    axes.set_title(textwrap.fill(headline(plan), max(20, int(10 * inches))), loc="left", fontsize="medium")
