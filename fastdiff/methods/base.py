"""What every method is: a frozen configuration that round-trips through JSON and turns into a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from fastdiff.errors import ConfigError, ProfileMismatchError
from fastdiff.plan import Action, ComputePlan, merge

if TYPE_CHECKING:
    from fastdiff.backbones import Backbone
    from fastdiff.cost import UnitCosts
    from fastdiff.engine.clock import Grid, LatentEdit
    from fastdiff.engine.exits import ExitRule


@dataclass(frozen=True)
class PlanRequest:
    """What a method may look at when it makes a plan.

    Args:
        backbone: the denoiser's units.
        grid: the evaluations to come.
        costs: measures each unit's latency on this machine, for the shapes of this call (`fastdiff.cost.measure`).
    """

    backbone: Backbone
    grid: Grid
    costs: Callable[[], UnitCosts]

    def full_plan(self, method: Method) -> ComputePlan:
        """A plan that computes everything, labelled with the method."""
        timesteps = [float(timestep) for timestep in self.grid.timesteps]
        meta = {"denoiser": self.backbone.class_name, "timesteps": timesteps, "methods": [str(method)]}
        if self.backbone.level != "layer":
            meta["level"] = self.backbone.level
        if merges := [unit.name for unit in self.backbone.units if unit.merges_skip]:
            meta["merges"] = merges
        return ComputePlan.full(len(self.grid), self.backbone.names, **meta)


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses of JSON-compatible fields and are checked when made."""

    registry: ClassVar[dict[str, type[Method]]] = {}
    accelerates_control: ClassVar[bool] = False
    """Whether it makes plans for ControlNets too."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Method.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Make tuples of lists, as JSON has them, so that equal settings are equal."""
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))

    def plan(self, request: PlanRequest) -> ComputePlan:
        """The plan for one sampling call."""
        raise NotImplementedError

    @property
    def is_neutral(self) -> bool:
        """Whether this setting asks for nothing to be skipped."""
        return False

    @property
    def view_level(self) -> str:
        """How finely a denoiser must be seen for it (`fastdiff.backbones.view`)."""
        return "layer"

    def skip_scales(self, request: PlanRequest) -> np.ndarray | None:
        """By how much the decoder reads each long skip scaled in each evaluation; None for not at all.

        An array of shape ``(evaluations, skips)``, float64, skips in the order in which the encoder makes them.
        """
        return None

    def exit_rule(self, request: PlanRequest) -> ExitRule | None:
        """When samples stop on their own in the evaluations to come; None for never."""
        return None

    @property
    def scales_control(self) -> bool:
        """Whether what ControlNets add to a long skip is scaled with it."""
        return True

    def latent_edit(self, backbone: Backbone) -> LatentEdit | None:
        """What changes the latents between evaluations of this denoiser."""
        return None

    def exit_heads(self) -> Mapping[str, nn.Module]:
        """Modules that read the hidden state at an exit, by the name of the first unit that does not run."""
        return {}

    def located(self, folder: Path) -> Method:
        """The same for a pipeline that was loaded from a folder, which may hold what the method needs."""
        return self

    def stored(self, folder: Path) -> Method:
        """Put what the method needs into a pipeline's folder; returns the method that finds it there."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """A JSON-compatible form that `from_dict` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"type": type(self).__name__, **plain}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Method:
        """Make a method from its `to_dict` form.

        Raises:
            ConfigError: if the type or a field is unknown, or a value is not allowed.
        """
        if not isinstance(data, Mapping) or "type" not in data:
            raise ConfigError(f"A saved method is a JSON object with a 'type'; got {data!r}.")
        cls = Method.registry.get(str(data["type"]))
        if cls is None:
            known = ", ".join(sorted(Method.registry))
            raise ConfigError(f"There is no method {data['type']!r}; the methods are {known}.")
        names = [field.name for field in fields(cls) if field.init]
        if unknown := set(data) - {"type", *names}:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(sorted(map(repr, unknown)))}; it has {', '.join(names)}."
            )
        values = {name: value for name, value in data.items() if name != "type"}
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__} cannot be made from {values}: {error}.") from error

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.init and getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(frozen=True)
class SavedPlan(Method):
    """A plan made elsewhere, used as a method: same units, same number of evaluations, or an error.

    Args:
        saved: the plan, or its `ComputePlan.to_dict` form.

    Raises:
        ConfigError: if it is neither.
        PlanError: if the dictionary is no plan.
    """

    saved: ComputePlan

    def __post_init__(self) -> None:
        if isinstance(self.saved, Mapping):
            object.__setattr__(self, "saved", ComputePlan.from_dict(self.saved))
        if not isinstance(self.saved, ComputePlan):
            raise ConfigError(f"SavedPlan takes a ComputePlan; got {self.saved!r}.")

    def __str__(self) -> str:
        rows, units = self.saved.table.shape
        return f"SavedPlan({rows} evaluations, {units} units, {self.saved.share:.0%} computed)"

    def plan(self, request: PlanRequest) -> ComputePlan:
        """The saved plan.

        Raises:
            ProfileMismatchError: if the call makes another number of evaluations.
        """
        if self.saved.evaluations != len(request.grid):
            raise ProfileMismatchError(
                f"The plan is for {self.saved.evaluations} evaluations, this call makes {len(request.grid)}. "
                "Use the step count and scheduler it was made for, or make a new plan."
            )
        return self.saved

    @property
    def view_level(self) -> str:
        """How finely the plan sees its denoiser."""
        return "branch" if self.saved.meta.get("level") == "branch" else "layer"

    @property
    def is_neutral(self) -> bool:
        """Whether the plan computes everything."""
        return self.saved.share == 1

    def to_dict(self) -> dict[str, Any]:
        """The plan in full, in its own JSON form."""
        return {"type": "SavedPlan", "saved": self.saved.to_dict()}


def make_planner(methods: Sequence[Method]) -> Callable[[PlanRequest], ComputePlan]:
    """One planner for several methods: their plans, merged; for none, everything is computed."""

    def planner(request: PlanRequest) -> ComputePlan:
        if not methods:
            return ComputePlan.full(len(request.grid), request.backbone.names)
        asked = [method for method in methods if method.accelerates_control or not request.backbone.is_control]
        return merge(method.plan(request) for method in asked)

    return planner


def level_of(methods: Sequence[Method]) -> str:
    """How finely a denoiser must be seen for all of some methods."""
    return "branch" if any(method.view_level == "branch" for method in methods) else "layer"


def inheriting(plan: ComputePlan, units: np.ndarray, keys: np.ndarray, order: int) -> np.ndarray:
    """A full plan's table in which some units inherit, or forecast, what the last key evaluations computed.

    Args:
        plan: the full plan.
        units: which units inherit, a boolean array of shape ``(units,)``.
        keys: which evaluations are keys, a boolean array of shape ``(evaluations,)``, the first among them.
        order: degree of the forecast; 0 to carry the last value over.
    """
    inherited = units & ~keys[:, None]
    is_forecast = inherited & (np.cumsum(keys)[:, None] >= 2) & (order > 0)  # a forecast needs two keys before it
    return np.where(is_forecast, Action.FORECAST, np.where(inherited, Action.REUSE, plan.table))


def as_methods(methods: Any) -> tuple[Method, ...]:
    """Accept one method or several, and plans in their place.

    Raises:
        ConfigError: if something else was given.
    """
    given = methods if isinstance(methods, (list, tuple)) else [methods]
    made = tuple(SavedPlan(method) if isinstance(method, ComputePlan) else method for method in given)
    for method in made:
        if not isinstance(method, Method):
            known = ", ".join(sorted(Method.registry))
            raise ConfigError(f"Expected methods ({known} or a ComputePlan); got {method!r}.")
    return made


def check_number(method: Any, name: str, low: float, high: float, *, whole: bool = False) -> None:
    """Refuse a field that is no number, NaN, or outside ``low..high``.

    Raises:
        ConfigError: naming the field, the value and the range.
    """
    value = getattr(method, name)
    kind = "a whole number" if whole else "a number"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):  # NaN is in no range
        raise ConfigError(f"{type(method).__name__}.{name} is {kind} from {low:g} to {high:g}; got {value!r}.")


def check_flag(method: Any, name: str) -> None:
    """Refuse a field that is neither True nor False.

    Raises:
        ConfigError: naming the field and the value.
    """
    if not isinstance(getattr(method, name), bool):
        raise ConfigError(f"{type(method).__name__}.{name} is True or False; got {getattr(method, name)!r}.")


def check_tuple(method: Any, name: str, what: str) -> None:
    """Refuse a field that is no sequence.

    Raises:
        ConfigError: naming the field, what it holds and the value.
    """
    if not isinstance(getattr(method, name), tuple):
        raise ConfigError(f"{type(method).__name__}.{name} is a list of {what}; got {getattr(method, name)!r}.")
