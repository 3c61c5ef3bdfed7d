"""Thresholds that meet a budget: quantiles of what the exits find, at a level that real runs settle.

Budgeted early exit goes back to MSDNet (arXiv 1703.09844), whose thresholds are quantiles of what each exit finds; here
for each bin of timesteps, and settled by sampling because exits change what comes after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.errors import ConfigError, FastDiffError
from fastdiff.methods import Method
from fastdiff.methods.uncertainty_exit import UncertaintyExit
from fastdiff.plan import ComputePlan
from fastdiff.uem.freezing import freeze, frozen_methods
from fastdiff.uem.observation import Observed, Observer, Task, Watched, restoring

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from tqdm import tqdm

RUNS = 16
"""Levels that are tried, at most."""


class BudgetError(FastDiffError, ValueError):
    """A budget that no thresholds meet.

    Args:
        message: what was asked, and what can be reached.
        reachable: the smallest and the largest share that can be met; or those next to the budget.
    """

    def __init__(self, message: str, reachable: tuple[float, float]) -> None:
        super().__init__(message)
        self.reachable = reachable


# -- rules: a level to thresholds --------------------------------------------------------------------------------------


def exit_rate(found: list[np.ndarray], level: float) -> np.ndarray:
    """The same share of all samples is below the threshold at every exit of every bin."""
    return np.stack([np.quantile(part, level, axis=(0, 2)) for part in found])


def even(found: list[np.ndarray], level: float) -> np.ndarray:
    """One threshold everywhere, so that what is predicted of the error is the same at all timesteps."""
    everything = np.concatenate([part.ravel() for part in found])
    return np.full((len(found), found[0].shape[1]), np.quantile(everything, level))


Rule = Callable[[list[np.ndarray], float], np.ndarray]
"""Uncertainties of each bin, shape ``(evaluations, exits, samples)``, and a level in (0, 1) to thresholds of shape
``(bins, exits)``, none of which falls as the level grows."""

RULES: dict[str, Rule] = {"exit-rate": exit_rate, "even": even}


def bins_of(timesteps: np.ndarray, bins: int) -> tuple[tuple[float, ...], np.ndarray]:
    """Bins that hold about as many evaluations each.

    Args:
        timesteps: of the evaluations, shape ``(evaluations,)``.
        bins: how many; fewer where there are fewer timesteps.

    Returns:
        The bins' lower edges, ascending, halfway between timesteps; and each evaluation's bin.
    """
    distinct = np.unique(timesteps)
    groups = np.array_split(distinct, min(bins, len(distinct)))
    edges = [0.0 if distinct[0] >= 0 else float(distinct[0])]
    edges += [float((low[-1] + high[0]) / 2) for low, high in pairwise(groups)]
    return tuple(edges), np.searchsorted(edges, timesteps, side="right") - 1


# -- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Calibration:
    """A method that meets a budget, and everything seen on the way. `fastdiff.uem.calibration_report` writes it down.

    Args:
        method: calibrated, with the modules in memory.
        budget: the share of the full multiply-accumulates that was asked for.
        tolerance: by which the calibration samples may miss it.
        bins: of timesteps, at most.
        rule: that made thresholds of the level.
        level: 0 for no exits; 1 for the first exit always.
        tried: share that each level cost, in order.
        reachable: the smallest share, and 1.
        watched: full sampling of the calibration samples.
        dynamic: they with exits.
        frozen_plan: the static plan of the same cost; None if it was not asked for.
        held_out: other samples, by ``"full"``, ``"dynamic"`` and ``"frozen"``.
        task: what was sampled, image after image; the held-out ones follow those of the calibration.
        num_inference_steps: of the pipeline's calls.
    """

    method: UncertaintyExit
    budget: float
    tolerance: float
    bins: int
    rule: str
    level: float
    tried: tuple[tuple[float, float], ...]
    reachable: tuple[float, float]
    watched: Watched
    dynamic: Observed
    frozen_plan: ComputePlan | None
    held_out: dict[str, Observed]
    task: Task
    num_inference_steps: int

    @property
    def share(self) -> float:
        """Share of the full multiply-accumulates that the calibration samples cost."""
        return self.dynamic.share


def calibrate(
    pipe: DiffusionPipeline,
    method: UncertaintyExit,
    budget: float,
    *,
    task: Task,
    num_samples: int = 48,
    batch_size: int = 16,
    num_inference_steps: int = 50,
    bins: int = 10,
    rule: str = "exit-rate",
    tolerance: float = 0.01,
    frozen: bool = False,
    progress: bool = True,
) -> Calibration:
    """Find thresholds with which samples cost a share of full sampling (arXiv 2309.17074 with a budget).

    Samples in full once and looks at every exit; then tries levels of the rule with real exits until the share is
    right; then samples other images, which played no part in it.

    Args:
        pipe: a pipeline; it is left as it was.
        method: brings the modules, exits, scope and patience; its thresholds count for nothing.
        budget: share of the full multiply-accumulates of the denoiser, in (0, 1]; 1 gives no exits.
        task: what to ask for, see `fastdiff.eval.tasks.make_task`. Images ``0 .. num_samples - 1`` calibrate, the next
            ``num_samples`` are held out.
        num_samples: in each of the two sets.
        batch_size: images in one call.
        num_inference_steps: of the pipeline's calls.
        bins: of timesteps, each with thresholds of its own.
        rule: ``"exit-rate"`` or ``"even"``, see `RULES`.
        tolerance: by which the share of the calibration samples may miss the budget.
        frozen: also make a static plan of the same cost, and sample the held-out images with it.
        progress: show a bar.

    Raises:
        BudgetError: if no thresholds meet the budget; ``reachable`` has the range that can be met.
        ConfigError: for arguments that are not allowed, among them a frozen plan for a UNet.
        ProfileMismatchError: if the modules are for another denoiser.
    """
    _check(budget, num_samples, batch_size, num_inference_steps, bins, rule, tolerance)
    with _bar(progress) as bar, restoring(pipe):
        method = _located(pipe, method, frozen)
        observer = Observer(pipe, task, num_inference_steps, batch_size, bar.tell)
        search = _Search(observer, method, range(num_samples), budget, tolerance, bar)
        search.check_reachable()
        watched = search.watch(bins, RULES[rule])
        level, dynamic = search.find()
        found = search.method_at(level)
        held = range(num_samples, 2 * num_samples)
        plan = None
        ways: dict[str, Method | Sequence[Method]] = {"full": search.method_at(0), "dynamic": found}
        if frozen:
            plan = freeze(dynamic.depths, dynamic.price, watched.columns, watched.units, watched.meta)
            ways["frozen"] = frozen_methods(plan, found)
        held_out = {}
        for name, methods in ways.items():
            bar.begin(f"held-out samples, {name}", observer.calls(held))
            held_out[name] = observer.sample(methods, held)
    return Calibration(
        found,
        budget,
        tolerance,
        bins,
        rule,
        level,
        tuple(search.tried),
        (search.least, 1.0),
        watched,
        dynamic,
        plan,
        held_out,
        task,
        num_inference_steps,
    )


def _check(
    budget: float, num_samples: int, batch_size: int, num_inference_steps: int, bins: int, rule: str, tolerance: float
) -> None:
    counts = {
        "num_samples": num_samples,
        "batch_size": batch_size,
        "num_inference_steps": num_inference_steps,
        "bins": bins,
    }
    for name, value in counts.items():
        least = 2 if name == "num_samples" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is a whole number from {least}; got {value!r}.")
    if rule not in RULES:
        raise ConfigError(f"rule is one of {', '.join(map(repr, RULES))}; got {rule!r}.")
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance is a share between 0 and 1; got {tolerance!r}.")
    if not 0 < budget <= 1:  # NaN is in no range
        raise BudgetError(f"A budget is a share of full sampling, above 0 and at most 1; got {budget!r}.", (0.0, 1.0))


def _located(pipe: DiffusionPipeline, method: UncertaintyExit, frozen: bool) -> UncertaintyExit:
    """The method with its modules: its own, or those of the pipeline's folder."""
    import fastdiff

    if not isinstance(method, UncertaintyExit):
        raise ConfigError(f"Thresholds are calibrated for UncertaintyExit; got {method!r}.")
    (located,) = fastdiff.enable(pipe, method).fastdiff.methods
    made_for = located.modules().config
    if frozen and made_for["read_width"] is not None:
        raise ConfigError(
            f"A plan cannot stop between the stages of a {made_for['backbone']}, so that its exits stay dynamic: leave "
            "out frozen (--freeze)."
        )
    return located


# -- the search --------------------------------------------------------------------------------------------------------


class _Search:
    """Looks for the level at which the calibration samples cost what they should."""

    def __init__(
        self, observer: Observer, method: UncertaintyExit, indices: range, budget: float, tolerance: float, bar: _Bar
    ) -> None:
        self._observer = observer
        self._method = method
        self._indices = indices
        self._budget = budget
        self._tolerance = tolerance
        self._bar = bar
        self._shares: dict[UncertaintyExit, float] = {}
        self.tried: list[tuple[float, float]] = []

    def check_reachable(self) -> None:
        """See what stopping at the first exit costs, with the images of one call.

        Raises:
            BudgetError: if that is more than the budget.
        """
        first, *_ = batches = self._observer.calls(self._indices)[:1]
        self._bar.begin("the smallest share", batches)
        self.least = self._observer.sample(self.method_at(1), first).share
        if self._budget < self.least - self._tolerance:
            raise BudgetError(
                f"The budget {self._budget:g} is below what stopping at the first exit costs, {self.least:.3f}; it can "
                f"be from {self.least:.3f} to 1. Train modules with earlier exits, or ask for more.",
                (self.least, 1.0),
            )

    def watch(self, bins: int, rule: Rule) -> Watched:
        """Sample in full and look at every exit."""
        self._bar.begin("full sampling", self._observer.calls(self._indices))
        self._watched = watched = self._observer.watch(self._method, self._indices)
        self._edges, self._bins = bins_of(watched.timesteps, bins)
        found = [watched.uncertainties[self._bins == number] for number in range(len(self._edges))]
        self._rule = lambda level: rule(found, level)
        return watched

    def find(self) -> tuple[float, Observed]:
        """The level, and what the samples did with it.

        Guesses come from the exits that full sampling would have taken; how far the real share was off moves the next
        guess, within the bounds that earlier levels set.

        Raises:
            BudgetError: if the share jumps over the budget.
        """
        if self._budget == 1:
            return 0.0, self._watched.run
        if abs(self.least - self._budget) <= self._tolerance and (run := self._try(1.0)) is not None:
            return 1.0, run
        low, high = 0.0, 1.0  # levels that cost more than the budget, and less
        aim = self._budget
        for _ in range(RUNS):
            level = self._level_of(aim)
            if not low < level < high:
                level = (low + high) / 2
            if (run := self._try(level)) is not None:
                return level, run
            _, share = self.tried[-1]
            low, high = (level, high) if share > self._budget else (low, level)
            aim -= share - self._budget
        raise self._out_of_reach()

    def method_at(self, level: float) -> UncertaintyExit:
        """The method with the thresholds of a level."""
        if level in (0, 1):
            return self._method.changed(threshold=level, bin_edges=(), thresholds=())
        table = np.clip(self._rule(level), 0, 1)
        modules = self._method.modules()
        full = np.zeros((len(self._edges), len(modules.exits)))  # exits that the method does not ask keep 0
        asked = [modules.exits.index(self._watched.units[column]) for column in self._watched.columns]
        full[:, asked] = table
        return self._method.changed(threshold=0, bin_edges=self._edges, thresholds=tuple(full.ravel().tolist()))

    def _try(self, level: float) -> Observed | None:
        """Sample with real exits; None if thresholds that were tried before, under another level, missed the budget."""
        method = self.method_at(level)
        if method in self._shares:
            self.tried.append((level, self._shares[method]))
            return None
        self._bar.begin(f"attempt {len(self._shares) + 1}", self._observer.calls(self._indices))
        run = self._observer.sample(method, self._indices)
        self._shares[method] = run.share
        self.tried.append((level, run.share))
        return run if abs(run.share - self._budget) <= self._tolerance else None

    def _level_of(self, share: float) -> float:
        """The level at which the samples would cost a share if exits changed nothing that comes after."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._imagined(middle) > share else (low, middle)
        return (low + high) / 2

    def _imagined(self, level: float) -> float:
        watched = self._watched
        below = watched.uncertainties < self._rule(level)[self._bins][:, :, None]
        passed = below.cumsum(1) >= self._method.patience
        depths = np.where(passed.any(1), watched.columns[passed.argmax(1)], len(watched.units))
        return float(watched.run.price[depths].mean())

    def _out_of_reach(self) -> BudgetError:
        shares = [self.least, *(share for _, share in self.tried), 1.0]
        below = max(share for share in shares if share <= self._budget)
        above = min(share for share in shares if share >= self._budget)
        return BudgetError(
            f"No thresholds cost {self._budget:g} ± {self._tolerance:g}: the share jumps from {above:.3f} to "
            f"{below:.3f}. Ask for one of these, allow a larger tolerance, or take more bins or samples.",
            (below, above),
        )


class _Bar:
    """A progress bar over the pipeline's calls, which does not know beforehand how many there are."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def begin(self, what: str, calls: Sequence[range]) -> None:
        """Say what comes now."""
        self._bar.set_description(what)
        self._bar.total = self._bar.n + len(calls)
        self._bar.refresh()

    def tell(self, calls: int) -> None:
        """Say that calls were made."""
        self._bar.update(calls)


@contextmanager
def _bar(shown: bool) -> Iterator[_Bar]:
    from tqdm import tqdm

    with tqdm(disable=not shown, unit="call", total=0) as bar:
        yield _Bar(bar)
