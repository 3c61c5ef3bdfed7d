"""``fastdiff info``: what a model is made of, what its units cost, and what can be done with it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import (
    add_device_options,
    call,
    load_pipeline,
    new_parser,
    parse_arguments,
)
from fastdiff.errors import FastDiffError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.backbones import Backbone, Unit
    from fastdiff.cost import UnitCosts
    from fastdiff.methods import Method

PURPOSE = """\
Say what a model is made of and what can be done with it. Shown are its components, the stages of its denoiser with
their number of units (what a method leaves out or reuses), multiply-accumulates (MACs) and time, and which methods work
on it, or why not. The costs come from a call of two steps.
Without MODEL: the models that ship with fastdiff, all methods with their fields, and the presets."""

EXAMPLES = (
    "fastdiff info",
    "fastdiff info zoo:glyphs-dit",
    "fastdiff info zoo:glyphs-sd --units",
    "fastdiff info ./my-pipeline --arg height=512 --arg width=512",
    "fastdiff info ./my-pipeline --no-cost",
)
PROBE_STEPS = 2


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(subparsers, "info", PURPOSE, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder, repository or zoo:NAME")
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="steps to price the methods at (default: 50)"
    )
    parser.add_argument("--units", action="store_true", help="list every unit instead of the stages")
    parser.add_argument("--no-cost", action="store_true", help="do not call the pipeline")
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="argument of the call that measures costs"
    )
    add_device_options(parser)
    parser.set_defaults(run=run, method=[], preset="off")


def run(options: argparse.Namespace) -> None:
    """Print it."""
    lines = describe_model(options) if options.model else describe_package()
    for line in lines:
        print(line)


# -- the package -------------------------------------------------------------------------------------------------------


def describe_package() -> Iterator[str]:
    """Shipped models, methods with their fields, presets."""
    from fastdiff import zoo
    from fastdiff.pipelines.acceleration import PRESETS
    from fastdiff.spec import PLAN, SAVED, field_defaults, format_method, kebab, method_classes

    yield "Models that ship with fastdiff"
    yield from (f"  zoo:{name}" for name in zoo.names())
    yield ""
    yield "Methods, with their fields and defaults (--method NAME:field=value,field=value)"
    for name, cls in method_classes().items():
        yield f"  {name}: {first_sentence(cls)}"
        yield from (f"      {kebab(field)}={_show(default)}" for field, default in field_defaults(cls).items())
    yield f"  {PLAN}:FILE: A plan saved by `fastdiff plan save`, `generate` or `demo`."
    yield f"  {SAVED}:FILE: A method saved by `fastdiff calibrate`."
    yield ""
    yield "Presets (--preset NAME)"
    for name, methods in PRESETS.items():
        yield f"  {name}: {' '.join(map(format_method, methods)) or 'no method'}"


def first_sentence(cls: type) -> str:
    """The first sentence of a class's docstring."""
    paragraph = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (bool, tuple)):
        return str(list(value) if isinstance(value, tuple) else value).replace(" ", "").lower()
    return str(value)


# -- a model -----------------------------------------------------------------------------------------------------------


def describe_model(options: argparse.Namespace) -> Iterator[str]:
    """Components, stages or units with their costs, and what each method would do."""
    from torch import nn

    from fastdiff.backbones import view
    from fastdiff.pipelines.acceleration import DENOISERS

    pipe = load_pipeline(options, options.model, on_unsupported="off")
    yield f"{options.model}: {type(pipe).__name__}"
    yield ""
    yield "Components"
    yield from _components(pipe)
    present = [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]
    if not present:
        yield f"\nNo denoiser: none of the components is called {', '.join(DENOISERS)}."
    for name in present:
        module = getattr(pipe, name)
        yield ""
        try:
            backbone = view(module)
        except FastDiffError as error:
            yield f"{name}: {type(module).__name__}, not supported: {error}"
            continue
        yield f"{name}: {type(module).__name__}, {len(backbone.units)} units"
        yield from _denoiser(pipe, name, backbone, options)


def _components(pipe: DiffusionPipeline) -> Iterator[str]:
    width = max(map(len, pipe.components))
    for name, component in pipe.components.items():
        parameters = getattr(component, "parameters", None)
        size = f", {count(sum(p.numel() for p in parameters()))} parameters" if callable(parameters) else ""
        yield f"  {name:<{width}}  {'none' if component is None else type(component).__name__ + size}"


def count(number: float) -> str:
    """A large number with its unit, e.g. ``4.31 M``."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.0f}"


def _denoiser(pipe: DiffusionPipeline, name: str, backbone: Backbone, options: argparse.Namespace) -> Iterator[str]:
    """One denoiser's parts and what each method would do with them."""
    costs = None
    if not options.no_cost:
        try:
            costs = _measure(pipe, name, parse_arguments(options.arg))
        except FastDiffError as error:
            yield f"  costs are unknown: {error}"
    parts = [(unit.name, [unit]) for unit in backbone.units] if options.units else _stages(backbone, costs)
    yield from _priced(parts, costs)
    yield f"  With {options.steps} steps, as a share of the full {'MACs' if costs else 'cells'}:"
    for spec, methods in _settings():
        yield f"    {spec:<36} {_what_it_does(pipe, name, methods, options.steps, costs)}"


def _measure(pipe: DiffusionPipeline, name: str, given: dict[str, Any]) -> UnitCosts | None:
    """Costs in the shapes of a short call; None if the call did not use the denoiser."""
    import fastdiff
    from fastdiff.pipelines.calling import call_parameters

    required = {"class_labels": [0], "prompt": "a photo", "num_inference_steps": PROBE_STEPS}
    arguments = {key: value for key, value in required.items() if key in call_parameters(pipe)} | given
    fastdiff.enable(pipe, fastdiff.ExitSchedule("full"))
    pipe.set_progress_bar_config(disable=True)
    call(pipe, arguments)
    measure = pipe.fastdiff.last_run.denoisers[name].measure
    return measure() if measure else None


Part = tuple[str, list["Unit"]]
"""A name, and the units that it stands for."""


def _stages(backbone: Backbone, costs: UnitCosts | None) -> Iterator[Part]:
    """The stages in execution order; those that follow each other in one list and are alike are one part."""
    macs = dict(zip(costs.units, costs.macs, strict=True)) if costs else {}
    lists: dict[str, dict[str, list[Unit]]] = {}
    for unit in backbone.units:
        lists.setdefault(unit.stage.rpartition(".")[0] or unit.stage, {}).setdefault(unit.stage, []).append(unit)
    for stages in lists.values():
        alike = groupby(stages, key=lambda stage: [macs.get(unit.name) for unit in stages[stage]])
        for _, run in alike:
            names = list(run)
            label = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1].rpartition('.')[2]}"
            yield label, [unit for name in names for unit in stages[name]]


def _priced(parts: Iterable[Part], costs: UnitCosts | None) -> Iterator[str]:
    """One line for each part, and one for what is outside the units."""
    if costs is None:
        yield from (f"    {label:<36} {_number_of(units)}" for label, units in parts)
        return

    def price(macs: float, seconds: float) -> str:
        return f"{count(macs)} MACs ({macs / costs.total_macs:.1%}), {1000 * seconds:.2f} ms"

    total = f"{count(costs.total_macs)} MACs, {1000 * costs.total_latency:.2f} ms"
    yield f"  one evaluation in the pipeline's shapes: {total}"
    column = {name: number for number, name in enumerate(costs.units)}
    for label, units in parts:
        columns = [column[unit.name] for unit in units]
        yield f"    {label:<36} {_number_of(units):<9} {price(costs.macs[columns].sum(), costs.latency[columns].sum())}"
    yield f"    {'outside the units':<36} {'':<9} {price(costs.fixed_macs, costs.fixed_latency)}"


def _number_of(units: list[Unit]) -> str:
    return "1 unit" if len(units) == 1 else f"{len(units)} units"


def _settings() -> Iterator[tuple[str, tuple[Method, ...]]]:
    """Every method with its defaults, and every preset."""
    from fastdiff.pipelines.acceleration import PRESETS
    from fastdiff.spec import method_classes, parse_method

    for name in method_classes():
        spec = f"{name}:preset=ase-demo" if name == "exit-schedule" else name
        yield spec, (parse_method(spec),)
    yield from ((f"preset {name}", methods) for name, methods in PRESETS.items() if methods)


def _what_it_does(
    pipe: DiffusionPipeline, name: str, methods: tuple[Method, ...], steps: int, costs: UnitCosts | None
) -> str:
    import fastdiff

    try:
        fastdiff.enable(pipe, methods)
        cost = pipe.fastdiff.plan(steps, name).cost(costs)
    except FastDiffError as error:
        return f"not possible: {error}"
    return f"{cost.macs_share:.1%}" + (f", {cost.speedup:.2f} times faster expected" if costs else "")
