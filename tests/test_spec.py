"""Methods as text: every specification is a method or a typed error, every method has a specification."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import ConfigError, FastDiffError, PlanError
from fastdiff.methods import ExitSchedule, FeatureInheritance, LayerSkipping, Method, SavedPlan
from fastdiff.plan import ComputePlan
from fastdiff.spec import format_method, kebab, method_classes, parse_method

edges = st.lists(st.floats(0, 999), min_size=1, max_size=6, unique=True).map(lambda values: tuple(sorted(values)))
text = st.text(min_size=1, max_size=20)


@st.composite
def exit_schedules(draw: st.DrawFn) -> Method:
    if draw(st.booleans()):
        return ExitSchedule(draw(st.sampled_from(["full", "ase-demo"])), heads=draw(st.none() | text))
    bin_edges = draw(edges)
    depths = tuple(draw(st.lists(st.integers(1, 28), min_size=len(bin_edges), max_size=len(bin_edges))))
    return ExitSchedule(
        bin_edges=bin_edges,
        depths=depths,
        full=draw(st.sampled_from([None, 28, 40])),
        space=draw(st.sampled_from(["timestep", "logsnr"])),
        heads=draw(st.none() | text),
    )


@st.composite
def feature_inheritances(draw: st.DrawFn) -> Method:
    pattern = draw(st.sampled_from(["uniform", "head_dense", "tail_dense", "list"]))
    keys = tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=6))) if pattern == "list" else ()
    return FeatureInheritance(
        interval=draw(st.integers(1, 50)),
        pattern=pattern,
        keys=keys,
        dense=draw(st.floats(0, 1)),
        span=(draw(st.integers(-9, 9)), draw(st.none() | st.integers(-9, 9))),
        order=draw(st.integers(0, 3)),
        last_key=draw(st.booleans()),
    )


@st.composite
def layer_skippings(draw: st.DrawFn) -> Method:
    return LayerSkipping(
        speedup=draw(st.floats(1, 100)),
        target_speedup=draw(st.none() | st.floats(1, 100)),
        outside_share=draw(st.floats(0, 0.9)),
        variant=draw(st.sampled_from(["even", "paper"])),
        fill=draw(st.sampled_from(["reuse", "skip"])),
        interval=draw(st.integers(0, 20)),
        rotate=draw(st.booleans()),
    )


@settings(max_examples=200, deadline=None)
@given(method=st.one_of(exit_schedules(), feature_inheritances(), layer_skippings()))
def test_every_method_round_trips(method: Method) -> None:
    assert parse_method(format_method(method)) == method


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from([*method_classes(), "plan", "nonsense"]),
    rest=st.text(alphabet='abx0159.,:=[]"\\- \neNaulti', max_size=40),
)
def test_any_text_is_a_method_or_a_typed_error(name: str, rest: str) -> None:
    with contextlib.suppress(FastDiffError):
        assert isinstance(parse_method(f"{name}:{rest}"), Method)


@settings(max_examples=200, deadline=None)
@given(
    method=st.sampled_from(
        [(name, field) for name, cls in method_classes().items() for field in cls.__dataclass_fields__]
    ),
    value=st.sampled_from(["none", "true", "-1", "1e999", "NaN", "[]", "[1,2]", '["a"]', "{}", '""', "x", "[null]"]),
)
def test_any_value_of_any_field_is_a_method_or_a_typed_error(method: tuple[str, str], value: str) -> None:
    name, field = method
    with contextlib.suppress(FastDiffError):
        assert isinstance(parse_method(f"{name}:{field}={value}"), Method)


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("layer-skipping", LayerSkipping()),
        ("layer-skipping:speedup=3,fill=skip", LayerSkipping(speedup=3.0, fill="skip")),
        ("LayerSkipping: speedup = 3 , rotate = False", LayerSkipping(speedup=3.0, rotate=False)),
        ("layer-skipping:target-speedup=2", LayerSkipping(target_speedup=2.0)),
        ("layer-skipping:target-speedup=none", LayerSkipping()),
        ("exit-schedule:preset=full,heads=None", ExitSchedule("full")),
        ("layer-skipping:target_speedup=2", LayerSkipping(target_speedup=2.0)),
        ("exit-schedule:preset=ase-demo", ExitSchedule("ase-demo")),
        ("exit-schedule:bin-edges=[0,500],depths=[14,7]", ExitSchedule(bin_edges=(0, 500), depths=(14, 7))),
        ('exit-schedule:preset=full,heads="a,b"', ExitSchedule("full", heads="a,b")),
        ("feature-inheritance:span=[2,none]", None),
        ("feature-inheritance:span=[2,null]", FeatureInheritance(span=(2, None))),
        ("feature-inheritance:pattern=list,keys=[0,5,10]", FeatureInheritance(pattern="list", keys=(0, 5, 10))),
    ],
)
def test_specifications(spec: str, method: Method | None) -> None:
    if method is None:
        with pytest.raises(ConfigError):
            parse_method(spec)
    else:
        assert parse_method(spec) == method


def test_the_written_specification_is_short() -> None:
    assert format_method(ExitSchedule("ase-demo")) == "exit-schedule:preset=ase-demo"
    assert format_method(LayerSkipping()) == "layer-skipping"
    assert format_method(FeatureInheritance(interval=3, order=1)) == "feature-inheritance:interval=3,order=1"


@pytest.mark.parametrize(
    ("spec", "listed"),
    [
        ("early-exit", "feature-inheritance, layer-skipping, skip-tuning, uncertainty-exit, plan:FILE and saved:FILE"),
        ("layer-skipping:speed=2", "speedup, target-speedup, outside-share"),
        ("layer-skipping:speedup", "cannot be read from 'speedup' on"),
        ("layer-skipping:speedup=2,speedup=3", "given twice"),
        ("layer-skipping:speedup=fast", "LayerSkipping.speedup is a number"),
        ("layer-skipping:fill=drop", "'reuse' or 'skip'"),
        ("exit-schedule:preset=ase", "full, ase-demo"),
    ],
)
def test_errors_say_what_exists(spec: str, listed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_method(spec)
    assert listed in str(caught.value)


def test_a_saved_plan_is_a_method(tmp_path: Path) -> None:
    plan = ComputePlan(np.array([[0, 0], [0, 2]]), ("blocks.0", "blocks.1"))
    method = parse_method(f"plan:{plan.save(tmp_path / 'plan.json')}")
    assert isinstance(method, SavedPlan)
    assert method.saved == plan


def test_a_missing_plan_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json"):
        parse_method(f"plan:{tmp_path / 'none.json'}")


def test_kebab_names() -> None:
    assert kebab("FeatureInheritance") == "feature-inheritance"
    assert kebab("bin_edges") == "bin-edges"
