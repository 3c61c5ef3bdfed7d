"""Tables and pictures of what `unets` measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from unets import EVALUATIONS, RENDERS, SINGLE, SKIP, Section, Store, find_matches, match_rows, skip_key

from fastdiff.cli.comparison import Comparison, Row, Settings
from fastdiff.cli.contenders import FULL, PLAIN, plain
from fastdiff.cli.pictures import draw_samples, draw_trade_off, png, write_png
from fastdiff.cli.results import change_text, distance_text, psnr_text, ratio_text
from fastdiff.cli.sampler import Ran
from fastdiff.cli.spec import format_method
from fastdiff.cli.tasks import Task
from fastdiff.eval import Ratio, paired_ratio
from fastdiff.eval.glyphs import READ, Score
from fastdiff.eval.provenance import describe_machine
from fastdiff.methods import SkipTuning
from fastdiff.methods.skip_tuning import RHO_BY_EVALUATIONS
from fastdiff.plan import ComputePlan, write_json
from fastdiff.zoo.captions import caption_sequence
from fastdiff.zoo.data import BOLD_DIGITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNTIMED = Ratio(float("nan"), float("nan"), float("nan"), 0)
NOTICEABLE_DB = 0.5
"""Less of a difference in PSNR counts as none."""


@dataclass
class Measured:
    """A section with its rows.

    Args:
        section: what was measured.
        comparison: its rows; full sampling first, plain rows with fewer steps last, from many steps to few.
        matches: for each method's key the plain row that takes as long.
        timing_batch: images that were timed at a time.
        environment: the machine.
        guided: whether there is guidance.
    """

    section: Section
    comparison: Comparison
    matches: dict[str, Row]
    timing_batch: int
    environment: dict[str, Any]
    guided: bool

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return self.comparison.rows


def load(section: Section, settings: Settings, store: Store) -> Measured:
    """Everything that is kept of a section.

    Raises:
        SystemExit: if a row is missing.
    """
    steps = find_matches(section, store) if section.finds_matches else {}
    contenders = [*section.contenders, *match_rows(section, store)]
    fewer = sorted((row for row in contenders if row.key.startswith(PLAIN)), key=lambda row: -row.steps)
    ordered = [row for row in contenders if not row.key.startswith(PLAIN)] + fewer
    kept = {row.key: (store.read(row.key, "quality"), store.read(row.key, "time")) for row in ordered}
    renders = store.read(RENDERS, "quality")
    if renders is None or (missing := [key for key, (quality, _) in kept.items() if quality is None]):
        raise SystemExit(f"{store.folder} lacks {', '.join(missing if renders else [RENDERS])}; measure it first.")
    full, timed = kept[FULL]
    asked = caption_sequence(settings.count, settings.seed)[1] if full["questions"] else None
    task = Task(asked=asked, subset=BOLD_DIGITS if asked is None else None)
    rows = [
        Row(
            contender=row,
            images=store.images(row.key),
            seconds=time["times"][str(time["batch"])]["seconds"] if time else [],
            single_seconds=time["times"][str(SINGLE)]["seconds"] if time else [],
            ran=Ran(ComputePlan.load(store.folder / f"{row.key}.plan.json"), quality["macs"]),
            macs_share=quality["macs"] / full["macs"],
            score=_score(quality),
            psnr=np.inf if quality["psnr"] is None else quality["psnr"],
            speedup=_speedup(time, "batch"),
            single_speedup=_speedup(time, SINGLE),
        )
        for row, (quality, time) in ((row, kept[row.key]) for row in ordered)
    ]
    by_steps = {row.contender.steps: row for row in rows if not row.contender.methods}
    matches = {key: by_steps[number] for key, number in steps.items()}
    comparison = Comparison(settings, task, rows, _score(renders), None, 0.0)
    return Measured(section, comparison, matches, timed["batch"], timed["environment"], full["guided"])


def _score(kept: dict[str, Any]) -> Score:
    names = ("samples", "fid", "correct", "read_low", "read_high")
    return Score(resampled=np.array(kept["resampled"]), **{name: kept[name] for name in names})


def _speedup(time: dict[str, Any] | None, size: str | int) -> Ratio:
    if time is None:
        return UNTIMED
    times = time["times"][str(time["batch"] if size == "batch" else size)]
    return paired_ratio(times["full"], times["seconds"])


def verdict(row: Row, match: Row) -> str:
    """Whether a method ``"wins"`` or ``"loses"`` against plain sampling of the same time; or ``"mixed"``, ``"level"``.

    Better or worse counts where it is beyond noise: of the distance's paired difference, of both shares read, and by
    half a decibel.
    """
    change, error = row.score.fid_change(match.score)
    better = [
        change < -1.96 * error,
        row.score.read_low > match.score.read_high,
        row.psnr > match.psnr + NOTICEABLE_DB,
    ]
    worse = [
        change > 1.96 * error,
        row.score.read_high < match.score.read_low,
        row.psnr < match.psnr - NOTICEABLE_DB,
    ]
    if any(better) and any(worse):
        return "mixed"
    return "wins" if any(better) else "loses" if any(worse) else "level"


# -- data and tables ---------------------------------------------------------------------------------------------------


def as_data(measured: Measured) -> dict[str, Any]:
    """A section, JSON-compatible."""
    baseline = measured.rows[0]
    return {
        "section": measured.section.title,
        "scheduler": measured.section.scheduler.__name__,
        "settings": asdict(measured.comparison.settings),
        "timing_batch": measured.timing_batch,
        "environment": measured.environment,
        "renders": _score_data(measured.comparison.renders),
        "rows": [_row_data(row, baseline, measured.matches.get(row.contender.key)) for row in measured.rows],
    }


def _score_data(score: Score) -> dict[str, Any]:
    return {
        "samples": score.samples,
        "fid": score.fid,
        "fid_error": score.fid_error,
        "correct": score.correct,
        "read_interval": [score.read_low, score.read_high],
    }


def _row_data(row: Row, baseline: Row, match: Row | None) -> dict[str, Any]:
    timed = row.speedup.pairs > 0
    data = {
        "key": row.contender.key,
        "label": row.contender.label,
        "methods": [format_method(method) for method in row.contender.methods],
        "num_inference_steps": row.contender.steps,
        "speedup": asdict(row.speedup) if timed else None,
        "speedup_single": asdict(row.single_speedup) if timed else None,
        "macs_per_image": row.ran.macs,
        "macs_share": row.macs_share,
        **_score_data(row.score),
        "psnr": None if np.isinf(row.psnr) else row.psnr,
        "fid_change": _change(row, baseline),
    }
    if match:
        data |= {
            "same_time": match.contender.key,
            "fid_change_to_it": _change(row, match),
            "verdict": verdict(row, match),
        }
    return data


def _change(row: Row, other: Row) -> dict[str, float]:
    return dict(zip(("value", "error"), row.score.fid_change(other.score), strict=True))


def solver_table(measured: Measured) -> list[str]:
    """The rows of one solver in Markdown, with what plain sampling gives in the same time."""
    count, batch = measured.comparison.settings.count, measured.timing_batch
    lines = [
        f"| | speedup, {batch} at a time | one at a time | MACs | FID-{count} | PSNR to full, dB | read correctly | "
        "plain in the same time | FID against it | PSNR | read | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in measured.rows:
        score, match = row.score, measured.matches.get(row.contender.key)
        cells = [
            row.contender.label,
            ratio_text(row.speedup),
            f"{row.single_speedup.median:.2f}×",
            f"{row.macs_share:.1%}",
            " ± ".join(distance_text(score)),
            psnr_text(row.psnr),
            f"{score.read_share:.1%} ({score.read_low:.0%}–{score.read_high:.0%})",
        ]
        lines.append(f"| {' | '.join([*cells, *(_against(row, match) if match else [''] * 5)])} |")
    return lines


def _against(row: Row, match: Row) -> list[str]:
    difference = row.psnr - match.psnr
    return [
        f"{match.contender.steps} steps, {match.speedup.median:.2f}×",
        change_text(row.score, match.score),
        "" if np.isinf(difference) else f"{difference:+.1f}".replace("-", "−"),
        f"{100 * (row.score.read_share - match.score.read_share):+.1f}".replace("-", "−"),
        verdict(row, match),
    ]


def skip_table(measured: Measured) -> list[str]:
    """Of the sweep: no skip-tuning, the factor that fastdiff takes by default, and the best one."""
    rows = {row.contender.key: row for row in measured.rows}
    count = measured.comparison.settings.count
    lines = [
        f"| evaluations | factor | time of plain sampling | FID-{count} | against plain | PSNR to "
        f"{EVALUATIONS[0]} evaluations, dB | read correctly |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for evaluations in EVALUATIONS:
        base = rows[FULL if evaluations == EVALUATIONS[0] else plain(evaluations).key]
        default = rows[skip_key(evaluations, RHO_BY_EVALUATIONS[evaluations])]
        best = min(swept(measured, evaluations), key=lambda row: row.score.fid)
        time = base.speedup.median / default.speedup.median
        for what, row in (("1: plain", base), ("default", default), ("best", best)):
            score = row.score
            cells = [
                str(evaluations),
                what if row is base else f"{_rho(row):g}: {what}",
                f"{time:.2f}" if row is default else "",
                " ± ".join(distance_text(score)),
                "" if row is base else change_text(score, base.score),
                psnr_text(row.psnr),
                f"{score.read_share:.1%} ({score.read_low:.0%}–{score.read_high:.0%})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def swept(measured: Measured, evaluations: int) -> list[Row]:
    """The rows of the sweep at one number of evaluations, without plain sampling, the smallest factor first."""
    return [row for row in measured.rows if row.contender.group == SKIP and row.contender.steps == evaluations]


def _rho(row: Row) -> float:
    (method,) = row.contender.methods
    assert isinstance(method, SkipTuning)
    return float(method.rho)  # type: ignore[arg-type]


def notes(sections: Sequence[Measured], model: str) -> list[str]:
    """How the numbers came about."""
    first = sections[0]
    settings, task, renders = first.comparison.settings, first.comparison.task, first.comparison.renders
    guidance = f"guidance {settings.guidance_scale:g}" if first.guided else "no guidance"
    pairs = first.rows[0].speedup.pairs
    return [
        f"{model}, {guidance}, float32, seeds {settings.seed} and up. {describe_machine(first.environment)}.",
        f"Speedup: wall clock of whole pipeline calls against full sampling, median of {pairs} pairs (quartiles); all "
        "rows take turns.",
        "Plain in the same time: the number of steps whose wall clock is nearest to the row's, "
        f"{first.timing_batch} images at a time. What follows is the row less that: the distance (lower is better, "
        "with 1.96 bootstrap standard errors of the difference, which is small because both start from the same "
        "noise), dB, and points of a hundred. The verdict counts what is beyond these errors, and "
        f"{NOTICEABLE_DB:g} dB: a row wins if something is better and nothing worse.",
        "MACs: multiply-accumulates of the denoiser, counted, as a share of full sampling's.",
        f"FID: Fréchet distance of the reader's features to {settings.renders} {task.renders}, ± 1.96 "
        "bootstrap standard errors. It is not Inception's FID, and depends on the number of samples: "
        f"{renders.samples} other renders, which are perfect samples, score {distance_text(renders)[0]}. Strong "
        "guidance makes samples less varied than renders; the distance would then reward any disturbance, so that "
        "guidance is weak here.",
        f"Read correctly: {READ[task.questions]}, 95 % Wilson interval. It reads {renders.read_share:.1%} of the "
        "renders so.",
    ]


SKIP_NOTE = (
    "DPM++. The default factor is the one that Skip-Tuning's paper found best for unguided EDM on pixels; the best has "
    "the lowest distance of the sweep, chosen on these samples. Time of plain sampling: what as many evaluations take "
    "with skip-tuning, as a multiple of plain sampling's wall clock."
)


def as_markdown(sections: Sequence[Measured], model: str) -> str:
    """All sections."""
    lines = []
    for measured in sections:
        table = solver_table(measured) if measured.section.finds_matches else [*skip_table(measured), "", SKIP_NOTE]
        lines += [f"**{measured.section.title}**", "", *table, ""]
    return "\n".join([*lines, *(f"{note}\n" for note in notes(sections, model))])


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_sweep(measured: Measured) -> Figure:
    """Distance and share read against skip-tuning's factor, one line for each number of evaluations."""
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 7.5), layout="constrained", sharex=True)
    rows = {row.contender.key: row for row in measured.rows}
    styles = zip(EVALUATIONS, ("#0072b2", "#d55e00", "#009e73"), "osD", strict=True)
    for evaluations, color, marker in styles:
        base = rows[FULL if evaluations == EVALUATIONS[0] else plain(evaluations).key]
        points = sorted(
            [(_rho(row), row.score) for row in swept(measured, evaluations)] + [(1.0, base.score)], key=_first
        )
        factors, scores = zip(*points, strict=True)
        style = {
            "color": color,
            "marker": marker,
            "markersize": 5,
            "linewidth": 1.2,
            "label": f"{evaluations} evaluations",
        }
        upper.errorbar(
            factors, [score.fid for score in scores], [1.96 * score.fid_error for score in scores], capsize=2, **style
        )
        shares = [100 * score.read_share for score in scores]
        ends = np.array([[100 * score.read_low, 100 * score.read_high] for score in scores]).T
        lower.errorbar(factors, shares, np.abs(ends - shares), capsize=2, **style)
        upper.axvline(RHO_BY_EVALUATIONS[evaluations], color=color, linewidth=0.8, linestyle=":")
    upper.axhline(measured.comparison.renders.fid, color="#777777", linewidth=0.8)
    upper.annotate("as many fresh renders", (0.01, measured.comparison.renders.fid), xycoords=("axes fraction", "data"))
    upper.set_ylabel(f"FID-{measured.comparison.settings.count} on reader features, lower is better")
    lower.set_ylabel("read correctly, %")
    lower.set_xlabel("skip-tuning's factor; 1 is plain sampling, dotted is the default")
    upper.legend(frameon=False)
    for axes in (upper, lower):
        axes.grid(color="#dddddd", linewidth=0.6)
    return figure


def _first(pair: tuple[float, Score]) -> float:
    return pair[0]


def write(kept: Sequence[tuple[Section, Settings, Store]], model: str, out: Path, pictures: Path) -> None:
    """Write the tables as Markdown and JSON, and the pictures."""
    import matplotlib

    matplotlib.use("Agg")
    sections = [load(*entry) for entry in kept]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"unets_{model}.json", {"model": model, "sections": [as_data(section) for section in sections]})
    table = as_markdown(sections, model)
    (out / f"unets_{model}.md").write_text(table, encoding="utf-8")
    print(table)
    for measured in sections:
        key = measured.section.key
        figures = {f"unets-{model}-{key}": draw_sweep} if not measured.section.finds_matches else {}
        if measured.section.finds_matches:
            figures[f"unets-{model}-{key}"] = lambda one: draw_trade_off(one.comparison)
            figures[f"unets-{model}-{key}-samples"] = lambda one: draw_samples(one.comparison)
        for name, draw in figures.items():
            write_png(pictures / f"{name}.png", png(draw(measured)))
