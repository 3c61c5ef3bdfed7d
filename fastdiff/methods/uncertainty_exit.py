"""DeeDiff: samples stop where a trained module says that the prediction is good enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fastdiff.errors import ConfigError
from fastdiff.methods.base import Method, PlanRequest, check_number, check_tuple
from fastdiff.plan import ComputePlan

if TYPE_CHECKING:
    from fastdiff.engine.exits import ExitRule, Watch
    from fastdiff.uem.modules import UncertaintyModules

MANY = 10_000
WEIGHTS = "uem"
"""Folder of the modules beside a pipeline's other parts."""


@dataclass(frozen=True)
class UncertaintyExit(Method):
    """A sample stops before the first unit where its uncertainty is below a threshold (arXiv 2309.17074, section 3).

    Samples of a batch stop one by one, those that go on make a smaller batch, and a sample's result does not depend on
    the others. The guidance branches of a sample stop together, at the larger of their uncertainties where they are one
    batch; where they are calls of their own, the later ones follow the first.

    Args:
        threshold: uncertainty in [0, 1], strictly below which a sample stops; 0 never stops, exactly, and 1 always
            does. The paper's code says 1 less this, and exits above: its 0.92 is 0.08 here.
        weights: folder of the trained modules (`fastdiff.uem.UncertaintyModules`); None for those in the folder ``uem``
            of the pipeline.
        bin_edges: first training timestep of each bin of ``thresholds``, increasing.
        thresholds: in place of ``threshold``, one for every bin and exit, bin after bin.
        scope: ``"per_sample"``; or one decision for the whole batch, once the mean is below (``"batch_mean"``, as the
            released code does), or once all are (``"batch_all"``).
        patience: exits that must find an uncertainty below, not necessarily one after the other.
        lookahead: units that run between a decision and its effect while it is read back, so that an accelerator need
            not wait; None for 1 between blocks there, and 0 between a UNet's stages and on the CPU.
        exits: names of the units before which to decide; empty for all that the modules know.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    threshold: float = 0.08
    weights: str | None = None
    bin_edges: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    scope: str = "per_sample"
    patience: int = 1
    lookahead: int | None = None
    exits: tuple[str, ...] = ()
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _watch: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        from fastdiff.engine.exits import SCOPES

        check_number(self, "threshold", 0, 1)
        check_number(self, "patience", 1, MANY, whole=True)
        if self.lookahead is not None:
            check_number(self, "lookahead", 0, MANY, whole=True)
        if self.scope not in SCOPES:
            raise ConfigError(f"scope is one of {', '.join(map(repr, SCOPES))}; got {self.scope!r}.")
        if not (self.weights is None or isinstance(self.weights, str)):
            raise ConfigError(f"weights is a folder of trained modules, or None; got {self.weights!r}.")
        for name, what in (("bin_edges", "timesteps"), ("thresholds", "numbers in [0, 1]"), ("exits", "units' names")):
            check_tuple(self, name, what)
            kinds = str if name == "exits" else (int, float)
            if not all(isinstance(value, kinds) and not isinstance(value, bool) for value in getattr(self, name)):
                raise ConfigError(f"UncertaintyExit.{name} is a list of {what}; got {getattr(self, name)!r}.")
        if bool(self.bin_edges) != bool(self.thresholds) or list(self.bin_edges) != sorted(set(self.bin_edges)):
            raise ConfigError(
                f"thresholds have one number for every exit in every bin, and bin_edges increase; got "
                f"{len(self.thresholds)} thresholds and the edges {self.bin_edges}."
            )
        if any(not 0 <= value <= 1 for value in self.thresholds):
            raise ConfigError(f"thresholds lie in [0, 1]; got {self.thresholds}.")

    def plan(self, request: PlanRequest) -> ComputePlan:
        """A plan that computes everything; samples stop while the call runs."""
        return request.full_plan(self)

    @property
    def is_neutral(self) -> bool:
        """Whether no sample ever stops."""
        return not any(self.thresholds or (self.threshold,))

    def located(self, folder: Path) -> UncertaintyExit:
        """The same with the modules of a pipeline's folder, if there are some and no others were given."""
        found = folder / WEIGHTS
        if self.weights is not None or self._loaded or not found.is_dir():
            return self
        return dataclasses.replace(self, weights=str(found))

    def stored(self, folder: Path) -> UncertaintyExit:
        """Save the modules beside a pipeline's other parts."""
        self.modules().save_pretrained(folder / WEIGHTS)
        return dataclasses.replace(self, weights=None)

    @classmethod
    def of(cls, modules: UncertaintyModules, **settings: Any) -> UncertaintyExit:
        """A method with modules that are in memory, such as those in training."""
        method = cls(**settings)
        method._loaded[WEIGHTS] = modules
        return method

    def changed(self, **settings: Any) -> UncertaintyExit:
        """The same with other settings, and with the same modules in memory if they are there."""
        method = dataclasses.replace(self, **settings)
        method._loaded.update(self._loaded)
        return method

    def watched(self, watch: Watch) -> UncertaintyExit:
        """The same, which never stops a sample and tells what every exit finds; see `fastdiff.engine.exits.Watch`."""
        method = self.changed(threshold=0, bin_edges=(), thresholds=())
        object.__setattr__(method, "_watch", watch)
        return method

    def modules(self) -> UncertaintyModules:
        """The trained modules, loaded when first asked for.

        Raises:
            ConfigError: if there are none.
        """
        if not self._loaded:
            from fastdiff.uem.modules import load_modules

            if self.weights is None:
                raise ConfigError(
                    "UncertaintyExit needs trained modules: weights=FOLDER. This pipeline has none of its own; "
                    "`fastdiff train-uem --help` tells how to train some."
                )
            self._loaded[WEIGHTS] = load_modules(self.weights)
        modules: UncertaintyModules = self._loaded[WEIGHTS]
        return modules

    def exit_heads(self) -> Mapping[str, nn.Module]:
        """The exits' own heads."""
        return self.modules().heads_by_unit()

    def exit_rule(self, request: PlanRequest) -> ExitRule | None:
        """When samples stop.

        Raises:
            ProfileMismatchError: if the modules were made for another denoiser.
            ConfigError: if an exit is none of theirs, or there is not one threshold for every bin and exit.
        """
        from fastdiff.engine.exits import ExitRule

        modules, names = self.modules(), request.backbone.names
        modules.check(request.backbone)
        if unknown := set(self.exits) - set(modules.exits):
            raise ConfigError(
                f"The modules know the exits {', '.join(modules.exits)}; got {', '.join(sorted(unknown))}."
            )
        table = self._table(request.grid.timesteps, len(modules.exits))
        thresholds = np.zeros((len(request.grid), len(names)))
        scorers = {}
        for number, name in enumerate(modules.exits):
            if not self.exits or name in self.exits:
                column = names.index(name)
                thresholds[:, column] = table[:, number]
                scorers[column] = partial(modules.score, number)
        thresholds[thresholds >= 1] = np.inf
        return ExitRule(scorers, thresholds, self.scope, self.patience, self.lookahead, self._watch)

    def _table(self, timesteps: np.ndarray, exits: int) -> np.ndarray:
        """Thresholds of shape ``(evaluations, exits)``."""
        if not self.thresholds:
            return np.full((len(timesteps), exits), self.threshold)
        bins = len(self.bin_edges)
        if len(self.thresholds) != bins * exits:
            raise ConfigError(
                f"thresholds have one number for each of {bins} bins and {exits} exits; got {len(self.thresholds)}."
            )
        chosen = np.searchsorted(self.bin_edges, timesteps, side="right") - 1
        return np.reshape(self.thresholds, (bins, exits))[np.clip(chosen, 0, bins - 1)]
