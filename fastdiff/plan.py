"""The compute plan: what happens to every unit of a denoiser at every evaluation of one sampling call.

A plan is a table. Rows are denoiser evaluations in order (0 is the noisiest), columns are the backbone's units in
execution order. Every static method returns one, every dynamic method leaves one behind, one executor runs them all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.errors import PlanError, ProfileMismatchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastdiff.cost import PlanCost, UnitCosts

SCHEMA_VERSION = 1


class Action(IntEnum):
    """What the executor does in one cell of a plan. Larger values leave out more work."""

    COMPUTE = 0
    """Run the unit."""
    FORECAST = 1
    """As ``REUSE``, extrapolated from the last two or more computed values."""
    REUSE = 2
    """Use what an earlier evaluation left: the unit's output, or its residual added to the fresh input."""
    SKIP = 3
    """Pass the input through."""
    DROP = 4
    """Nobody reads this unit's result in this row; filled in by `ComputePlan.prune` only."""
    EXIT = 5
    """The row ended before this unit: an exit head reads the hidden state, nothing further runs."""


READS_CACHE = (Action.REUSE, Action.FORECAST)


@dataclass(frozen=True)
class UnitTraits:
    """What validation and pruning must know of one unit.

    Args:
        name: dotted path of the unit in the denoiser, e.g. ``"transformer_blocks.3"``.
        same_shape: whether the output has the input's shape, so that the unit can be passed through.
        can_exit: whether an exit head can read the hidden state that enters this unit.
        reuse: what reuse takes from an earlier evaluation. ``"residual"``: ``h_out - h_in``, added to the fresh input.
            ``"output"``: the output, so that what comes before need not run. ``"branch"``: the output too, of a module
            whose caller adds it to the fresh hidden state.
        reads: names of earlier units, other than the one before, whose outputs this unit reads (long skips).
        is_output: whether the denoiser's own output is read here; that of the last unit always is.
    """

    name: str
    same_shape: bool = True
    can_exit: bool = True
    reuse: str = "residual"
    reads: tuple[str, ...] = ()
    is_output: bool = False


@dataclass(frozen=True, eq=False)
class ComputePlan:
    """A table of `Action`s for one sampling call.

    Args:
        table: integer array of shape ``(evaluations, units)`` with `Action` values; kept as read-only int8.
        units: the column names, in execution order.
        meta: JSON-compatible facts about where the plan comes from (denoiser class, timesteps, methods, ``merges``:
            names of units that only merge a long skip, ...), and how it is carried out: ``forecast_order``,
            ``replaced`` (names of units whose whole output is reused where their residual could be), ``parallel``
            (rows that do not read the sample run as one batch with the row they reuse) and ``max_parallel`` (rows in
            such a batch, at most).

    Raises:
        PlanError: if the table is not two-dimensional, is empty, does not match ``units``, or has unknown actions, or
            if ``meta`` says what cannot be carried out.
    """

    table: np.ndarray
    units: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            table = np.array(self.table)
        except ValueError as error:
            raise PlanError(f"A plan's table is rectangular, one column for each unit: {error}.") from error
        if table.ndim != 2 or 0 in table.shape:
            raise PlanError(f"A plan's table has shape (evaluations, units), both at least 1; got {table.shape}.")
        if table.shape[1] != len(self.units):
            raise PlanError(f"The table has {table.shape[1]} columns but {len(self.units)} unit names were given.")
        if len(set(self.units)) != len(self.units):
            raise PlanError("Unit names repeat; every column of a plan needs its own name.")
        if not np.isin(table, [int(action) for action in Action]).all():
            names = ", ".join(f"{action.value}={action.name}" for action in Action)
            raise PlanError(f"The table holds values that are no action; the actions are {names}.")
        self._check_meta()
        table = table.astype(np.int8)
        table.setflags(write=False)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "units", tuple(self.units))
        object.__setattr__(self, "meta", dict(self.meta))

    def _check_meta(self) -> None:
        for name in ("forecast_order", "max_parallel"):
            value = self.meta.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"A plan's {name} is a whole number from 1; got {value!r}.")
        if not isinstance(self.meta.get("parallel", False), bool):
            raise PlanError(f"A plan is parallel or not, True or False; got {self.meta['parallel']!r}.")
        for name in ("replaced", "merges"):
            value = self.meta.get(name, ())
            if not isinstance(value, (list, tuple)) or not set(value) <= set(self.units):
                raise PlanError(f"A plan's meta has in {name!r} a list of its units; got {value!r}.")

    @classmethod
    def full(cls, evaluations: int, units: Sequence[str], **meta: Any) -> ComputePlan:
        """The plan that computes everything."""
        return cls(np.zeros((evaluations, len(units)), dtype=np.int8), tuple(units), meta)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ComputePlan):
            return NotImplemented
        same_cells = self.units == other.units and np.array_equal(self.table, other.table)
        return same_cells and dict(self.meta) == dict(other.meta)

    __hash__ = None  # type: ignore[assignment]  # meta is a mapping of arbitrary JSON

    @property
    def evaluations(self) -> int:
        """Number of rows."""
        return self.table.shape[0]

    @cached_property
    def rows(self) -> list[list[int]]:
        """The table as plain numbers, which compare with actions far faster one by one than numpy's do."""
        rows: list[list[int]] = self.table.tolist()
        return rows

    @property
    def depths(self) -> np.ndarray:
        """Units computed in each row, an int array of shape ``(evaluations,)``."""
        return (self.table == Action.COMPUTE).sum(axis=1)

    @property
    def share(self) -> float:
        """Share of all cells that are computed, in [0, 1]. Units are not equally expensive: see `cost`."""
        return float((self.table == Action.COMPUTE).mean())

    def counts(self) -> dict[str, int]:
        """How many cells each action has."""
        return {action.name: int((self.table == action).sum()) for action in Action}

    @property
    def forecast_order(self) -> int:
        """Degree of the polynomial that `Action.FORECAST` cells extrapolate with."""
        return self.meta.get("forecast_order", 1)

    def reuse_kinds(self, traits: Sequence[UnitTraits]) -> tuple[str, ...]:
        """What reuse takes of each unit: its own kind, or ``"output"`` where the plan says so (``replaced``)."""
        replaced = self.meta.get("replaced", ())
        return tuple("output" if trait.name in replaced else trait.reuse for trait in traits)

    def sources(self, row: int, column: int) -> tuple[int, ...]:
        """The rows whose computed value a reading cell uses, newest first; fewer than asked near the start."""
        wanted = 1 + (self.forecast_order if self.table[row, column] == Action.FORECAST else 0)
        computed = np.flatnonzero(self.table[:row, column] == Action.COMPUTE)
        return tuple(int(source) for source in computed[::-1][:wanted])

    # -- validity ----------------------------------------------------------------------------------------------------

    def validate(self, traits: Sequence[UnitTraits] | None = None) -> ComputePlan:
        """Check the plan and return it.

        Args:
            traits: the backbone's units in the plan's order; without them only what needs no model is checked.

        Raises:
            PlanError: naming the rule, the row and the unit of the first cell that cannot be executed.
            ProfileMismatchError: if the traits belong to another set of units.
        """
        if traits is not None:
            check_same_units(self.units, [trait.name for trait in traits])
        self._check_sources()
        self._check_exits(traits)
        if traits is not None:
            self._check_skips(traits)
            dropped = self.table == Action.DROP
            self._fail("V8", dropped & self._is_read(traits), "another unit reads its result; leave DROP to `prune`.")
        return self

    def _fail(self, rule: str, cells: np.ndarray, reason: str) -> None:
        if cells.any():
            row, column = (int(index) for index in np.argwhere(cells)[0])
            action = Action(int(self.table[row, column])).name
            unit = self.units[column]
            raise PlanError(f"{rule}: {action} at row {row}, unit {unit!r}: {reason}", row=row, unit=unit)

    def _check_sources(self) -> None:
        reads = np.isin(self.table, READS_CACHE)
        self._fail("V5", reads & (np.arange(self.evaluations) == 0)[:, None], "the first row has nothing to reuse.")
        computed = self.table == Action.COMPUTE
        missing = reads & (np.cumsum(computed, axis=0) == 0)
        self._fail("V1", missing, "no earlier row computes this unit; compute it in an earlier row.")

    def _check_exits(self, traits: Sequence[UnitTraits] | None) -> None:
        exits = self.table == Action.EXIT
        after_exit = np.logical_or.accumulate(exits, axis=1)
        self._fail("V3", after_exit & ~exits, "the row has exited before; nothing may run after an exit.")
        self._fail("V3", exits & (np.arange(len(self.units)) == 0), "a row needs at least one unit before it exits.")
        if traits is not None:
            starts = exits & ~np.hstack([np.zeros((self.evaluations, 1), dtype=bool), exits[:, :-1]])
            no_head = np.array([not trait.can_exit for trait in traits])
            self._fail("V3", starts & no_head, "no exit head can read the hidden state here.")

    def _check_skips(self, traits: Sequence[UnitTraits]) -> None:
        changes_shape = np.array([not trait.same_shape for trait in traits])
        skips = self.table == Action.SKIP
        self._fail("V2", skips & changes_shape, "the unit changes its input's shape and cannot be passed through.")

    # -- making plans from plans -------------------------------------------------------------------------------------

    def merge(self, *others: ComputePlan) -> ComputePlan:
        """Combine plans for the same call: every cell takes the action that leaves out most work.

        A ``REUSE`` whose source another plan removed is computed instead, so that the result is valid again.

        Raises:
            PlanError: if the plans have different rows.
            ProfileMismatchError: if they have different units.
        """
        table = self.table.copy()
        meta = dict(self.meta)
        for other in others:
            check_same_units(self.units, other.units)
            if other.evaluations != self.evaluations:
                raise PlanError(f"Plans of {self.evaluations} and {other.evaluations} evaluations cannot be merged.")
            table = np.maximum(table, other.table)
            lists = {name: [*meta.get(name, []), *other.meta.get(name, [])] for name in ("methods", "replaced")}
            meta = {**meta, **other.meta, **{name: both for name, both in lists.items() if both}}
        return ComputePlan(_compute_orphans(table), self.units, meta)

    def prune(self, traits: Sequence[UnitTraits]) -> ComputePlan:
        """Drop units whose result nobody reads (rule V8): neither in their row nor from the cache in a later one."""
        check_same_units(self.units, [trait.name for trait in traits])
        return ComputePlan(np.where(self._is_read(traits), self.table, Action.DROP), self.units, self.meta)

    def _is_read(self, traits: Sequence[UnitTraits]) -> np.ndarray:
        """Which cells' results somebody reads, a boolean array of the table's shape."""
        column = {name: index for index, name in enumerate(self.units)}
        kinds = self.reuse_kinds(traits)
        is_read = np.zeros(self.table.shape, dtype=bool)
        is_read[:, -1] = True
        is_read[:, [trait.is_output for trait in traits]] = True
        for row, index in product(reversed(range(self.evaluations)), reversed(range(len(self.units)))):
            action = self.rows[row][index]
            if not is_read[row, index] or action == Action.DROP:
                continue
            if action in READS_CACHE:
                is_read[list(self.sources(row, index)), index] = True
                if kinds[index] == "output":
                    continue
            if index > 0:
                is_read[row, index - 1] = True
            if action == Action.COMPUTE:
                is_read[row, [column[name] for name in traits[index].reads]] = True
        return is_read

    # -- price and picture -------------------------------------------------------------------------------------------

    def cost(self, costs: UnitCosts | None = None) -> PlanCost:
        """The plan's price: share of the full MACs and the speedup to expect; see `fastdiff.cost.price`."""
        from fastdiff.cost import price

        return price(self, costs)

    def render(self, width: int = 100) -> str:
        """The plan as text, one line per run of equal rows; see `fastdiff.draw.as_text`."""
        from fastdiff.draw import as_text

        return as_text(self, width)

    def plot(self, axes: Axes | None = None) -> Axes:
        """The plan as a matplotlib heat map; see `fastdiff.draw.heat_map`."""
        from fastdiff.draw import heat_map

        return heat_map(self, axes)

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A JSON-compatible form; each row is a string with one digit per unit."""
        rows = ["".join(map(str, row)) for row in self.table.tolist()]
        return {"schema_version": SCHEMA_VERSION, "units": list(self.units), "rows": rows, "meta": dict(self.meta)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ComputePlan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: if the data is incomplete, malformed, or from a later version of the format.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"A saved plan is a JSON object; got {type(data).__name__}.")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise PlanError(f"The plan has schema version {version!r}; this fastdiff reads version {SCHEMA_VERSION}.")
        if missing := {"units", "rows", "meta"} - set(data):
            raise PlanError(f"The saved plan lacks {', '.join(sorted(missing))}.")
        units, rows, meta = data["units"], data["rows"], data["meta"]
        if not (_is_list_of_str(units) and _is_list_of_str(rows) and isinstance(meta, Mapping)):
            raise PlanError("In a saved plan `units` and `rows` are lists of strings and `meta` is an object.")
        if not all(row.isascii() and row.isdigit() and len(row) == len(units) for row in rows):
            raise PlanError(f"Every row of a saved plan is a string of {len(units)} digits, one for each unit.")
        return cls(np.array([[int(digit) for digit in row] for row in rows], dtype=np.int8), tuple(units), meta)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON; the file appears whole or not at all.

        Raises:
            PlanError: if ``meta`` holds something that JSON cannot.
        """
        try:
            return write_json(path, self.to_dict())
        except TypeError as error:
            raise PlanError(
                f"The plan's meta holds what JSON cannot: {error}. Keep numbers, texts and lists."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ComputePlan:
        """Read a plan written by `save`.

        Raises:
            PlanError: if the file cannot be read or is no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise PlanError(
                f"{path} cannot be read as a plan: {error}. Expected a file from ComputePlan.save."
            ) from error
        return cls.from_dict(data)


def check_same_units(expected: Sequence[str], given: Sequence[str]) -> None:
    """Refuse to mix plans or models with different units.

    Raises:
        ProfileMismatchError: naming the first unit that differs.
    """
    if tuple(expected) == tuple(given):
        return
    pairs = zip(expected, given, strict=False)
    differing = next((f"{a!r} against {b!r}" for a, b in pairs if a != b), "one has more units")
    message = f"A plan for {len(expected)} units does not fit {len(given)} units ({differing}). "
    raise ProfileMismatchError(message + "Make the plan for this model with `pipe.fastdiff.plan(num_inference_steps)`.")


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Write JSON so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    written = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        written.chmod(0o644)
        os.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    return path


def _is_list_of_str(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _compute_orphans(table: np.ndarray) -> np.ndarray:
    """Turn cells that read a cache nobody filled into ``COMPUTE``, from the first row on."""
    filled = np.zeros(table.shape[1], dtype=bool)
    for row in table:
        orphans = np.isin(row, READS_CACHE) & ~filled
        row[orphans] = Action.COMPUTE
        filled |= row == Action.COMPUTE
    return table


def merge(plans: Iterable[ComputePlan]) -> ComputePlan:
    """Merge one or more plans; see `ComputePlan.merge`."""
    first, *rest = plans
    return first.merge(*rest)
