"""Methods as text: ``NAME:field=value,field=value``, in kebab case, made from the method classes themselves."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import fields
from itertools import combinations
from typing import Any

from fastdiff.errors import ConfigError
from fastdiff.methods import Method, SavedPlan
from fastdiff.plan import ComputePlan

PLAN = "plan"
"""``plan:FILE`` stands for a saved plan."""

_FIELD = re.compile(r'\s*(?P<name>[A-Za-z][\w-]*)\s*=\s*(?P<value>"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^,]*?)\s*(?:,|$)')
_BARE_TEXT = re.compile(r"[\w./:+@~-]+")


def kebab(name: str) -> str:
    """``FeatureInheritance`` and ``bin_edges`` as ``feature-inheritance`` and ``bin-edges``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower().replace("_", "-")


def method_classes() -> dict[str, type[Method]]:
    """The methods that can be named, by their name in kebab case."""
    return {kebab(name): cls for name, cls in sorted(Method.registry.items()) if cls is not SavedPlan}


def field_defaults(cls: type[Method]) -> dict[str, Any]:
    """The fields that can be given, with their defaults."""
    return {field.name: field.default for field in fields(cls) if field.init}


def parse_method(spec: str) -> Method:
    """Make a method from its specification.

    Fields are numbers, words, ``true``, ``false``, ``none`` or lists such as ``[0,5,10]``; text with a comma stands in
    double quotes.

    Raises:
        ConfigError: if the method or a field does not exist, or a value is not allowed; the message lists what exists.
        PlanError: if the file of ``plan:FILE`` is no plan.
    """
    name, _, rest = spec.partition(":")
    name = kebab(name.strip())
    if name == PLAN:
        return SavedPlan(ComputePlan.load(rest))
    classes = method_classes()
    if name not in classes:
        raise ConfigError(f"There is no method {name!r}; the methods are {', '.join(classes)} and {PLAN}:FILE.")
    cls = classes[name]
    hints = typing.get_type_hints(cls)
    known = field_defaults(cls)
    values: dict[str, Any] = {}
    for given, text in _split(rest, spec):
        field = given.replace("-", "_")
        if field not in known:
            raise ConfigError(f"{name} has no field {given!r}; its fields are {', '.join(map(kebab, known))}.")
        if field in values:
            raise ConfigError(f"The field {given!r} is given twice in {spec!r}.")
        values[field] = _parse_value(text, is_text=str in (hints[field], *typing.get_args(hints[field])))
    return Method.from_dict({"type": cls.__name__, **values})


def format_method(method: Method) -> str:
    """The shortest specification that `parse_method` turns into this method.

    Raises:
        ConfigError: for a saved plan, which has no specification but its file.
    """
    if isinstance(method, SavedPlan):
        raise ConfigError(f"A saved plan has no fields to write down; save it and use {PLAN}:FILE.")
    cls = type(method)
    given = {name: getattr(method, name) for name in field_defaults(cls)}
    changed = [name for name, default in field_defaults(cls).items() if given[name] != default]
    # Leaving out what other fields imply, such as the table that a preset brings.
    subsets = (names for size in range(len(changed) + 1) for names in combinations(changed, size))
    made = ({name: given[name] for name in names} for names in subsets)
    values = next(values for values in made if _equal_made(cls, values, method))
    text = ",".join(f"{kebab(name)}={_format_value(value)}" for name, value in values.items())
    return kebab(cls.__name__) + (f":{text}" if text else "")


def _split(text: str, spec: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text):
        match = _FIELD.match(text, position)
        if match is None:
            raise ConfigError(
                f"{spec!r} cannot be read from {text[position:]!r} on; expected NAME:field=value,field=value "
                "with lists in [brackets] and text with commas in double quotes."
            )
        yield match["name"], match["value"]
        position = match.end()


def _parse_value(text: str, *, is_text: bool) -> Any:
    if text.lower() == "none":
        return None
    if is_text and not text.startswith('"'):
        return text
    if text in ("True", "False"):
        text = text.lower()
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # the method's own check names the field and what it expects


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and _BARE_TEXT.fullmatch(value) and value.lower() != "none":
        return value
    return json.dumps(value, separators=(",", ":"))


def _equal_made(cls: type[Method], values: dict[str, Any], method: Method) -> bool:
    try:
        return Method.from_dict({"type": cls.__name__, **values}) == method
    except ConfigError:
        return False
