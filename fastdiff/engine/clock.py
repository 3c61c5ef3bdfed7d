"""The step clock: which evaluation of the sampling loop comes next, told by the scheduler and never by a timestep."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Grid:
    """The evaluations that one sampling loop is going to make.

    Args:
        timesteps: in the units the scheduler was trained in, shape ``(evaluations,)``, noisiest first, float64.
        log_snr: log of the signal-to-noise power ratio at each of them, same shape; NaN where unknown.
        training_steps: length of the training grid that timesteps are counted on, e.g. 1000.
        in_training_units: False where the scheduler's timesteps are some other function of the noise level.
        given: the scheduler's own tensor of timesteps, whose entries it hands to the denoiser; None without scheduler.
        order: evaluations that the scheduler makes for one step.
    """

    timesteps: np.ndarray
    log_snr: np.ndarray
    training_steps: int
    in_training_units: bool
    given: torch.Tensor | None = None
    order: int = 1

    def __len__(self) -> int:
        return len(self.timesteps)

    def since(self, first: int) -> Grid:
        """The grid from evaluation ``first`` on."""
        given = None if self.given is None else self.given[first:]
        return dataclasses.replace(self, timesteps=self.timesteps[first:], log_snr=self.log_snr[first:], given=given)

    @classmethod
    def of(cls, scheduler: Any) -> Grid:
        """Read a scheduler's grid after its ``set_timesteps``; one device transfer."""
        given = torch.as_tensor(scheduler.timesteps).detach()
        timesteps = given.cpu().double().numpy()
        training_steps = int(_config(scheduler).get("num_train_timesteps", 1000))
        preconditioned = "sigma_data" in _config(scheduler)  # EDM: timesteps are a function of log sigma
        log_snr = _log_snr(scheduler, timesteps, training_steps)
        return cls(timesteps, log_snr, training_steps, not preconditioned, given, getattr(scheduler, "order", 1))


def _log_snr(scheduler: Any, timesteps: np.ndarray, training_steps: int) -> np.ndarray:
    config = _config(scheduler)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    with np.errstate(divide="ignore"):
        if config.get("use_flow_sigmas") or (alphas is None and "shift" in config):  # x_t = (1 - s) x + s e
            noise = np.clip(timesteps / training_steps, 0, 1)
            return 2 * (np.log1p(-noise) - np.log(noise))
        if alphas is not None:
            alphas = torch.as_tensor(alphas).detach().cpu().double().numpy()
            signal = np.interp(timesteps, np.arange(len(alphas)), alphas)
            return np.log(signal) - np.log1p(-signal)
        if "sigma_data" in config:  # x_t = x + s e
            sigmas = torch.as_tensor(scheduler.sigmas).detach().cpu().double().numpy()
            return -2 * np.log(sigmas[: len(timesteps)])
    return np.full_like(timesteps, np.nan)


def _config(scheduler: Any) -> Mapping[str, Any]:
    return getattr(scheduler, "config", None) or {}


class LatentEdit(Protocol):
    """Changes the latents between evaluations, wherever the pipeline keeps them."""

    def before_step(self, row: int, rows: int, sample: torch.Tensor) -> torch.Tensor:
        """The sample that the scheduler's step of row ``row`` of ``rows`` starts from."""

    def after_step(self, row: int, rows: int, sample: torch.Tensor) -> torch.Tensor:
        """The sample that it ends with."""


class _Watched:
    """A scheduler's method that is called by somebody else."""

    def __init__(
        self, scheduler: Any, name: str, call: Callable[..., Any], of_copy: Callable[[Any, str], Callable[..., Any]]
    ) -> None:
        functools.update_wrapper(self, getattr(scheduler, name), updated=())  # pipelines inspect the signature
        self._scheduler = scheduler
        self._name = name
        self._call = call
        self._of_copy = of_copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.__wrapped__, *args, **kwargs)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))
        # Without the scheduler among what is copied, its attributes are on their way back into it.
        return self if copied is None else self._of_copy(copied, self._name)


class StepClock:
    """Counts the evaluations of a sampling loop by watching a scheduler, from `attach` to `detach`.

    The clock ticks when ``scheduler.step`` returns; denoiser calls between two ticks are guidance branches of one
    evaluation. A second ``step`` without a denoiser call between (one more latent, say) does not tick. Copies that a
    pipeline makes of the scheduler, for one latent each, tick as well; only the scheduler itself sets the grid.

    Args:
        on_tick: called after every tick.
        on_start: called whenever a new grid was set.
        edit: changes the latents between evaluations.
    """

    def __init__(
        self, on_tick: Callable[[], None], on_start: Callable[[], None], edit: LatentEdit | None = None
    ) -> None:
        self.grid: Grid | None = None
        self.evaluation = 0
        self.first = 0
        self.in_evaluation = False
        self._on_tick = on_tick
        self._on_start = on_start
        self._edit = edit
        self._attached: list[tuple[Any, dict[str, Any]]] = []  # schedulers with what they carried of their own

    def attach(self, scheduler: Any) -> None:
        """Watch this scheduler object; its class and its config stay as they are."""
        own = {name: vars(scheduler)[name] for name in ("set_timesteps", "step") if name in vars(scheduler)}
        self._attached.append((scheduler, own))
        set_grid = functools.partial(self._set_grid, scheduler)
        scheduler.set_timesteps = _Watched(scheduler, "set_timesteps", set_grid, self._method_of_copy)
        scheduler.step = _Watched(scheduler, "step", self._step, self._method_of_copy)

    def _set_grid(self, scheduler: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        self.start(Grid.of(scheduler))
        return result

    def _step(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = self._edited(self._edit, method, *args, **kwargs) if self._edit else method(*args, **kwargs)
        self.tick()
        return result

    def _edited(self, edit: LatentEdit, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A step of the scheduler from an edited sample to an edited sample."""
        row, rows = self.evaluation - self.first, len(self.grid or ()) - self.first
        call = inspect.signature(method).bind(*args, **kwargs)
        call.arguments["sample"] = edit.before_step(row, rows, call.arguments["sample"])
        result = method(*call.args, **call.kwargs)
        if isinstance(result, tuple):
            return (edit.after_step(row, rows, result[0]), *result[1:])
        result.prev_sample = edit.after_step(row, rows, result.prev_sample)
        return result

    def _method_of_copy(self, copied: Any, name: str) -> Callable[..., Any]:
        """The method that a copy of a watched scheduler gets."""
        if name == "step":
            self._attached.append((copied, {}))
            return _Watched(copied, "step", self._step, self._method_of_copy)
        method: Callable[..., Any] = getattr(type(copied), name).__get__(copied)
        return method

    def detach(self) -> None:
        """Stop watching."""
        while self._attached:
            scheduler, own = self._attached.pop()
            for name in ("set_timesteps", "step"):
                vars(scheduler).pop(name, None)
            vars(scheduler).update(own)

    def start(self, grid: Grid) -> None:
        """Begin at the first evaluation of a new grid."""
        self.grid = grid
        self.evaluation = self.first = 0
        self.in_evaluation = False
        self._on_start()

    def tick(self) -> None:
        """Go on to the next evaluation, if the denoiser was called in this one."""
        if self.in_evaluation:
            self.evaluation += 1
            self.in_evaluation = False
            self._on_tick()

    def skip_to(self, evaluation: int) -> None:
        """Begin inside the grid."""
        self.evaluation = self.first = evaluation

    def begin_index(self, timestep: Any) -> int | None:
        """Where on the grid a loop starts whose first denoiser call was given this timestep; None if unclear.

        Image-to-image pipelines start inside the grid. A scheduler that was told where says so; else the timestep is
        looked for, once and on the host, in every unit that diffusers' pipelines hand to their denoisers.
        """
        assert self.grid is not None
        if not self._attached:
            return 0  # a loop without scheduler gave the timesteps of its own evaluations
        for scheduler, _ in self._attached:
            if getattr(scheduler, "begin_index", None) is not None:
                return int(scheduler.begin_index)
        if timestep is None:
            return None
        value = float(torch.as_tensor(timestep).detach().flatten()[0].double().cpu())
        scale = self.grid.training_steps
        candidates = np.array([value, value * scale, (1 - value) * scale, scale - value])
        near = np.abs(self.grid.timesteps[:, None] - candidates) < 1e-3 * scale / len(self.grid)
        if near[0].any():
            return 0
        rows = np.flatnonzero(near[:, 0]) if near[:, 0].any() else np.flatnonzero(near.any(axis=1))
        return int(rows[0]) if len(rows) else None
