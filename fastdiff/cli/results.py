"""The demo's numbers as data and as tables: JSON with everything, CSV and Markdown to read on."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING, Any

from fastdiff.cli.spec import format_method
from fastdiff.eval import Ratio, describe_environment
from fastdiff.eval.glyphs import READ
from fastdiff.eval.provenance import describe_machine
from fastdiff.zoo.data import CHARACTERS

if TYPE_CHECKING:
    from fastdiff.cli.comparison import Comparison, Row
    from fastdiff.eval.glyphs import Score

SCHEMA_VERSION = 1
PROMPTS = "prompts.txt"
"""The file of prompts that the demo writes where it gave any."""
BEATEN = "Plain sampling with fewer steps was at least as fast, and its distance and readings were no worse."


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Everything that was measured, with where it comes from, JSON-compatible."""
    settings = comparison.settings
    return {
        "schema_version": SCHEMA_VERSION,
        "date": date.today().isoformat(),
        "settings": {**asdict(settings), "samples": settings.count, "samples_asked_for": settings.samples},
        "seeds": [settings.seed, settings.seed + settings.count - 1],
        "environment": describe_environment(settings.device),
        "sampling_seconds": comparison.sampling_seconds,
        "same_work_ratio": asdict(comparison.same_work) if comparison.same_work else None,
        "renders": _score(comparison.renders),
        "rows": [_row(comparison, row) for row in comparison.rows],
    }


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    contender, baseline = row.contender, comparison.row(row.contender.baseline)
    return {
        "key": contender.key,
        "label": contender.label,
        "group": contender.group,
        "model": model_of(comparison, row),
        "methods": [format_method(method) for method in contender.methods],
        "num_inference_steps": contender.steps,
        "baseline": contender.baseline,
        "speedup": asdict(row.speedup),
        "speedup_single": asdict(row.single_speedup),
        "seconds": row.seconds,
        "seconds_single": row.single_seconds,
        "macs_per_image": row.ran.macs,
        "macs_share": row.macs_share,
        **_score(row.score),
        "fid_change": dict(zip(("value", "error"), row.score.fid_change(baseline.score), strict=True)),
        # JSON knows no infinity: null is a row whose samples equal its baseline's.
        "psnr": None if math.isinf(row.psnr) else row.psnr,
        "beaten_by": row.beaten_by,
        "command": command(comparison, row),
    }


def _score(score: Score) -> dict[str, Any]:
    return {
        "samples": score.samples,
        "fid": score.fid,
        "fid_interval": list(score.fid_interval),
        "correct": score.correct,
        "read_share": score.read_share,
        "read_interval": [score.read_low, score.read_high],
    }


def model_of(comparison: Comparison, row: Row) -> str:
    """The model a row was sampled with."""
    settings = comparison.settings
    return settings.finetuned if row.contender.finetuned and settings.finetuned else settings.model


def command(comparison: Comparison, row: Row) -> str:
    """The command that samples a row's images again, bit for bit on the same machine."""
    settings, contender = comparison.settings, row.contender
    methods = " ".join(f"--method {format_method(method)}" for method in contender.methods) or "--preset off"
    parts = [
        f"fastdiff generate {model_of(comparison, row)} {methods}",
        *(_REQUESTS[name] for name in comparison.task.requests),
        f"--samples {settings.count} --batch {settings.batch} --seed {settings.seed}",
        f"--num-inference-steps {contender.steps}",
        *(f"--guidance-scale {scale:g}" for name, scale in comparison.task.shared.items() if name == "guidance_scale"),
        f"--device {settings.device} --dtype {settings.dtype} --out {contender.key}",
    ]
    return " ".join(parts)


_REQUESTS = {
    "class_labels": f"--class-labels $(seq 0 {len(CHARACTERS) - 1})",
    "prompt": f"--prompt-file {PROMPTS}",
}
"""What was asked of the images, as options of ``fastdiff generate``."""


# -- tables ------------------------------------------------------------------------------------------------------------


def ratio_text(ratio: Ratio) -> str:
    """A ratio with its quartiles."""
    if ratio.low == ratio.high:
        return f"{ratio.median:.2f}×"
    return f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})"


def distance_text(score: Score) -> tuple[str, str]:
    """A distance and half its 95 % interval, with the digits that mean something."""
    half = 1.96 * score.fid_error
    digits = 2 if half < 1 else 1 if half < 10 else 0
    return f"{score.fid:.{digits}f}", f"{half:.{digits}f}"


def change_text(score: Score, baseline: Score) -> str:
    """How far a distance is from its baseline's, with half the 95 % interval."""
    change, error = score.fid_change(baseline)
    digits = len(distance_text(score)[0].partition(".")[2])
    return f"{change:+.{digits}f} ± {1.96 * error:.{digits}f}".replace("-", "−")


def psnr_text(value: float) -> str:
    """A PSNR in dB; infinite for equal images."""
    return "∞" if math.isinf(value) else f"{value:.1f}"


def as_csv(comparison: Comparison) -> str:
    """One line for each row, for a spreadsheet."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    lines = [_flat(comparison, row) for row in comparison.rows]
    writer.writerow(lines[0])
    writer.writerows(line.values() for line in lines)
    return buffer.getvalue()


def _flat(comparison: Comparison, row: Row) -> dict[str, Any]:
    contender, score = row.contender, row.score
    return {
        "key": contender.key,
        "label": contender.label,
        "group": contender.group,
        "model": model_of(comparison, row),
        "methods": " ".join(map(format_method, contender.methods)),
        "num_inference_steps": contender.steps,
        "samples": score.samples,
        "speedup": row.speedup.median,
        "speedup_low": row.speedup.low,
        "speedup_high": row.speedup.high,
        "pairs": row.speedup.pairs,
        "speedup_single": row.single_speedup.median,
        "macs_share": row.macs_share,
        "macs_per_image": row.ran.macs,
        "fid": score.fid,
        "fid_low": score.fid_interval[0],
        "fid_high": score.fid_interval[1],
        "fid_change": row.score.fid_change(comparison.row(contender.baseline).score)[0],
        "fid_change_error": row.score.fid_change(comparison.row(contender.baseline).score)[1],
        "psnr": row.psnr,
        "read_share": score.read_share,
        "read_low": score.read_low,
        "read_high": score.read_high,
        "beaten_by": " ".join(row.beaten_by),
    }


def as_markdown(comparison: Comparison) -> str:
    """The table for a README, with a sentence on how it was measured."""
    settings, count = comparison.settings, comparison.settings.count
    lines = [
        f"| | speedup, {settings.batch} at a time | one at a time | MACs | FID-{count} | change | "
        "PSNR to full, dB | read correctly |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in comparison.rows:
        score = row.score
        cells = [
            row.contender.title + (" †" if row.beaten_by else ""),
            ratio_text(row.speedup),
            f"{row.single_speedup.median:.2f}×",
            f"{row.macs_share:.1%}",
            " ± ".join(distance_text(score)),
            "" if row.is_baseline else change_text(score, comparison.row(row.contender.baseline).score),
            psnr_text(row.psnr),
            f"{score.read_share:.1%} ({score.read_low:.0%}–{score.read_high:.0%})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    dagger = f"† {BEATEN} See the report." if any(row.beaten_by for row in comparison.rows) else ""
    return "\n".join([*lines, "", *(f"{note}\n" for note in [dagger, *notes(comparison)] if note)])


def notes(comparison: Comparison) -> list[str]:
    """How the numbers came about, one sentence or two each."""
    settings, renders = comparison.settings, comparison.renders
    count, steps = settings.count, settings.steps
    pairs = comparison.rows[0].speedup.pairs
    machine = describe_machine(describe_environment(settings.device))
    same_work = comparison.same_work
    guided = f"guidance {settings.guidance_scale:g}, " if "guidance_scale" in comparison.task.shared else ""
    texts = [
        f"{settings.model}, {steps} steps unless said otherwise, {guided}{settings.dtype}, {count} samples of each "
        f"row from seeds {settings.seed} to {settings.seed + count - 1}. {machine}.",
        f"Speedup: wall clock of whole pipeline calls against full depth with the same weights, median of {pairs} "
        f"pairs (quartiles). All rows take turns, so that a pair saw the same machine.",
        f"MACs: multiply-accumulates of the denoiser, counted, as a share of full sampling's "
        f"{comparison.rows[0].ran.macs / 1e9:.2f} G for an image.",
        f"FID-{count}: Fréchet distance of the reader's features to {settings.renders} {comparison.task.renders}, "
        "± 1.96 bootstrap standard errors. It is not Inception's FID and depends on the number of samples: "
        f"{count} other renders, which are perfect samples, score {distance_text(renders)[0]}. The change against full "
        "depth has a smaller interval than either, because both start from the same noise.",
        "PSNR: against full depth with the same weights and seeds. It says how much a method changes the samples, not "
        "how good they are.",
        f"Read correctly: {READ[comparison.task.questions]}, 95 % Wilson interval. It reads {renders.read_share:.1%} "
        "of the renders so.",
    ]
    if same_work:
        texts.insert(
            2,
            f"Timing noise: full depth on both sets of weights is the same work, and measured "
            f"{ratio_text(same_work)} of each other.",
        )
    return texts


def headline(comparison: Comparison) -> str:
    """What a newcomer wants to know first, whatever it turns out to be."""
    full, default = comparison.row("full"), comparison.row("preset-balanced")
    text = (
        f"With nothing but the default preset, sampling took {1 / default.speedup.median:.0%} of the time "
        f"({default.speedup.median:.2f} times as fast) at {default.macs_share:.0%} of the multiply-accumulates; the "
        f"reader read {default.score.read_share:.0%} of the samples as asked, against {full.score.read_share:.0%} of "
        f"those sampled in full."
    )
    if default.beaten_by:
        rival = comparison.row(default.beaten_by[-1])
        text += (
            f" Plain sampling with {rival.contender.steps} steps was {rival.speedup.median:.2f} times as fast, and no "
            "worse by these measures"
        )
        if rival.psnr < default.psnr:
            text += (
                f"; its samples differ more from those sampled in full ({rival.psnr:.1f} against {default.psnr:.1f} dB)"
            )
        text += "."
    return text
