"""The run record: what one sampling call really did, for a person to read and for a test to check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fastdiff.engine.branches import Branch
from fastdiff.plan import Action, ComputePlan

if TYPE_CHECKING:
    from fastdiff.cost import UnitCosts


@dataclass(frozen=True)
class Call:
    """One denoiser call: which evaluation, which guidance branch, and what each unit did.

    Args:
        evaluation: counted from 0, the noisiest.
        branch: the guidance branch.
        actions: of each unit; `Action.COMPUTE` if it ran for any sample.
        depths: how many units each sample ran, int64 of shape ``(samples,)``, where samples stop on their own; of those
            that stopped, without the last ones.
        outputs: number of last units, which run for every sample wherever it stopped.
    """

    evaluation: int
    branch: Branch
    actions: tuple[int, ...]
    depths: np.ndarray | None = field(default=None, compare=False)
    outputs: int = field(default=0, compare=False)

    @property
    def shares(self) -> np.ndarray:
        """The share of the samples that each unit ran for, shape ``(units,)``."""
        if self.depths is None:
            return (np.array(self.actions) == Action.COMPUTE).astype(float)
        shares: np.ndarray = (np.arange(len(self.actions)) < self.depths[:, None]).mean(0)
        shares[len(shares) - self.outputs :] = 1
        return shares


@dataclass
class DenoiserRecord:
    """What one denoiser did in one sampling call.

    Args:
        class_name: the denoiser's class.
        units: its units' names.
        calls: every call in order.
        plans: the plans that were lowered, one for each grid the scheduler was given.
        fallbacks: reasons for which a call computed more than its plan said, with how often.
        batches: evaluations that each call with several of them made at once.
        one_by_one: reasons for which evaluations that could have been one batch were not, with how often.
        skip_scales: by how much each long skip was scaled as the decoder read it, shape ``(skips,)`` in the order in
            which they are made; by evaluation, for those in which any was.
        graphs: calls that were recorded as CUDA graphs.
        replays: calls that replayed one.
        computed: where calls are recorded, reasons for which some were computed nevertheless, with how often.
        peak_bytes: most bytes held at any time in what was kept: residuals, features, predictions made ahead.
        measure: counts and times one full evaluation with this call's shapes; takes a few evaluations when first used.
    """

    class_name: str
    units: tuple[str, ...]
    calls: list[Call] = field(default_factory=list)
    plans: list[ComputePlan] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    batches: list[int] = field(default_factory=list)
    one_by_one: Counter[str] = field(default_factory=Counter)
    skip_scales: dict[int, np.ndarray] = field(default_factory=dict)
    graphs: int = 0
    replays: int = 0
    computed: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    measure: Callable[[], UnitCosts] | None = field(default=None, repr=False)  # holds a call's tensors

    def cells(self, branch: Branch | None = None) -> dict[str, int]:
        """Cells by action, over all branches or one."""
        counts = Counter(action for call in self.calls if branch in (None, call.branch) for action in call.actions)
        return {action.name: counts[action] for action in Action}

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The guidance branches seen, in order of first appearance."""
        return tuple(dict.fromkeys(call.branch for call in self.calls))

    @property
    def plan(self) -> ComputePlan:
        """What was executed, as a plan: the rows of the first guidance branch in order."""
        if not self.calls:
            raise ValueError("The denoiser was not called, so there is no executed plan.")
        return self._executed(self.calls[0].branch)

    def _executed(self, branch: Branch) -> ComputePlan:
        rows = [call.actions for call in self.calls if call.branch == branch]
        return ComputePlan(np.array(rows), self.units, self.plans[-1].meta if self.plans else {})

    @property
    def skipped(self) -> int:
        """Cells that were not computed for every sample."""
        return sum(int((call.shares < 1).sum()) for call in self.calls)

    @property
    def computed_share(self) -> float:
        """Share of all cells that were computed; 1.0 for a denoiser that was not called."""
        shares = [call.shares.mean() for call in self.calls]
        return float(np.mean(shares)) if shares else 1.0

    @property
    def macs(self) -> float | None:
        """Multiply-accumulates that were spent, of the whole batch; None for a denoiser that was not called."""
        if self.measure is None or not self.calls:
            return None
        costs = self.measure()
        macs = sum(self._executed(branch).cost(costs).macs or 0.0 for branch in self.branches)
        # A plan counts a unit for the whole batch if any sample ran it.
        unspent = [(np.array(call.actions) == Action.COMPUTE) - call.shares for call in self.calls]
        return macs - float((np.array(unspent) * costs.macs).sum())

    @property
    def macs_share(self) -> float | None:
        """Share of the full MACs that was spent; None for a denoiser that was not called."""
        macs = self.macs
        if macs is None or self.measure is None:
            return None
        return macs / (len(self.calls) * self.measure().total_macs)

    def lines(self) -> Iterator[str]:
        """The record as indented text."""
        counts = {name: count for name, count in self.cells().items() if count}
        yield f"  {len(self.calls)} calls in {len(self.branches)} guidance branch(es), {len(self.units)} units each"
        yield "  cells: " + ", ".join(f"{count} {name}" for name, count in counts.items())
        share = self.macs_share
        macs = "" if share is None else f", MACs {share:.1%} of the full call"
        yield f"  computed {self.computed_share:.1%} of the cells{macs}; kept at most {self.peak_bytes / 2**20:.2f} MiB"
        if self.batches:
            yield f"  {sum(self.batches)} evaluations made in {len(self.batches)} batches of up to {max(self.batches)}"
        if self.skip_scales:
            scales = np.array(list(self.skip_scales.values()))
            yield f"  long skips scaled by {scales.min():.3g} to {scales.max():.3g} in {len(scales)} evaluation(s)"
        if self.replays:
            yield f"  {self.replays} call(s) replayed from CUDA graphs, {self.graphs} of which were recorded now"
        for reason, times in self.computed.items():
            yield f"  {times} call(s) computed without a CUDA graph: {reason}"
        for reason, times in self.one_by_one.items():
            yield f"  {times} batch(es) made one evaluation at a time: {reason}"
        for reason, times in self.fallbacks.items():
            yield f"  computed in full {times} time(s): {reason}"


@dataclass
class RunRecord:
    """What one sampling call did.

    Args:
        methods: the enabled methods, as text.
        denoisers: one record for each accelerated denoiser, by component name.
        seconds: wall-clock time of the whole call.
        completed: False if the call ended in an exception.
    """

    methods: tuple[str, ...]
    denoisers: dict[str, DenoiserRecord]
    seconds: float = 0.0
    completed: bool = False

    @property
    def skipped(self) -> int:
        """Cells that were not computed, over all denoisers."""
        return sum(record.skipped for record in self.denoisers.values())

    @property
    def scaled(self) -> bool:
        """Whether any long skip was scaled in any evaluation."""
        return any(record.skip_scales for record in self.denoisers.values())

    @property
    def calls(self) -> int:
        """Denoiser calls, over all denoisers."""
        return sum(len(record.calls) for record in self.denoisers.values())

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """The record as text, which `print` shows too."""
        state = "" if self.completed else " (ended early)"
        lines = [f"{' + '.join(self.methods) or 'no method'}: {self.seconds:.2f} s{state}"]
        for name, record in self.denoisers.items():
            lines += [f"{name} ({record.class_name})", *record.lines()]
        return "\n".join(lines)
