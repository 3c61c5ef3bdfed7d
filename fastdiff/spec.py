"""Settings as text, ``NAME:field=value,field=value`` in kebab case: read and written from the classes themselves."""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

from fastdiff.errors import ConfigError
from fastdiff.methods import Method, SavedPlan
from fastdiff.plan import ComputePlan

PLAN = "plan"
"""``plan:FILE`` stands for a saved plan."""

SAVED = "saved"
"""``saved:FILE`` stands for a method saved as JSON, which may find what it needs beside the file."""

_FIELD = re.compile(r'\s*(?P<name>[A-Za-z][\w-]*)\s*=\s*(?P<value>"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^,]*?)\s*(?:,|$)')
_BARE_TEXT = re.compile(r"[\w./:+@~-]+")


def kebab(name: str) -> str:
    """``FeatureInheritance`` and ``bin_edges`` as ``feature-inheritance`` and ``bin-edges``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower().replace("_", "-")


def field_defaults(cls: type) -> dict[str, Any]:
    """The fields of a dataclass that can be given, with their defaults."""
    return {field.name: field.default for field in fields(cls) if field.init}


def parse_fields(cls: type, name: str, text: str) -> dict[str, Any]:
    """The values that ``field=value,field=value`` gives to fields of a dataclass.

    Values are numbers, words, ``true``, ``false``, ``none`` or lists such as ``[0,5,10]``; text with a comma stands in
    double quotes.

    Args:
        cls: the dataclass.
        name: what people call it.
        text: the fields.

    Raises:
        ConfigError: if the text cannot be read, or a field does not exist or is given twice.
    """
    hints = typing.get_type_hints(cls)
    known = field_defaults(cls)
    values: dict[str, Any] = {}
    for given, value in _split(text, f"{name}:{text}"):
        field = given.replace("-", "_")
        if field not in known:
            existing = ", ".join(map(kebab, known)) or "none"
            raise ConfigError(f"{name} has no field {given!r}; its fields are {existing}.")
        if field in values:
            raise ConfigError(f"The field {given!r} is given twice in '{name}:{text}'.")
        values[field] = _parse_value(value, is_text=str in (hints[field], *typing.get_args(hints[field])))
    return values


def format_fields(name: str, settings: Any, make: Callable[[Mapping[str, Any]], Any]) -> str:
    """The shortest specification of a dataclass's instance.

    Args:
        name: what people call the class.
        settings: the instance.
        make: makes an instance of values by field name; a `ConfigError` of its says that they are not enough.
    """
    defaults = field_defaults(type(settings))
    given = {field: getattr(settings, field) for field in defaults}
    changed = [field for field, default in defaults.items() if given[field] != default]
    # Leaving out what other fields imply, such as the table that a preset brings.
    subsets = (names for size in range(len(changed) + 1) for names in combinations(changed, size))
    made = ({field: given[field] for field in names} for names in subsets)
    values = next(values for values in made if _makes(make, values, settings))
    text = ",".join(f"{kebab(field)}={_format_value(value)}" for field, value in values.items())
    return name + (f":{text}" if text else "")


def method_classes() -> dict[str, type[Method]]:
    """The methods that can be named, by their name in kebab case."""
    return {kebab(name): cls for name, cls in sorted(Method.registry.items()) if cls is not SavedPlan}


def parse_method(spec: str) -> Method:
    """Make a method from its specification, whose fields are as in `parse_fields`.

    Raises:
        ConfigError: if the method or a field does not exist, or a value is not allowed; the message lists what exists.
        PlanError: if the file of ``plan:FILE`` is no plan.
    """
    name, _, rest = spec.partition(":")
    name = kebab(name.strip())
    if name == PLAN:
        return SavedPlan(ComputePlan.load(rest))
    if name == SAVED:
        return load_method(rest)
    classes = method_classes()
    if name not in classes:
        raise ConfigError(
            f"There is no method {name!r}; the methods are {', '.join(classes)}, {PLAN}:FILE and {SAVED}:FILE."
        )
    cls = classes[name]
    return Method.from_dict({"type": cls.__name__, **parse_fields(cls, name, rest)})


def load_method(path: str | os.PathLike[str]) -> Method:
    """Read a method from a file with its `Method.to_dict` form, as `fastdiff calibrate` writes it.

    Raises:
        ConfigError: if the file cannot be read or holds no method.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a saved method, such as `fastdiff calibrate` writes: {error}"
        ) from error
    return Method.from_dict(data).located(path.parent)


def format_method(method: Method) -> str:
    """The shortest specification that `parse_method` turns into this method.

    Raises:
        ConfigError: for a saved plan, which has no specification but its file.
    """
    if isinstance(method, SavedPlan):
        raise ConfigError(f"A saved plan has no fields to write down; save it and use {PLAN}:FILE.")
    name = type(method).__name__
    return format_fields(kebab(name), method, lambda values: Method.from_dict({"type": name, **values}))


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
        return text  # the class's own check names the field and what it expects


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and _BARE_TEXT.fullmatch(value) and value.lower() != "none":
        return value
    return json.dumps(value, separators=(",", ":"))


def _makes(make: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any], settings: Any) -> bool:
    try:
        return bool(make(values) == settings)
    except ConfigError:
        return False
