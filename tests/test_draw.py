"""Plans as text and as pictures."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.draw import CHARACTERS, COLORS, PlottingUnavailableError, actions_present, as_text, heat_map, unit_groups
from fastdiff.errors import FastDiffError
from fastdiff.plan import Action, ComputePlan

FLUX = [f"transformer_blocks.{i}" for i in range(19)] + [f"single_transformer_blocks.{i}" for i in range(38)]
TIMESTEPS = [981.0, 661.0, 341.0, 21.0]


def make_plan(rows: list[str], units: list[str] | None = None, **meta: Any) -> ComputePlan:
    table = np.array([[int(digit) for digit in row] for row in rows])
    return ComputePlan(table, units or [f"blocks.{i}" for i in range(table.shape[1])], meta)


@pytest.fixture
def plan() -> ComputePlan:
    return make_plan(["0000", "0220", "0220", "0555"], methods=["Mixed()"], timesteps=TIMESTEPS)


@pytest.fixture(autouse=True)
def close_figures() -> Any:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def test_text_has_one_line_for_each_run_of_equal_rows(plan: ComputePlan) -> None:
    text = as_text(plan)
    rows = [line for line in text.splitlines() if " t=" in line]
    assert [line.split() for line in rows] == [
        ["0", "t=981", "####"],
        ["1-2", "t=661..341", "#==#"],
        ["3", "t=21", "#xxx"],
    ]
    assert text.startswith("Mixed(): computes 56.2% of 4 × 4 cells\n2.25 of 4 units run on average\n")


def test_text_legend_names_only_what_occurs(plan: ComputePlan) -> None:
    legend = as_text(plan).split("\n\n")[-1]
    assert [line[0] for line in legend.splitlines()] == ["#", "=", "x"]


def test_text_without_timesteps_or_with_too_few_shows_rows_alone() -> None:
    assert "t=" not in as_text(make_plan(["00", "02"]))
    assert "t=" not in as_text(make_plan(["00", "02"], timesteps=[1.0]))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(40, 160),
    rows=st.integers(1, 20),
    lists=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_text_keeps_to_the_width(width: int, rows: int, lists: list[int], seed: int) -> None:
    units = [f"list_of_blocks_{number}.{index}" for number, count in enumerate(lists) for index in range(count)]
    table = np.random.default_rng(seed).integers(0, len(Action), (rows, len(units)))
    text = as_text(ComputePlan(table, tuple(units), {"methods": ["M" * 200], "timesteps": [0.12345] * rows}), width)
    assert max(map(len, text.splitlines())) <= width


def test_text_groups_units_that_do_not_fit() -> None:
    table = np.zeros((1, 300), dtype=int)
    table[0, 200:] = Action.REUSE
    table[0, 1] = Action.SKIP
    text = as_text(ComputePlan(table, tuple(f"b.{i}" for i in range(300)), {}), 60)
    (row,) = [line for line in text.splitlines() if line.startswith("0 ")]
    cells = row.split()[1]
    assert 30 < len(cells) <= 60
    assert cells[0] == "9"  # a group that is mostly computed
    assert cells[1] == "#"
    assert cells[-1] == "="
    assert "units" in text.splitlines()[-1]


def test_text_separates_block_lists() -> None:
    text = as_text(make_plan(["0" * 57], FLUX))
    assert "#" * 19 + " " + "#" * 38 in text
    assert "transformer_blocks (19)" in text


def test_unit_groups_are_the_lists_in_order() -> None:
    assert [(group.start, group.stop, group.name) for group in unit_groups(FLUX)] == [
        (0, 19, "transformer_blocks"),
        (19, 57, "single_transformer_blocks"),
    ]


def test_lists_taken_in_turn_are_one_group() -> None:
    units = [f"{name}.{index}" for index in range(8) for name in ("spatial", "temporal")]
    (group,) = unit_groups(units)
    assert (group.start, group.stop) == (0, 16)
    assert "spatial" in group.name
    assert "temporal" in group.name


@pytest.mark.parametrize("rows", [["00", "02"], ["012345"] * 2, ["00"]])
def test_heat_map_legend_has_one_entry_for_each_action_present(rows: list[str]) -> None:
    plan = make_plan(rows)
    legend = heat_map(plan).get_legend()
    assert legend is not None
    drawn = [patch.get_facecolor() for patch in legend.get_patches()]
    from matplotlib.colors import to_rgba

    assert drawn == [to_rgba(COLORS[action]) for action in actions_present(plan)]
    assert len(legend.get_texts()) == len(set("".join(rows)))


def test_heat_map_draws_every_cell_in_its_color() -> None:
    from matplotlib.colors import to_rgba

    plan = make_plan(["012345", "000000"])
    (image,) = heat_map(plan).get_images()
    shown = image.to_rgba(image.get_array())
    expected = [[to_rgba(COLORS[Action(int(cell))]) for cell in row] for row in plan.table]
    np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_heat_map_labels_rows_with_timesteps_and_names_lists() -> None:
    plan = make_plan(["0" * 57] * 50, FLUX, timesteps=[float(t) for t in range(981, -19, -20)], methods=["M()"])
    axes = heat_map(plan)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "0  t=981"
    assert labels[-1] == "49  t=1"
    assert len(labels) <= 12
    names = [text.get_text() for text in axes.texts]
    assert names == ["transformer_blocks (19)", "single_transformer_blocks (38)"]
    assert axes.get_title(loc="left").startswith("M(): computes 100.0%")


def test_heat_map_draws_into_given_axes(plan: ComputePlan) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots()
    assert heat_map(plan, axes) is axes
    assert plan.plot(axes) is axes
    assert plan.render(60) == as_text(plan, 60)


def test_heat_map_without_matplotlib_is_a_typed_error(plan: ComputePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(PlottingUnavailableError, match="pip install matplotlib") as caught:
        heat_map(plan)
    assert isinstance(caught.value, FastDiffError)
    assert isinstance(caught.value, ImportError)


def test_every_action_has_its_own_character_and_color() -> None:
    assert len(set(CHARACTERS.values())) == len(set(COLORS.values())) == len(Action)
