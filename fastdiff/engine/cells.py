"""What every unit does in one denoiser call: the rows of a program, bound to what a guidance branch keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fastdiff.backbones import Backbone
from fastdiff.engine.hooks import COMPUTE, Cell
from fastdiff.engine.kept import BranchState, Kept, Reuse
from fastdiff.engine.program import Program, Reading, extrapolation_weights
from fastdiff.kernels.steps import Steps
from fastdiff.plan import Action


class RowCells:
    """Makes the cells of a program's rows, one for each unit.

    Args:
        program: the lowered plan.
        backbone: the denoiser's units.
        heads: modules that turn the hidden state at an exit into one for the output layers, by unit name.
        steps: what is computed between the units.
    """

    def __init__(self, program: Program, backbone: Backbone, heads: Mapping[str, nn.Module], steps: Steps) -> None:
        self._program = program
        self._names = backbone.names
        self._heads = heads
        self._steps = steps
        left_out = (program.plan.table == Action.DROP).any(axis=0) | bool(program.batches)
        same_shape = [unit.traits.same_shape for unit in backbone.units]
        self._needs_shape = [bool(out) and not same for out, same in zip(left_out, same_shape, strict=True)]

    def can_idle(self, state: BranchState) -> bool:
        """Whether the shapes of all outputs are known that a call without work has to stand in for."""
        if not state.knows_shapes:
            state.knows_shapes = all(self._is_known(state, column) for column in range(len(self._names)))
        return state.knows_shapes

    def are_possible(self, row: int, state: BranchState) -> bool:
        """Whether the shapes of all outputs are known that this row leaves out."""
        if self.can_idle(state):
            return True
        actions = enumerate(self._program.plan.rows[row])
        return all(self._is_known(state, column) for column, action in actions if action == Action.DROP)

    def _is_known(self, state: BranchState, column: int) -> bool:
        return not self._needs_shape[column] or state.shapes[column].like is not None

    def computing(self, state: BranchState) -> list[Cell]:
        """Cells for a call in which everything runs."""
        return [self._computing(state, column) for column in range(len(self._names))]

    def idle(self, state: BranchState) -> list[Cell]:
        """Cells for a call in which nothing runs."""
        return [self._leaving_out(state, column) for column in range(len(self._names))]

    def of_row(self, row: int, state: BranchState) -> list[Cell]:
        """Cells for a row of the plan."""
        cells = self.reading(row, state, [row])
        for key in self._program.captures[row]:
            kept = state.kept[key] = Kept(self._program.residual[key.run.first])
            for column in {key.run.first, key.run.last}:
                if cells[column] is COMPUTE:
                    cells[column] = Cell()
            if kept.residual:
                cells[key.run.first].opens.append(kept)
            cells[key.run.last].keeps.append(kept)
        return cells

    def reading(self, row: int, state: BranchState, evaluations: Sequence[int]) -> list[Cell]:
        """Cells for several evaluations that do what this row does, as one batch; nothing is kept of them."""
        exits = False
        cells = []
        for column, action in enumerate(self._program.plan.rows[row]):
            if action == Action.COMPUTE:
                cells.append(self._computing(state, column) if len(evaluations) == 1 else COMPUTE)
            elif action == Action.DROP:
                cells.append(self._leaving_out(state, column, len(evaluations)))
            else:
                first_exit = action == Action.EXIT and not exits
                cells.append(Cell(compute=False, head=self._heads.get(self._names[column]) if first_exit else None))
            exits = action == Action.EXIT
        for reading in self._program.readings[row]:
            sources = tuple(state.kept[key] for key in reading.sources)
            reuse = Reuse(sources, _weights(reading, evaluations), len(evaluations), self._steps)
            if reuse.residual:
                cells[reading.run.first].opens.append(reuse)
            cells[reading.run.last].reuse = reuse
        return cells

    def _computing(self, state: BranchState, column: int) -> Cell:
        """A cell that runs its unit, and notes the output's shape where that will be needed and is not known."""
        return COMPUTE if self._is_known(state, column) else Cell(shape=state.shapes[column])

    def _leaving_out(self, state: BranchState, column: int, evaluations: int = 1) -> Cell:
        """A cell whose unit does not run and whose result nobody reads."""
        shape = state.shapes[column] if self._needs_shape[column] else None
        return Cell(compute=False, shape=shape, evaluations=evaluations)


def _weights(reading: Reading, evaluations: Sequence[int]) -> torch.Tensor | None:
    """The weights of a reading's sources for each evaluation; None where one value is carried over.

    On the host, where a compiler does not guard on their values.
    """
    if len(reading.sources) == 1:
        return None
    rows = [key.row for key in reading.sources]
    return torch.tensor([extrapolation_weights(rows, row) for row in evaluations], dtype=torch.float32)
