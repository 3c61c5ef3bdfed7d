"""How far exits are from what they should predict, and whether the modules know: measured on rows held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.uem import losses
from fastdiff.uem.data import Batch, TrainingData
from fastdiff.uem.objectives import ExitObjective, Objective, ScheduleObjective, mean_uncertainty

BINS = 5
FEWEST = 8
"""Rows that a rank correlation needs."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What was measured of held-out rows.

    Args:
        timesteps: in training units, shape ``(rows,)``.
        branches: guidance branch of each, same shape.
        error: mean ``tanh |error|`` at each exit, shape ``(rows, exits)``.
        square: mean squared error, same shape.
        uncertainty: what the modules expected, same shape; None without modules that are trained.
    """

    timesteps: np.ndarray
    branches: np.ndarray
    error: np.ndarray
    square: np.ndarray
    uncertainty: np.ndarray | None


def measure(
    objective: Objective,
    data: TrainingData,
    share: Callable[[Sequence[Any]], Sequence[Any]],
    gather: Callable[[list[Any]], list[Any]],
) -> Rows:
    """Measure held-out rows.

    Args:
        objective: what is trained.
        data: has the rows.
        share: this process's part of a list.
        gather: joins the processes' lists.
    """
    device = next(objective.denoiser.parameters()).device
    parts = []
    for (timestep, branch), drawn in share(data.held_out(objective.config.validation_rows)):
        batch = data.batch(drawn).to(device)
        with torch.no_grad(), objective.watching(batch):
            error, square, uncertainty = _row(objective, batch)
        parts.append((np.full(len(drawn), timestep), np.full(len(drawn), branch), error, square, uncertainty))
    timesteps, branches, errors, squares, uncertainties = zip(*gather(parts), strict=True)
    return Rows(
        np.concatenate(timesteps),
        np.concatenate(branches),
        np.concatenate(errors),
        np.concatenate(squares),
        None if uncertainties[0] is None else np.concatenate(uncertainties),
    )


def _row(objective: Objective, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if isinstance(objective, ScheduleObjective):
        predictions, target, scores = objective.predict(batch)[None], batch.truth, None
    else:
        assert isinstance(objective, ExitObjective)
        found = objective.readout(**batch.arguments)
        predictions, target, scores = found.predictions, objective.target(found, batch), None
        if objective.config.objective == "deediff":
            scores = mean_uncertainty(objective.uncertainty(found)).T.cpu().numpy()
    label = losses.error_label(predictions, target).flatten(2).mean(2)
    square = (predictions.float() - target.float()).square().flatten(2).mean(2)
    return label.T.cpu().numpy(), square.T.cpu().numpy(), scores


def summary(rows: Rows, exits: Sequence[str], training_steps: int) -> dict[str, Any]:
    """What was measured, in numbers that JSON can hold.

    Rank correlations are Spearman's: ``layers`` is the mean over rows of that between predicted and true error across
    the exits; ``samples`` is that across rows of one timestep and guidance branch, the mean over exits, timesteps and
    branches; a module that knows nothing but exit and timestep has 0 there.

    Args:
        rows: what was measured.
        exits: their names.
        training_steps: number of training timesteps, which bins divide.
    """
    edges = np.linspace(0, training_steps, BINS + 1)
    places = np.clip(np.searchsorted(edges, rows.timesteps, side="right") - 1, 0, BINS - 1)
    bins = []
    for number in sorted(set(places.tolist())):
        inside = places == number
        found: dict[str, Any] = {
            "from": float(edges[number]),
            "to": float(edges[number + 1]),
            "rows": int(inside.sum()),
            "error": _numbers(rows.error[inside].mean(0)),
            "rmse": _numbers(np.sqrt(rows.square[inside].mean(0))),
        }
        if rows.uncertainty is not None:
            found["uncertainty"] = _numbers(rows.uncertainty[inside].mean(0))
            found["samples"] = _numbers(_across_samples(rows, inside))
        bins.append(found)
    result: dict[str, Any] = {
        "rows": len(rows.timesteps),
        "exits": list(exits),
        "error": _numbers(rows.error.mean(0)),
        "rmse": _numbers(np.sqrt(rows.square.mean(0))),
        "bins": bins,
    }
    if rows.uncertainty is not None:
        pairs = zip(rows.uncertainty, rows.error, strict=True)
        everywhere = np.ones(len(rows.timesteps), dtype=bool)
        result["rank_correlation"] = {
            "layers": _number(np.mean([spearman(*pair) for pair in pairs])),
            "samples": _number(_across_samples(rows, everywhere).mean()),
        }
    return result


def _across_samples(rows: Rows, inside: np.ndarray) -> np.ndarray:
    """Rank correlation at each exit, over rows of one timestep and branch; the mean over these, NaN without any."""
    assert rows.uncertainty is not None
    found = []
    for timestep, branch in sorted(set(zip(rows.timesteps[inside], rows.branches[inside], strict=True))):
        alike = inside & (rows.timesteps == timestep) & (rows.branches == branch)
        if alike.sum() >= FEWEST:
            pairs = zip(rows.uncertainty[alike].T, rows.error[alike].T, strict=True)
            found.append([spearman(*pair) for pair in pairs])
    return np.mean(found, 0) if found else np.full(rows.error.shape[1], np.nan)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors, with mean ranks for ties; 0 where one of them is constant."""
    ranks = []
    for values in (first, second):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale else 0.0


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values]


# -- pictures ----------------------------------------------------------------------------------------------------------


def plot(result: dict[str, Any], log: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a validation and the way there.

    Args:
        result: of `summary`.
        log: of the training, one entry for each line.
        path: of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_uncertainty = "rank_correlation" in result
    figure = Figure(figsize=(11, 7.5) if has_uncertainty else (11, 4), layout="constrained")
    axes = figure.subplots(2 if has_uncertainty else 1, 2, squeeze=False)
    _draw_log(axes[0, 0], log)
    numbers = range(1, len(result["exits"]) + 1)
    colors = [f"C{number}" for number in range(len(result["bins"]))]
    errors = axes[0, 1]
    for found, color in zip(result["bins"], colors, strict=True):
        label = f"t {found['from']:.0f} to {found['to']:.0f}"
        errors.plot(numbers, found["error"], color=color, marker=".", label=label)
        if has_uncertainty:
            errors.plot(numbers, found["uncertainty"], color=color, linestyle="--")
            axes[1, 0].plot(found["uncertainty"], found["error"], ".", color=color, label=label)
            axes[1, 1].plot(numbers, [np.nan if x is None else x for x in found["samples"]], ".-", color=color)
    errors.set(title="Error at each exit" + (" (dashed: expected)" if has_uncertainty else ""), yscale="log")
    errors.set(xlabel="exit, in execution order", ylabel="mean tanh |error|")
    errors.legend(fontsize="small")
    if has_uncertainty:
        found = result["rank_correlation"]
        axes[1, 0].axline((0, 0), slope=1, color="grey", linewidth=0.8)
        axes[1, 0].set(title=f"Expected and true error (across exits: {found['layers']:.2f})")
        axes[1, 0].set(xlabel="mean uncertainty", ylabel="mean tanh |error|")
        axes[1, 0].legend(fontsize="small")
        told = "none" if found["samples"] is None else f"{found['samples']:.2f}"
        axes[1, 1].set(title=f"Rank correlation across samples (mean {told})", ylim=(-1, 1))
        axes[1, 1].axhline(0, color="grey", linewidth=0.8)
        axes[1, 1].set(xlabel="exit, in execution order", ylabel="Spearman")
    FigureCanvasAgg(figure).print_png(path)


def _draw_log(axis: Any, log: Sequence[dict[str, Any]]) -> None:
    """The losses over the steps."""
    trained = [entry for entry in log if "loss" in entry]
    names = [name for name in (trained[-1] if trained else {}) if name not in ("step", "learning_rate", "seconds")]
    for name in names:
        entries = [entry for entry in trained if entry.get(name, 0) > 0]
        axis.plot([entry["step"] for entry in entries], [entry[name] for entry in entries], label=name)
    axis.set(title="Training", xlabel="step", ylabel="loss", yscale="log")
    axis.legend(fontsize="small")
