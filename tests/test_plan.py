"""The compute plan: what is refused, what pruning and merging leave, what a file holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import Action, ComputePlan, PlanError, ProfileMismatchError
from fastdiff.plan import READS_CACHE, UnitTraits, merge
from tiny.plans import C, D, E, F, R, S, names, networks, plan_of, tables, tables_of

# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "units", "message"),
    [
        (np.zeros(3), names(3), r"shape \(evaluations, units\).*\(3,\)"),
        (np.zeros((2, 3, 4)), names(3), r"\(2, 3, 4\)"),
        (np.zeros((0, 3)), names(3), r"both at least 1"),
        (np.zeros((3, 0)), (), r"both at least 1"),
        ([[0, 0], [0]], names(2), "rectangular"),
        (np.zeros((2, 3)), names(2), "3 columns but 2 unit names"),
        (np.zeros((2, 2)), ("a", "a"), "repeat"),
        ([[0, 6]], names(2), "no action.*0=COMPUTE.*5=EXIT"),
        ([[0, -1]], names(2), "no action"),
        ([[0, 0.5]], names(2), "no action"),
        ([[0, float("nan")]], names(2), "no action"),
        ([["0", "0"]], names(2), "no action"),
        ([[None, None]], names(2), "no action"),
    ],
)
def test_table_that_is_none_is_refused(table: Any, units: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ComputePlan(table, units)


@pytest.mark.parametrize("order", [0, -1, 1.5, "2", None, True, [1]])
def test_forecast_order_that_is_none_is_refused(order: Any) -> None:
    with pytest.raises(PlanError, match="forecast_order"):
        plan_of([C], [F], forecast_order=order)


def test_plan_keeps_its_own_read_only_table() -> None:
    table, meta = np.zeros((2, 3)), {"methods": []}
    plan = ComputePlan(table, list(names(3)), meta)
    table[:] = S
    meta["methods"] = None
    assert plan == ComputePlan.full(2, names(3), methods=[])
    assert plan.table.dtype == np.int8
    assert plan.units == names(3)
    with pytest.raises(ValueError, match="read-only"):
        plan.table[0, 0] = S


def test_equality_is_of_cells_units_and_meta() -> None:
    plan = plan_of([C, C], a=1)
    assert plan == plan_of([C, C], a=1)
    assert plan != plan_of([C, S], a=1)
    assert plan != plan_of([C, C], a=2)
    assert plan != ComputePlan(plan.table, ("x", "y"), plan.meta)
    assert plan != "plan"


def test_counts_depths_and_share() -> None:
    plan = plan_of([C, C, C, C], [C, R, F, S], [C, D, E, E])
    assert plan.counts() == {"COMPUTE": 6, "FORECAST": 1, "REUSE": 1, "SKIP": 1, "DROP": 1, "EXIT": 2}
    assert plan.depths.tolist() == [4, 1, 1]
    assert plan.share == 0.5
    assert plan.evaluations == 3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_sources_are_the_newest_computed_rows(order: int) -> None:
    column = [C, R, C, F, C, C, R, F, F, C, F]
    plan = plan_of(*([action] for action in column), forecast_order=order)
    computed = [row for row, action in enumerate(column) if action == C]
    for row, action in enumerate(column):
        if action in READS_CACHE:
            wanted = order + 1 if action == F else 1
            assert plan.sources(row, 0) == tuple(sorted((c for c in computed if c < row), reverse=True)[:wanted])
    assert plan_of([C], [F]).forecast_order == 1


# -- validity ----------------------------------------------------------------------------------------------------------

SHAPES = [UnitTraits("blocks.0"), UnitTraits("blocks.1", same_shape=False), UnitTraits("blocks.2", can_exit=False)]


@pytest.mark.parametrize(
    ("rows", "rule", "row", "unit"),
    [
        ([[C, S, R], [C, C, C]], "V5", 0, 2),
        ([[F, C, C]], "V5", 0, 0),
        ([[C, S, C], [C, C, C], [C, C, S], [C, R, C]], None, None, None),
        ([[C, S, C], [C, R, C]], "V1", 1, 1),
        ([[C, S, C], [C, F, C], [C, C, C]], "V1", 1, 1),
        ([[C, S, S], [C, S, R], [C, R, C]], "V1", 1, 2),  # of several the first
        ([[C, C, E], [C, C, C], [C, C, R]], None, None, None),
        ([[C, C, E], [C, C, R]], "V1", 1, 2),
        ([[C, C, C], [C, E, C]], "V3", 1, 2),
        ([[C, C, C], [C, E, R]], "V3", 1, 2),
        ([[C, C, C], [E, E, E]], "V3", 1, 0),
        ([[S, S, S]], None, None, None),
    ],
)
def test_rules_that_need_no_model(rows: list[list[Action]], rule: str | None, row: int, unit: int) -> None:
    plan = plan_of(*rows)
    if rule is None:
        assert plan.validate() is plan
        return
    with pytest.raises(PlanError) as caught:
        plan.validate()
    _names_cell(caught.value, plan, rule, row, unit)


@pytest.mark.parametrize(
    ("rows", "rule", "row", "unit"),
    [
        ([[C, C, C], [S, C, S]], None, None, None),
        ([[C, C, C], [S, S, C]], "V2", 1, 1),
        ([[C, C, C], [C, E, E]], None, None, None),
        ([[C, C, C], [C, C, E]], "V3", 1, 2),
        ([[C, C, C], [D, C, C]], "V8", 1, 0),
        ([[C, C, C], [C, C, D]], "V8", 1, 2),
    ],
)
def test_rules_that_need_the_units(rows: list[list[Action]], rule: str | None, row: int, unit: int) -> None:
    plan = plan_of(*rows).validate()
    if rule is None:
        assert plan.validate(SHAPES) is plan
        return
    with pytest.raises(PlanError) as caught:
        plan.validate(SHAPES)
    _names_cell(caught.value, plan, rule, row, unit)


def _names_cell(error: PlanError, plan: ComputePlan, rule: str, row: int, unit: int) -> None:
    action = Action(int(plan.table[row, unit])).name
    assert (error.row, error.unit) == (row, f"blocks.{unit}")
    assert str(error).startswith(f"{rule}: {action} at row {row}, unit 'blocks.{unit}': ")


def test_units_of_another_model_are_refused() -> None:
    for other in (names(2), names(4), ("blocks.0", "layers.1", "blocks.2")):
        traits = [UnitTraits(name) for name in other]
        for check in (plan_of([C, C, C]).validate, plan_of([C, C, C]).prune):
            with pytest.raises(ProfileMismatchError, match=rf"3 units does not fit {len(other)} units"):
                check(traits)


@given(tables())
@settings(deadline=None, max_examples=50)
def test_plans_that_hold_the_rules_are_accepted(table: np.ndarray) -> None:
    ComputePlan(table, names(table.shape[1])).validate([UnitTraits(name) for name in names(table.shape[1])])


# -- pruning -----------------------------------------------------------------------------------------------------------


def traits_of(*reuse: str, reads: dict[int, tuple[int, ...]] | None = None) -> list[UnitTraits]:
    partners = {unit: tuple(f"blocks.{index}" for index in indices) for unit, indices in (reads or {}).items()}
    return [UnitTraits(f"blocks.{i}", reuse=kind, reads=partners.get(i, ())) for i, kind in enumerate(reuse)]


def pruned(plan: ComputePlan, traits: list[UnitTraits]) -> list[list[Action]]:
    return [[Action(cell) for cell in row] for row in plan.prune(traits).table.tolist()]


def test_residual_reuse_keeps_everything_before_it() -> None:
    plan = plan_of([C, C, C], [C, C, R], [C, S, R])
    assert plan.prune(traits_of(*["residual"] * 3)) == plan


def test_output_reuse_drops_everything_before_it() -> None:
    plan = plan_of([C, C, C, C], [C, S, R, C], [C, C, C, R])
    assert pruned(plan, traits_of(*["output"] * 4)) == [[C, C, C, C], [D, D, R, C], [D, D, D, R]]


def test_units_whose_value_a_later_row_reads_stay() -> None:
    plan = plan_of([C, C, C], [C, C, R], [C, R, C])
    assert pruned(plan, traits_of(*["output"] * 3)) == [[C, C, C], [C, C, R], [D, R, C]]


def test_every_source_of_a_forecast_stays() -> None:
    plan = plan_of([C, C, C], [C, C, R], [C, C, R], [C, C, R], [C, F, C], forecast_order=2)
    assert pruned(plan, traits_of(*["output"] * 3))[1:] == [[C, C, R], [C, C, R], [C, C, R], [D, F, C]]
    linear = plan_of(*plan.table.tolist(), forecast_order=1)
    assert pruned(linear, traits_of(*["output"] * 3))[1:] == [[D, D, R], [C, C, R], [C, C, R], [D, F, C]]


def test_a_long_skip_keeps_its_partner() -> None:
    plan = plan_of([C, C, C, C, C], [C, C, C, R, C])
    assert pruned(plan, traits_of(*["output"] * 5, reads={4: (1,)}))[1] == [C, C, D, R, C]
    assert pruned(plan, traits_of(*["output"] * 5, reads={3: (0,)}))[1] == [D, D, D, R, C]
    leaves = plan_of([C, C, C, C, C], [C, C, R, C, E])
    assert pruned(leaves, traits_of(*["output"] * 5, reads={4: (1,)}))[1] == [D, D, R, C, E]


@pytest.mark.parametrize(
    ("shallowest", "alive"),
    [
        (1, ["conv_in", "down_0", "up_2", "up_3"]),
        (2, ["conv_in", "down_0", "down_0.downsampler", "down_1", "up_1", "up_2", "up_3"]),
    ],
)
def test_inheriting_before_the_shallowest_stages_of_a_unet(shallowest: int, alive: list[str]) -> None:
    # Each up stage concatenates the outputs of its partner stage's resnets and what that stage was given.
    reads = {
        "up_0": ("down_3", "down_2.downsampler"),
        "up_1": ("down_2", "down_1.downsampler"),
        "up_2": ("down_1", "down_0.downsampler"),
        "up_3": ("down_0", "conv_in"),
    }
    downs = [f"down_{k}{part}" for k in range(4) for part in ("", ".downsampler")][:-1]
    units = ["conv_in", *downs, "mid", *reads]
    traits = [UnitTraits(name, same_shape=False, reuse="output", reads=reads.get(name, ())) for name in units]
    table = np.zeros((2, len(units)))
    inherited = f"up_{3 - shallowest}"
    table[1, units.index(inherited)] = R

    row = ComputePlan(table, tuple(units)).validate(traits).prune(traits).table[1]
    assert [unit for unit, action in zip(units, row, strict=True) if action != D] == alive
    assert row[units.index(inherited)] == R


def outputs(table: np.ndarray, plan: ComputePlan, traits: list[UnitTraits], lost: tuple[int, int] | None) -> list[Any]:
    """What each row hands to its reader, computed on symbols; ``lost`` replaces one cell's result."""
    kinds = plan.reuse_kinds(traits)
    column = {trait.name: index for index, trait in enumerate(traits)}
    values: dict[tuple[int, int], int] = {}
    for row, unit in np.ndindex(table.shape):
        before = values[row, unit - 1] if unit else hash(("input", row))
        kept = tuple(values[source, unit] for source in plan.sources(row, unit))
        if table[row, unit] == C:
            value = hash((unit, before, tuple(values[row, column[name]] for name in traits[unit].reads)))
        elif table[row, unit] in READS_CACHE:
            value = hash((kept, None if kinds[unit] == "output" else before))
        else:
            value = before
        values[row, unit] = value if (row, unit) != lost else hash("lost")
    read = [unit for unit, trait in enumerate(traits) if trait.is_output or unit == len(traits) - 1]
    return [[values[row, unit] for unit in read] for row in range(table.shape[0])]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_exactly_the_cells_nobody_reads_are_dropped(data: st.DataObject) -> None:
    table = data.draw(tables())
    traits = data.draw(networks(table.shape[1]))
    units = names(table.shape[1])
    replaced = data.draw(st.lists(st.sampled_from(units), unique=True))
    plan = ComputePlan(table, units, {"forecast_order": data.draw(st.integers(1, 3)), "replaced": replaced})
    result = plan.prune(traits)
    whole = outputs(table, plan, traits, None)
    for cell in np.ndindex(table.shape):
        matters = outputs(table, plan, traits, cell) != whole
        assert result.table[cell] == (table[cell] if matters else D)
    assert result.prune(traits) == result
    assert result.validate(traits) is result


# -- merging -----------------------------------------------------------------------------------------------------------


def test_the_action_that_saves_most_wins() -> None:
    one = plan_of([C, C, C, C], [C, F, R, S], [R, C, C, C])
    two = plan_of([C, C, C, C], [F, R, S, C], [C, C, E, E])
    assert one.merge(two).table.tolist() == [[C, C, C, C], [F, R, S, S], [R, C, E, E]]
    assert one.merge() == one


def test_reuse_whose_source_is_gone_is_computed_and_serves_later_rows() -> None:
    inherits = plan_of([C, C, C], [C, R, F], [C, R, R])
    leaves = plan_of([C, E, E], [C, C, C], [C, C, C])
    assert inherits.merge(leaves).table.tolist() == [[C, E, E], [C, C, C], [C, R, R]]


def test_merging_keeps_every_method_and_the_newest_facts() -> None:
    one, two, three = plan_of([C], methods=["a"], x=1, y=1), plan_of([C], methods=["b"], x=2), plan_of([C], z=3)
    assert merge([one, two, three]).meta == {"methods": ["a", "b"], "x": 2, "y": 1, "z": 3}
    assert one.meta == {"methods": ["a"], "x": 1, "y": 1}


def test_plans_that_do_not_fit_are_not_merged() -> None:
    with pytest.raises(PlanError, match="2 and 1 evaluations"):
        plan_of([C], [C]).merge(plan_of([C]))
    with pytest.raises(ProfileMismatchError, match=r"'blocks\.0' against 'x'"):
        plan_of([C]).merge(ComputePlan([[C]], ("x",)))


@given(st.data())
@settings(deadline=None)
def test_merged_plans_are_valid(data: st.DataObject) -> None:
    rows, units = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    plans = [
        ComputePlan(data.draw(tables_of(rows, units, (C, F, R, S))), names(units))
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    merged = merge(plans).validate([UnitTraits(name) for name in names(units)])
    most = np.max([plan.table for plan in plans], axis=0)
    changed = merged.table != most
    assert np.isin(most[changed], READS_CACHE).all()
    assert (merged.table[changed] == C).all()
    assert np.array_equal(merge(plans[::-1]).table, merged.table)
    for row, unit in np.argwhere(changed):
        assert not (merged.table[:row, unit] == C).any()


# -- files -------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
META = st.dictionaries(st.text().filter(lambda key: key != "forecast_order"), JSON, max_size=4)


@given(st.data(), META)
@settings(deadline=None, max_examples=40)
def test_saved_plan_is_the_same_plan(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, meta: Any) -> None:
    rows, units = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    cells = st.lists(st.sampled_from(Action), min_size=units, max_size=units)
    table = data.draw(st.lists(cells, min_size=rows, max_size=rows))
    columns = data.draw(st.lists(st.text(), min_size=units, max_size=units, unique=True))
    plan = ComputePlan(table, tuple(columns), meta)
    path = tmp_path_factory.mktemp("plan") / "deep" / "plan.json"
    assert plan.save(path) == path
    assert ComputePlan.load(str(path)) == plan
    assert ComputePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


GOOD = {"schema_version": 1, "units": ["a", "b"], "rows": ["00", "02"], "meta": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "version 2; this fastdiff reads version 1"),
        ({"schema_version": None}, "version None"),
        ({"units": "ab"}, "lists of strings"),
        ({"units": [1, 2]}, "lists of strings"),
        ({"rows": ["00", 2]}, "lists of strings"),
        ({"rows": {"0": "00"}}, "lists of strings"),
        ({"meta": []}, "is an object"),
        ({"rows": ["00", "0"]}, "2 digits"),
        ({"rows": ["00", "0x"]}, "2 digits"),
        ({"rows": ["00", "0²"]}, "2 digits"),
        ({"rows": ["00", "-1"]}, "2 digits"),
        ({"rows": ["00", "06"]}, "no action"),
        ({"rows": ["09", "00"]}, "no action"),
        ({"rows": []}, "at least 1"),
        ({"units": ["a", "a"]}, "repeat"),
        ({"meta": {"forecast_order": "many"}}, "forecast_order"),
    ],
)
def test_file_with_a_wrong_part_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    assert ComputePlan.load(path).table.tolist() == [[C, C], [C, R]]
    path.write_text(json.dumps(GOOD | change), encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        ComputePlan.load(path)


@pytest.mark.parametrize("key", ["schema_version", "units", "rows", "meta"])
def test_file_that_lacks_a_part_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({name: value for name, value in GOOD.items() if name != key}), encoding="utf-8")
    with pytest.raises(PlanError, match="schema version None" if key == "schema_version" else f"lacks {key}"):
        ComputePlan.load(path)


@pytest.mark.parametrize("content", [b"", b"not JSON", b"\xff\xfe\x00", b"[1, 2]", b'"plan"', b"null", b"[" * 100_000])
def test_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json|JSON object"):
        ComputePlan.load(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(PlanError, match=r"cannot be read as a plan.*ComputePlan\.save"):
            ComputePlan.load(path)


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = plan_of([C, C], [R, E], x=[1, 2]).save(tmp_path_factory.mktemp("plan") / "plan.json")
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(PlanError):
        ComputePlan.load(path)


def test_failing_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = plan_of([C, C], [C, S])
    path = old.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="JSON"):
        plan_of([C, C], late={"not JSON": object()}).save(path)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            plan_of([C, C]).save(path)
    assert ComputePlan.load(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
