"""What a calibration found, for a person and for a program: spread of depths, rank correlations, and files of both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.plan import write_json
from fastdiff.uem.calibration import Calibration, bins_of
from fastdiff.uem.observation import Observed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
METHOD, NUMBERS, TEXT, PLAN = "uncertainty_exit.json", "calibration.json", "calibration.md", "frozen_plan.json"


def save(calibration: Calibration, folder: Path, command: str = "fastdiff") -> dict[str, Any]:
    """Write a calibration's files: the method with its modules, numbers, text, pictures, and the frozen plan if any.

    Args:
        calibration: what to write.
        folder: exists.
        command: that made it, for the text.

    Returns:
        What is in ``calibration.json``.
    """
    numbers = summarize(calibration)
    write_json(folder / METHOD, calibration.method.stored(folder).to_dict())
    write_json(folder / NUMBERS, numbers)
    (folder / TEXT).write_text(as_markdown(numbers, command), encoding="utf-8")
    if calibration.frozen_plan is not None:
        calibration.frozen_plan.save(folder / PLAN)
    for name, figure in pictures(calibration, numbers).items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    return numbers


# -- numbers -----------------------------------------------------------------------------------------------------------


def summarize(calibration: Calibration) -> dict[str, Any]:
    """Every number of a calibration, JSON-compatible."""
    watched, dynamic = calibration.watched, calibration.held_out["dynamic"]
    edges, members = bins_of(watched.timesteps, calibration.bins)
    full = calibration.held_out["full"]
    exits = [watched.units[column] for column in watched.columns]
    return {
        "schema_version": SCHEMA_VERSION,
        "budget": calibration.budget,
        "tolerance": calibration.tolerance,
        "reachable": list(calibration.reachable),
        "rule": calibration.rule,
        "level": calibration.level,
        "tried": [{"level": level, "share": share} for level, share in calibration.tried],
        "num_inference_steps": calibration.num_inference_steps,
        "num_samples": watched.uncertainties.shape[2],
        "task": calibration.task.describe(),
        "exits": exits,
        "units": len(watched.units),
        "timesteps": watched.timesteps.tolist(),
        "bin_edges": list(edges),
        "calibration": _cost(calibration.dynamic, watched.run),
        "held_out": {name: _cost(run, full) for name, run in calibration.held_out.items()},
        "depth": _spread(dynamic.depths),
        "depth_by_bin": [_spread(dynamic.depths[members == number]) for number in range(len(edges))],
        "depth_by_evaluation": [_spread(row[None]) for row in dynamic.depths],
        "rank_correlation": rank_correlations(watched.uncertainties, watched.errors, members),
    }


def _cost(run: Observed, full: Observed) -> dict[str, Any]:
    """Share of full sampling, its spread between samples, and how near the images are to full sampling's."""
    shares = run.shares
    return {
        "share": run.share,
        "share_std": float(shares.std(ddof=1)),
        "share_standard_error": float(shares.std(ddof=1) / np.sqrt(len(shares))),
        "share_quartiles": np.percentile(shares, (25, 50, 75)).tolist(),
        "psnr": dataclasses.asdict(run.psnr(full)),
        "seconds": run.seconds,
        "samples": len(shares),
    }


def _spread(depths: np.ndarray) -> dict[str, Any]:
    """Depths of shape ``(evaluations, samples)``: their mean, and how samples differ at a fixed evaluation.

    ``between_samples`` is the part of the variance over all evaluations and samples that is between samples at a fixed
    evaluation: 0 for a fixed schedule. None where no depth differs from another.
    """
    within, total = float(depths.var(axis=1).mean()), float(depths.var())
    return {
        "mean": float(depths.mean()),
        "std": float(depths.std(axis=1).mean()),
        "quartiles": np.percentile(depths, (25, 50, 75), axis=1).mean(1).tolist(),
        "between_samples": within / total if total > 0 else None,
    }


def rank_correlations(uncertainties: np.ndarray, errors: np.ndarray, members: np.ndarray) -> dict[str, Any]:
    """Spearman's rank correlation of predicted uncertainty and true error, across exits and across samples apart.

    Args:
        uncertainties: shape ``(evaluations, exits, samples)``.
        errors: same shape.
        members: each evaluation's bin.

    Returns:
        ``across_exits``: of one sample at one evaluation, a mean for each bin; None with one exit.
        ``across_samples``: of one exit at one evaluation, a mean for each bin and exit. 0 where either is constant.
    """
    bins = range(int(members.max()) + 1)
    _, exits, _ = uncertainties.shape
    over_exits = _spearman(uncertainties.swapaxes(1, 2), errors.swapaxes(1, 2)) if exits > 1 else None  # (rows, n)
    over_samples = _spearman(uncertainties, errors)  # (rows, exits)
    by_bin = np.stack([over_samples[members == number].mean(0) for number in bins])
    return {
        "across_exits": None if over_exits is None else float(over_exits.mean()),
        "across_exits_by_bin": None
        if over_exits is None
        else [float(over_exits[members == number].mean()) for number in bins],
        "across_samples": float(over_samples.mean()),
        "across_samples_by_bin_and_exit": by_bin.tolist(),
    }


def _spearman(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Rank correlation along the last dimension; 0 where either side is constant."""
    left, right = _centred_ranks(found), _centred_ranks(true)
    scale = np.sqrt(np.square(left).sum(-1) * np.square(right).sum(-1))
    return np.divide((left * right).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Twice the ranks along the last dimension less their mean: how many are smaller, less how many are larger."""
    return np.stack([np.sign(row[..., :, None] - row[..., None, :]).sum(-1) for row in values])


# -- text --------------------------------------------------------------------------------------------------------------


def as_markdown(numbers: dict[str, Any], command: str) -> str:
    """The report that a person reads."""
    edges, depths = numbers["bin_edges"], numbers["depth_by_bin"]
    ranks, held = numbers["rank_correlation"], numbers["held_out"]
    across_exits = ranks["across_exits_by_bin"] or [None] * len(edges)
    lines = [
        "# Calibration of uncertainty exits",
        "",
        f"Asked for {numbers['budget']:.1%} of the denoiser's multiply-accumulates, within {numbers['tolerance']:.1%}; "
        f"{numbers['reachable'][0]:.1%} to 100 % can be met. Rule `{numbers['rule']}` at level {numbers['level']:.4g}, "
        f"after {len(numbers['tried'])} attempt(s); {numbers['num_inference_steps']} steps, "
        f"{numbers['num_samples']} samples to calibrate and as many others held out.",
        "",
        f"    {command}",
        "",
        "| samples | share | between samples | standard error | PSNR to full, dB (95 %) | seconds |",
        "|---|---|---|---|---|---|",
        _cost_line("calibration, dynamic", numbers["calibration"]),
        *(_cost_line(f"held out, {name}", cost) for name, cost in held.items()),
        "",
        "Shares count the denoiser; what the uncertainty modules themselves cost is in the seconds only.",
        "",
        f"## Depth, of {numbers['units']} units",
        "",
        "Held-out samples. Standard deviation and quartiles are between samples at a fixed evaluation, averaged over "
        "the bin's evaluations.",
        "",
        "| from timestep | mean | standard deviation | quartiles | rank correlation across exits | across samples |",
        "|---|---|---|---|---|---|",
        *(
            f"| {edge:g} | {depth['mean']:.2f} | {depth['std']:.2f} | {_three(depth['quartiles'])} | "
            f"{_or_dash(over_exits)} | {np.mean(over_samples):.2f} |"
            for edge, depth, over_exits, over_samples in zip(
                edges, depths, across_exits, ranks["across_samples_by_bin_and_exit"], strict=True
            )
        ),
        f"| all | {numbers['depth']['mean']:.2f} | {numbers['depth']['std']:.2f} | "
        f"{_three(numbers['depth']['quartiles'])} | {_or_dash(ranks['across_exits'])} | "
        f"{ranks['across_samples']:.2f} |",
        "",
        _verdict(numbers["depth"]["between_samples"]),
        "",
        "Rank correlations are Spearman's, of the predicted uncertainty and the mean absolute difference to the "
        "denoiser's own prediction, in full sampling: across the exits of one sample, and across the samples at one "
        "exit.",
    ]
    return "\n".join(lines) + "\n"


def _cost_line(name: str, cost: dict[str, Any]) -> str:
    psnr = cost["psnr"]
    near = "equal" if psnr["value"] is None else f"{psnr['value']:.2f} ± {psnr['margin']:.2f}"
    return (
        f"| {name} | {cost['share']:.2%} | ± {cost['share_std']:.2%} | {cost['share_standard_error']:.2%} | {near} | "
        f"{cost['seconds']:.1f} |"
    )


def _three(quartiles: list[float]) -> str:
    return ", ".join(f"{quartile:.1f}" for quartile in quartiles)


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _verdict(part: float | None) -> str:
    if part is None:
        return "No depth differs from another."
    return (
        f"{part:.0%} of the variance of depths is between samples at a fixed evaluation. At 0 % the exits would be a "
        "fixed schedule, and the frozen plan would lose nothing."
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def pictures(calibration: Calibration, numbers: dict[str, Any]) -> dict[str, Figure]:
    """The thresholds, the depths, and the rank correlations, by the name of their file."""
    exits = [name.rpartition(".")[2] for name in numbers["exits"]]
    method = calibration.method
    thresholds = np.zeros((len(numbers["bin_edges"]), len(exits)))
    if method.thresholds:
        every = method.modules().exits
        asked = [every.index(name) for name in numbers["exits"]]
        thresholds = np.reshape(method.thresholds, (len(numbers["bin_edges"]), len(every)))[:, asked]
    ranks = np.array(numbers["rank_correlation"]["across_samples_by_bin_and_exit"])
    edges = numbers["bin_edges"]
    return {
        "thresholds": _table(thresholds, exits, edges, "threshold", (0.0, max(float(thresholds.max()), 1e-6))),
        "correlations": _table(ranks, exits, edges, "rank correlation across samples", (-1.0, 1.0)),
        "depths": _depths(calibration.held_out["dynamic"].depths, calibration.watched.timesteps, numbers["units"]),
    }


def _table(values: np.ndarray, exits: list[str], edges: list[float], what: str, span: tuple[float, float]) -> Figure:
    """One number for each bin and exit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 + 0.5 * len(exits), 1.6 + 0.35 * len(edges)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(values, aspect="auto", vmin=span[0], vmax=span[1], cmap="viridis" if span[0] == 0 else "RdBu")
    for row, column in np.ndindex(values.shape):
        share = (values[row, column] - span[0]) / (span[1] - span[0])
        color = "black" if (share > 0.6 if span[0] == 0 else 0.2 < share < 0.8) else "white"
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(exits)), exits)
    axes.set_yticks(range(len(edges)), [f"{edge:g}" for edge in edges])
    axes.set(xlabel="exit before unit", ylabel="from timestep", title=what.capitalize())
    figure.colorbar(drawn, ax=axes, label=what)
    return figure


def _depths(depths: np.ndarray, timesteps: np.ndarray, units: int) -> Figure:
    """How many samples ran how deep at each evaluation, with mean and spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    counts = np.stack([np.bincount(row, minlength=units + 1)[1:] for row in depths], 1) / depths.shape[1]
    evaluations = np.arange(len(depths))
    span = (-0.5, len(depths) - 0.5, 0.5, units + 0.5)
    drawn = axes.imshow(counts, origin="lower", aspect="auto", extent=span, cmap="Blues", vmin=0, vmax=1)
    mean, std = depths.mean(1), depths.std(1)
    axes.plot(evaluations, mean, color="#d55e00", label="mean")
    for sign in (-1, 1):
        label = "one standard deviation between samples" if sign > 0 else None
        axes.plot(evaluations, mean + sign * std, color="#d55e00", linewidth=0.8, linestyle="--", label=label)
    shown = np.linspace(0, len(depths) - 1, min(8, len(depths))).round().astype(int)
    axes.set_xticks(shown, [f"{timesteps[row]:g}" for row in shown])
    axes.set(xlabel="timestep", ylabel="units run", ylim=span[2:])
    axes.legend(loc="lower right", fontsize="small")
    figure.colorbar(drawn, ax=axes, label="share of the samples")
    return figure
