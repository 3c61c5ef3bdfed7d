"""What is trained on: rows of denoiser calls, each with a noisy sample, a timestep and whatever conditions it.

A table holds the rows of one pipeline call and lies in a file of its own, so that an interrupted preparation goes on
where it stopped. A row's sample is either noisy, as recorded, with the prediction that was made of it; or clean, and is
noised when a batch is drawn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import ConfigError, FastDiffError
from fastdiff.uem.files import read_tensors, write_tensors
from fastdiff.uem.noising import Noising
from fastdiff.uem.recording import Call, flattened, restored

HELD_OUT = 0.1
"""Share of the pipeline's calls, the last ones, that is validated on."""


class TrainingDataError(FastDiffError, ValueError):
    """Images or recorded calls that cannot be trained on."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows to train on.

    Args:
        arguments: of the denoiser's forward, by name; the noisy samples first.
        truth: what should be predicted, of the samples' shape: by what the images and the noise were, or what the
            denoiser predicted when its call was recorded.
        timesteps: in training units, float32 of shape ``(batch,)``.
        weights: how much each row's error counts, float32 of shape ``(batch,)``; None for all alike.
    """

    arguments: dict[str, Any]
    truth: torch.Tensor
    timesteps: torch.Tensor
    weights: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        from fastdiff.engine.kept import transformed

        arguments = {
            name: transformed(lambda tensor: tensor.to(device), value) for name, value in self.arguments.items()
        }
        weights = None if self.weights is None else self.weights.to(device)
        return Batch(arguments, self.truth.to(device), self.timesteps.to(device), weights)


@dataclass(frozen=True)
class Drawn:
    """Which rows a batch is made of, and with what noise; drawn for all processes alike.

    Args:
        places: of each row its table, evaluation and row there.
        noise: for clean samples, shape ``(batch, ...)``; else None.
        levels: for clean samples, numbers of the noise levels, int64 of shape ``(batch,)``; else None.
    """

    places: Sequence[tuple[Table, int, int]]
    noise: torch.Tensor | None = None
    levels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.places)

    def part(self, chosen: slice) -> Drawn:
        """Some of the rows."""
        noise = None if self.noise is None else self.noise[chosen]
        levels = None if self.levels is None else self.levels[chosen]
        return Drawn(self.places[chosen], noise, levels)


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one pipeline call in one or several guidance branches.

    Args:
        structure: of the denoiser's arguments, see `recording.flattened`.
        own: tensors with one entry for each row, shape ``(evaluations, rows, ...)``, or ``(rows, ...)`` for those that
            are constant.
        constant: names of those that are the same in all evaluations.
        shared: tensors that all rows have in common.
        predictions: shape ``(evaluations, rows, ...)``; None where the samples are clean.
        timesteps: of the evaluations, in training units; empty where the samples are clean.
        images: number of images; rows beyond are further guidance branches of them.
        branch: number of the guidance branch that the first rows are of.
    """

    structure: dict[str, Any]
    own: dict[str, torch.Tensor]
    constant: tuple[str, ...]
    shared: dict[str, torch.Tensor]
    predictions: torch.Tensor | None
    timesteps: tuple[float, ...]
    images: int
    branch: int

    @property
    def evaluations(self) -> int:
        """Number of evaluations kept; 1 for clean samples."""
        return max(1, len(self.timesteps))

    @property
    def sample(self) -> torch.Tensor:
        """The samples, noisy or clean."""
        return self.own[next(iter(self.structure))]

    @property
    def rows(self) -> int:
        """Number of rows in each evaluation."""
        return self.sample.shape[0 if next(iter(self.structure)) in self.constant else 1]

    def kind(self) -> str:
        """What rows must have in common to be one batch."""
        own = {
            name: [list(value.shape[1 if name in self.constant else 2 :]), str(value.dtype)]
            for name, value in self.own.items()
        }
        shared = {name: value.tolist() for name, value in self.shared.items()}
        return json.dumps([self.structure, own, shared], sort_keys=True)

    def value(self, name: str, evaluation: int, row: int) -> torch.Tensor:
        """One row of a tensor."""
        return self.own[name][row] if name in self.constant else self.own[name][evaluation, row]

    def group(self, row: int) -> int:
        """Number of a row's guidance branch."""
        return self.branch + row // self.images


def table_of(calls: Sequence[Call], images: int, branch: int) -> Table:
    """A table of the calls that a pipeline made of its denoiser, one in each of several evaluations.

    Raises:
        ConfigError: if the calls have different arguments.
    """
    rows = len(next(iter(calls[0].arguments.values())))
    parts = [flattened(call.arguments, rows) for call in calls]
    structure, _, shared = parts[0]
    if any(part[0] != structure for part in parts):
        raise ConfigError("The denoiser is called with other arguments at some timesteps; exits cannot be trained.")
    own, constant = {}, []
    for name in parts[0][1]:
        values = [part[1][name] for part in parts]
        if all(torch.equal(values[0], value) for value in values):
            constant.append(name)
        own[name] = values[0] if name in constant else torch.stack(values)
    predictions = [call.prediction for call in calls if call.prediction is not None]
    return Table(
        structure,
        own,
        tuple(constant),
        shared,
        torch.stack(predictions) if predictions else None,
        tuple(call.timestep for call in calls) if predictions else (),
        images,
        branch,
    )


def save_tables(path: Path, tables: Sequence[Table], skipped: int = 0) -> None:
    """Write the tables of one pipeline call, and how many images could not be read for it."""
    tensors: dict[str, torch.Tensor] = {}
    described = []
    for number, table in enumerate(tables):
        parts = {"own": table.own, "shared": table.shared}
        tensors |= {f"{number}/{part}/{name}": value for part, named in parts.items() for name, value in named.items()}
        if table.predictions is not None:
            tensors[f"{number}/predictions"] = table.predictions
        plain = {name: getattr(table, name) for name in ("structure", "constant", "timesteps", "images", "branch")}
        described.append(plain)
    write_tensors(path, tensors, {"tables": described, "skipped": skipped})


def load_tables(path: Path) -> tuple[list[Table], int]:
    """What `save_tables` wrote; the tensors are read from the file as they are needed.

    Raises:
        CheckpointError: if the file is damaged.
    """
    tensors, metadata = read_tensors(path)
    tables = []
    for number, described in enumerate(metadata["tables"]):

        def named(part: str, number: int = number) -> dict[str, torch.Tensor]:
            prefix = f"{number}/{part}/"
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        described |= {name: tuple(described[name]) for name in ("constant", "timesteps")}
        tables.append(
            Table(
                own=named("own"), shared=named("shared"), predictions=tensors.get(f"{number}/predictions"), **described
            )
        )
    return tables, metadata["skipped"]


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a table that are of one guidance branch."""

    table: Table
    first: int

    @property
    def branch(self) -> int:
        return self.table.group(self.first)

    @property
    def number(self) -> int:
        """How many there are in each evaluation."""
        return min(self.table.images, self.table.rows - self.first)

    @property
    def count(self) -> int:
        """How many there are in all."""
        return self.number * self.table.evaluations

    def place(self, share: float) -> tuple[Table, int, int]:
        """The row at a share in [0, 1) of all: table, evaluation and row."""
        evaluation, row = divmod(int(share * self.count), self.number)
        return self.table, evaluation, self.first + row

    def conditioning(self) -> dict[str, torch.Tensor]:
        """What the rows are asked for."""
        sample = next(iter(self.table.structure))
        names = [name for name in self.table.constant if name != sample]
        return {name: self.table.own[name][self.first : self.first + self.number] for name in names}


def _branch_weights(everything: Sequence[_Rows], unconditional: float | None) -> dict[int, float]:
    """How often a row of each guidance branch is drawn, compared with the others."""
    counts = Counter[int]()
    for rows in everything:
        counts[rows.branch] += rows.count
    if unconditional is None:
        return dict.fromkeys(counts, 1.0)
    alike = [branch for branch in counts if _are_asked_for_one_thing(everything, branch)]
    if len(counts) < 2 or len(alike) != 1:
        raise ConfigError(
            f"unconditional={unconditional:g} needs guidance with one branch that is asked for the same in all images; "
            f"here {len(alike)} of {len(counts)} branches are. Give a guidance_scale above 1 and images of different "
            "classes or prompts, or leave it out."
        )
    others = (1 - unconditional) / (counts.total() - counts[alike[0]])
    return dict.fromkeys(counts, others) | {alike[0]: unconditional / counts[alike[0]]}


def _are_asked_for_one_thing(everything: Sequence[_Rows], branch: int) -> bool:
    first: dict[str, torch.Tensor] = {}
    return all(
        torch.equal(values, first.setdefault(name, values[:1]).expand_as(values))
        for rows in everything
        if rows.branch == branch
        for name, values in rows.conditioning().items()
    )


class TrainingData:
    """Rows to train and to validate on.

    Args:
        calls: the tables of each pipeline call.
        noising: how clean samples are noised; None where samples are noisy.
        unconditional: share of the rows drawn that are to be of the unconditional guidance branch; None for as many as
            there are.

    Raises:
        TrainingDataError: with fewer than two calls, of which one is held out.
        ConfigError: if there is a share, and it cannot be told which branch is unconditional.
    """

    def __init__(
        self, calls: Sequence[Sequence[Table]], noising: Noising | None, unconditional: float | None = None
    ) -> None:
        if len(calls) < 2:
            raise TrainingDataError(
                f"There is {len(calls)} batch of images; at least two are needed, of which one is held out to validate "
                "on. Give more samples or a smaller record_batch."
            )
        held_out = max(1, round(HELD_OUT * len(calls)))
        self.noising = noising
        self._held_out = [table for tables in calls[-held_out:] for table in tables]
        learned = [table for tables in calls[:-held_out] for table in tables]
        everything = [_Rows(table, first) for table in learned for first in range(0, table.rows, table.images)]
        by_branch = _branch_weights(everything, unconditional)
        kinds: dict[str, list[_Rows]] = {}
        for rows in everything:
            kinds.setdefault(rows.table.kind(), []).append(rows)
        self._kinds = list(kinds.values())
        self._weights = [
            torch.tensor([by_branch[rows.branch] * rows.count for rows in kind], dtype=torch.float64)
            for kind in self._kinds
        ]

    @property
    def rows(self) -> int:
        """Number of different rows to train on."""
        return sum(rows.count for kind in self._kinds for rows in kind)

    def example(self) -> Batch:
        """Two rows, to see shapes with."""
        table = self._kinds[0][0].table
        return self.batch(self._noised([(table, 0, row % table.rows) for row in range(2)], torch.Generator()))

    def draw(self, generator: torch.Generator, size: int) -> Drawn:
        """Draw rows that can be one batch."""
        totals = torch.stack([weights.sum() for weights in self._weights])
        kind = int(torch.multinomial(totals, 1, generator=generator))
        chosen = torch.multinomial(self._weights[kind], size, replacement=True, generator=generator).tolist()
        shares = torch.rand(size, generator=generator, dtype=torch.float64).tolist()
        places = [self._kinds[kind][number].place(share) for number, share in zip(chosen, shares, strict=True)]
        return self._noised(places, generator)

    def _noised(self, places: Sequence[tuple[Table, int, int]], generator: torch.Generator) -> Drawn:
        if self.noising is None:
            return Drawn(places)
        shape = places[0][0].sample.shape[1:]
        noise = torch.randn(len(places), *shape, generator=generator)
        return Drawn(places, noise, torch.randint(self.noising.levels, (len(places),), generator=generator))

    def held_out(self, rows: int, levels: int = 10) -> list[tuple[tuple[float, int], Drawn]]:
        """Rows to validate on, in groups of one timestep and guidance branch.

        Args:
            rows: about how many in all.
            levels: timesteps of each clean sample that is noised.

        Returns:
            Of each group its timestep and branch, and its rows, in batches.
        """
        per_table = max(1, rows // max(1, sum(table.rows for table in self._held_out)))
        groups: list[tuple[tuple[float, int], Drawn]] = []
        for number, table in enumerate(self._held_out):
            for branch in sorted({table.group(row) for row in range(table.rows)}):
                members = [row for row in range(table.rows) if table.group(row) == branch]
                evaluations = self._evaluations(table, per_table, levels)
                groups += [self._group(table, evaluation, branch, members, number) for evaluation in evaluations]
        return groups

    def _evaluations(self, table: Table, count: int, levels: int) -> list[int]:
        """Evenly chosen evaluations, or noise levels."""
        total = table.evaluations if self.noising is None else self.noising.levels
        count = min(total, max(count, min(total, levels)) if self.noising is not None else count)
        return [int((place + 0.5) * total / count) for place in range(count)]

    def _group(
        self, table: Table, evaluation: int, branch: int, members: list[int], number: int
    ) -> tuple[tuple[float, int], Drawn]:
        if self.noising is None:
            return (table.timesteps[evaluation], branch), Drawn([(table, evaluation, row) for row in members])
        generator = torch.Generator().manual_seed((number << 20) + evaluation)
        noise = torch.randn(len(members), *table.sample.shape[1:], generator=generator)
        level = torch.full((len(members),), evaluation)
        timestep = float(self.noising.timesteps[evaluation])
        return (timestep, branch), Drawn([(table, 0, row) for row in members], noise, level)

    def batch(self, drawn: Drawn) -> Batch:
        """Put rows together."""
        first = drawn.places[0][0]
        tensors: dict[str, torch.Tensor] = dict(first.shared)
        for name in first.own:
            tensors[name] = torch.stack([table.value(name, *place) for table, *place in drawn.places])
        if self.noising is None:
            values = [table.predictions[place[0], place[1]] for table, *place in drawn.places]  # type: ignore[index]
            timesteps = torch.tensor([table.timesteps[evaluation] for table, evaluation, _ in drawn.places])
            return Batch(restored(first.structure, tensors), torch.stack(values), timesteps)
        assert drawn.noise is not None
        assert drawn.levels is not None
        sample = next(iter(first.structure))
        noised = self.noising(tensors[sample], drawn.noise, drawn.levels)
        tensors[sample] = noised.sample
        tensors[noised.argument] = noised.given.to(tensors[noised.argument].dtype)
        return Batch(restored(first.structure, tensors), noised.truth, noised.timesteps, noised.weights)


def chosen(requests: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """Of arguments with one value for each image, over and over, those of some images."""
    return {
        name: values[[index % len(values) for index in indices]]
        if isinstance(values, torch.Tensor)
        else [values[index % len(values)] for index in indices]
        for name, values in requests.items()
    }
