"""What holds for every method: settings that round-trip, refuse what they cannot be, and say what they are."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import (
    ComputePlan,
    ConfigError,
    EncoderPropagation,
    ExitSchedule,
    FeatureInheritance,
    LayerSkipping,
    PlanError,
    ProfileMismatchError,
    SkipTuning,
    UncertaintyExit,
)
from fastdiff.engine.exits import SCOPES
from fastdiff.methods import Method, SavedPlan, as_methods
from fastdiff.methods.base import make_planner
from fastdiff.methods.encoder_propagation import KEY_SETS
from tiny.plans import C, R, plan_of, request_of, tables

OWN = [cls for cls in Method.registry.values() if cls.__module__.startswith("fastdiff.")]
EVERY_METHOD = pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
EXAMPLES: dict[str, Method] = {
    "EncoderPropagation": EncoderPropagation(keys=(0, 2, 5), max_parallel=3),
    "ExitSchedule": ExitSchedule("ase-demo"),
    "FeatureInheritance": FeatureInheritance(interval=3, order=2, span=(1, -1)),
    "LayerSkipping": LayerSkipping(speedup=1.5, target_speedup=2.0),
    "SavedPlan": SavedPlan(plan_of([C, C], [C, R], a=1)),
    "SkipTuning": SkipTuning(rho=0.8, time="decreasing"),
    "UncertaintyExit": UncertaintyExit(0.1, weights="trained", patience=2),
}


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high) | st.integers(int(np.ceil(low)), int(high))


@st.composite
def exit_schedules(draw: st.DrawFn) -> ExitSchedule:
    if draw(st.booleans()):
        return ExitSchedule(draw(st.sampled_from(["full", "ase-demo"])), heads=draw(st.none() | st.text()))
    edges = sorted(draw(st.sets(numbers(-100, 2000), min_size=1, max_size=6)))
    full = draw(st.none() | st.integers(1, 60))
    depths = st.integers(1, full or 60)
    return ExitSchedule(
        bin_edges=tuple(edges),
        depths=tuple(draw(st.lists(depths, min_size=len(edges), max_size=len(edges)))),
        full=full,
        space=draw(st.sampled_from(["timestep", "logsnr"])),
        heads=draw(st.none() | st.text()),
    )


@st.composite
def inheritances(draw: st.DrawFn) -> FeatureInheritance:
    keys = tuple(draw(st.lists(st.integers(0, 99), max_size=4)))
    return FeatureInheritance(
        interval=draw(st.integers(1, 10_000)),
        pattern="list" if keys else draw(st.sampled_from(["uniform", "head_dense", "tail_dense"])),
        keys=keys,
        dense=draw(numbers(0, 1)),
        span=(draw(st.integers(-9, 9)), draw(st.none() | st.integers(-9, 9))),
        level=draw(st.sampled_from([None, "stage", "layer", "branch"])),
        keep_up=draw(st.none() | st.integers(0, 12)),
        order=draw(st.integers(0, 3)),
        last_key=draw(st.booleans()),
        min_evaluations=draw(st.integers(0, 100)),
    )


SKIPPINGS = st.builds(
    LayerSkipping,
    speedup=numbers(1, 1000),
    target_speedup=st.none() | numbers(1, 1000),
    outside_share=st.floats(0, 0.999),
    variant=st.sampled_from(["even", "paper"]),
    fill=st.sampled_from(["reuse", "skip"]),
    interval=st.integers(0, 10_000),
    rotate=st.booleans(),
)
PROPAGATIONS = st.builds(
    EncoderPropagation,
    keys=st.sampled_from(list(KEY_SETS))
    | st.integers(1, 10_000)
    | st.integers(1, 99).map("uniform-{}".format)
    | st.sets(st.integers(1, 99)).map(lambda keys: (0, *sorted(keys))),
    parallel=st.booleans(),
    max_parallel=st.none() | st.integers(1, 10_000),
    prior_noise=st.none() | numbers(0, 1),
    tau=numbers(0, 1),
    inject=st.sampled_from(["before", "official-parallel"]),
    official_truncate=st.booleans(),
    encoder_share=numbers(0, 1),
    order=st.integers(0, 3),
)
UNCERTAINTIES = st.builds(
    UncertaintyExit,
    threshold=numbers(0, 1),
    weights=st.none() | st.text(),
    scope=st.sampled_from(SCOPES),
    patience=st.integers(1, 100),
    lookahead=st.none() | st.integers(0, 9),
    exits=st.lists(st.text(), max_size=3).map(tuple),
)
SAVED = st.builds(
    lambda table, meta: SavedPlan(plan_of(*table.tolist(), **meta)),
    tables(),
    st.dictionaries(st.sampled_from("abc"), st.integers() | st.text()),
)


@given(exit_schedules() | inheritances() | SKIPPINGS | PROPAGATIONS | UNCERTAINTIES | SAVED)
@settings(deadline=None)
def test_settings_survive_json(method: Method) -> None:
    saved = json.loads(json.dumps(method.to_dict()))
    again = Method.from_dict(saved)
    assert again == method
    assert type(again) is type(method)
    assert again.to_dict() == method.to_dict()
    assert str(again) == str(method)


def test_lists_are_as_good_as_tuples() -> None:
    assert ExitSchedule(bin_edges=[0, 500], depths=[4, 2]) == ExitSchedule(bin_edges=(0, 500), depths=(4, 2))
    listed = FeatureInheritance(pattern="list", keys=[1, 2], span=[1, -1])
    assert listed == FeatureInheritance(pattern="list", keys=(1, 2), span=(1, -1))
    assert hash(listed) == hash(FeatureInheritance(pattern="list", keys=(1, 2), span=(1, -1)))


def test_the_examples_are_of_every_method() -> None:
    assert {cls.__name__ for cls in OWN} == set(EXAMPLES)
    public = {
        name
        for name in fastdiff.__all__
        if isinstance(value := getattr(fastdiff, name), type) and issubclass(value, Method)
    }
    assert public | {"SavedPlan"} == set(EXAMPLES)


@EVERY_METHOD
def test_unknown_fields_are_refused(cls: type[Method]) -> None:
    saved = EXAMPLES[cls.__name__].to_dict()
    with pytest.raises(ConfigError, match=rf"{cls.__name__} has no field 'speed_up'; it has .*"):
        Method.from_dict(saved | {"speed_up": 2})


@EVERY_METHOD
def test_wrong_types_are_refused_for_every_field(cls: type[Method]) -> None:
    saved = EXAMPLES[cls.__name__].to_dict()
    for name in set(saved) - {"type"}:
        for wrong in ({"a": 1}, [["nested"]], 3.7, "text"):
            if isinstance(wrong, str) and name in ("heads", "weights"):
                continue  # a folder, looked at when it is needed
            if isinstance(wrong, float) and name in ("speedup", "target_speedup"):
                continue
            with pytest.raises((ConfigError, PlanError)):
                Method.from_dict(saved | {name: wrong})


@EVERY_METHOD
def test_settings_are_frozen(cls: type[Method]) -> None:
    method = EXAMPLES[cls.__name__]
    for field in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, field.name, None)


@EVERY_METHOD
def test_text_says_the_method_and_what_was_set(cls: type[Method]) -> None:
    text = str(EXAMPLES[cls.__name__])
    assert text.startswith(cls.__name__ + "(")
    expected = {
        "EncoderPropagation": ["keys=(0, 2, 5)", "max_parallel=3"],
        "ExitSchedule": ["'ase-demo'"],
        "FeatureInheritance": ["interval=3", "order=2", "span=(1, -1)"],
        "LayerSkipping": ["speedup=1.5", "target_speedup=2.0"],
        "SavedPlan": ["2 evaluations", "2 units", "75%"],
        "SkipTuning": ["rho=0.8", "time='decreasing'"],
        "UncertaintyExit": ["threshold=0.1", "weights='trained'", "patience=2"],
    }
    assert all(part in text for part in expected[cls.__name__])
    assert "dense" not in text, "defaults only lengthen it"
    assert len(text) < 120


@pytest.mark.parametrize("given_", [None, [], "LayerSkipping", {}, {"speedup": 2}, {"type": "Nothing"}, {"type": None}])
def test_what_is_no_saved_method_is_refused(given_: Any) -> None:
    with pytest.raises(ConfigError, match=r"saved method is a JSON object|no method"):
        Method.from_dict(given_)
    with pytest.raises(ConfigError, match=r"no method 'Nothing'.*ExitSchedule, FeatureInheritance, LayerSkipping"):
        Method.from_dict({"type": "Nothing"})


def test_missing_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SavedPlan cannot be made from {}.*'saved'"):
        Method.from_dict({"type": "SavedPlan"})


# -- several methods ---------------------------------------------------------------------------------------------------


def test_one_method_several_and_plans_are_accepted() -> None:
    plan = plan_of([C])
    skipping = LayerSkipping()
    assert as_methods(skipping) == (skipping,)
    assert as_methods([skipping, plan]) == as_methods((skipping, plan)) == (skipping, SavedPlan(plan))
    assert as_methods(plan) == (SavedPlan(plan),)
    assert as_methods([]) == ()


@pytest.mark.parametrize("wrong", [None, "balanced", LayerSkipping, {"type": "LayerSkipping"}, [LayerSkipping(), 3]])
def test_what_is_no_method_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"Expected methods \(EncoderPropagation, .*ComputePlan\); got"):
        as_methods(wrong)


def test_methods_are_merged() -> None:
    methods = (ExitSchedule.step(6, 500, 3), FeatureInheritance(interval=2, last_key=False))
    request = request_of(6, 8)
    plan = make_planner(methods)(request)
    assert plan == methods[0].plan(request).merge(methods[1].plan(request))
    assert plan.meta["methods"] == [str(method) for method in methods]
    assert plan.validate(request.backbone.traits).share < min(method.plan(request).share for method in methods)
    assert make_planner(())(request) == ComputePlan.full(len(request.grid), request.backbone.names)


def test_saved_plan_is_for_its_number_of_evaluations_and_units() -> None:
    saved = SavedPlan(plan_of([C, C], [C, R]))
    assert saved.plan(request_of(2, 2)) is saved.saved
    with pytest.raises(ProfileMismatchError, match="2 evaluations, this call makes 3"):
        saved.plan(request_of(2, 3))
    with pytest.raises(ProfileMismatchError, match="2 units does not fit 5"):
        make_planner([saved, LayerSkipping()])(request_of(5, 2))


def test_saved_plan_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes a ComputePlan"):
        SavedPlan("plan.json")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="schema version"):
        SavedPlan({"rows": []})  # type: ignore[arg-type]
    assert SavedPlan(ComputePlan.full(2, ("a",))).is_neutral
    assert not SavedPlan(plan_of([C], [R])).is_neutral
