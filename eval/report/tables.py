"""The results as tables: Markdown to read, CSV to go on with."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from typing import Any

from fastdiff.eval import results as rows
from fastdiff.eval.judging import CRITERIA, change, is_equal_to_full, standard_error
from fastdiff.eval.points import Point
from fastdiff.eval.provenance import describe_machine
from fastdiff.eval.report import texts
from fastdiff.eval.results import Results, kind_of


def as_markdown(results: Results, *, brief: bool = False) -> str:
    """All rows, what could not be sampled with the reason, and how it was measured.

    Args:
        results: the rows.
        brief: only the criteria that decide, and only the verdict against plain sampling in the same time.
    """
    deciding = deciding_criteria(results)
    criteria, compared = (deciding, []) if brief else (results.criteria, deciding)
    batch, single = results.batch, results.batch != 1
    head = ["", *([f"speedup, {batch} at a time"] if batch else []), *(["one at a time"] if batch and single else [])]
    head += ["MACs", *(title(name) for name in criteria)]
    if matched := any(results.match(point) for point in results.points):
        head += ["plain in the same time", *(f"{CRITERIA[name].title} against it" for name in compared), "verdict"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for point in results.measured:
        cells = [escaped(name_of(point))]
        if batch:
            cells.append(texts.ratio(timing.speedup if (timing := results.timing(point)) else None))
        if batch and single:
            cells.append(texts.median(point.timings[1].speedup if 1 in point.timings else None))
        cells += [texts.percent(point.macs_share), *(_cell(point, name) for name in criteria)]
        if matched:
            cells += _against(results, point, compared)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_unable(results), *(f"{note}\n" for note in notes(results, brief=brief))])


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is, also in a table."""
    return re.sub(r"([|*_`\[\]<])", r"\\\1", texts.line(text))


def title(name: str) -> str:
    """A criterion in a table's head."""
    criterion = CRITERIA[name]
    return f"{criterion.title}, {criterion.unit}" if criterion.unit else criterion.title


def name_of(point: Point) -> str:
    """A row's name: its label, with its group's and its copy's where these do not say the same."""
    return rows.name_of(point.way)


def deciding_criteria(results: Results) -> list[str]:
    """The criteria that verdicts are made on, as far as they were measured."""
    return [name for name in results.criteria if CRITERIA[name].decides]


def _cell(point: Point, name: str) -> str:
    value, interval = texts.value(name, (point.quality or {}).get(name))
    return f"{value} {interval}" if interval.startswith("±") else f"{value} ({interval})" if interval else value


def _against(results: Results, point: Point, criteria: list[str]) -> list[str]:
    match = results.match(point)
    ours, others = point.quality or {}, (match.quality if match else None) or {}
    if match is None:
        return [""] * (len(criteria) + 2)
    differences = [
        _difference(name, ours[name], others[name]) if name in ours and name in others else "" for name in criteria
    ]
    speedup = texts.median(timing.speedup if (timing := results.timing(match)) else None)
    return [f"{match.way['num_inference_steps']} steps, {speedup}", *differences, results.verdict(point) or ""]


def _difference(name: str, ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if name == "psnr" and is_equal_to_full(other):  # no number: it compares with full sampling itself
        return "equal" if is_equal_to_full(ours) else texts.NOTHING
    return texts.difference(name, change(ours, other), ours)


def _unable(results: Results) -> list[str]:
    unable = [point for point in results.points if point.error is not None]
    if not unable:
        return []
    lines = [f"- {escaped(name_of(point))}: {texts.line(point.error['message'])}" for point in unable if point.error]
    return ["Could not be sampled:", "", *lines, ""]


def notes(results: Results, *, brief: bool = False) -> list[str]:
    """How the numbers came about, one paragraph each; in brief without those of what is not shown."""
    header = results.header
    samples, sets = header["num_samples"], header["seeds"]
    seeds = ", ".join(f"{first} to {first + samples - 1}" for first in sets)
    told = [
        f"{header['model']}, {header['num_inference_steps']} steps unless said otherwise, {header['scheduler']}, "
        f"{header['asked']}, {header['dtype']}, {samples} samples of each row from seeds {seeds}"
        f"{' each; distances are the mean over these sets' if len(sets) > 1 else ''}. "
        f"{describe_machine(header['environment'])}."
    ]
    if results.batch:
        pairs = {timing.speedup.pairs for point in results.points if (timing := results.timing(point))}
        told.append(
            "Speedup: wall clock of whole pipeline calls against full sampling with the same weights, median of "
            f"{min(pairs)} pairs (quartiles). All rows take turns, so that a pair saw the same machine."
        )
    told.append(
        "MACs: multiply-accumulates of the denoiser, counted, as a share of full sampling's "
        f"{texts.macs(results.points[0].macs)} for an image."
    )
    told += _criteria_notes(results, brief)
    if any(results.match(point) for point in results.points):
        against = "" if brief else " Against it: the row less that, ± 1.96 standard errors of the difference."
        told.append(
            f"Plain in the same time: the number of steps whose wall clock is nearest to the row's.{against} The "
            "verdict counts what differs by more than 1.96 standard errors of the difference, which are small because "
            "both start from the same noise: better if something is and nothing is worse."
        )
    return told


def _criteria_notes(results: Results, brief: bool) -> list[str]:
    header, names = results.header, results.criteria
    judged = header["judged"]
    told = []
    if "fid" in names:
        told.append(
            f"FID: Fréchet distance of features of {judged['features']} to {judged['reference_samples']} images of "
            f"{judged['reference']}, ± 1.96 bootstrap standard errors. It is biased by the number of samples, "
            f"{header['num_samples']} here: compare equal numbers, features and references only."
            + _floor_note(header.get("floor"))
        )
    if "read" in names:
        told.append(f"Read correctly: {header['read']}, with its 95 % Wilson interval.")
    if "psnr" in names:
        told.append(
            "To full: against full sampling's image of the same seed. It says how much a method changes the samples, "
            "not how good they are."
        )
    if brief:
        return told
    judged_points = (point.quality for point in results.measured if point.quality and "fid" in point.quality)
    absent = next((quality["fid"].get("absent") for quality in judged_points), None) or {}
    told += [f"Not measured: {name.replace('_', ' ')}: {reason}" for name, reason in absent.items()]
    return told


def _floor_note(floor: dict[str, Any] | None) -> str:
    if floor is None:
        return ""
    value, interval = texts.value("fid", floor["fid"])
    return f" As many fresh images of the reference's kind, which are perfect samples, score {value} {interval}."


# -- CSV ---------------------------------------------------------------------------------------------------------------


def as_csv(results: Results) -> str:
    """One line for each row, with every number."""
    buffer = io.StringIO()
    lines = [_flat(results, point) for point in results.points]
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _flat(results: Results, point: Point) -> dict[str, Any]:
    line: dict[str, Any] = {
        "key": point.key,
        "kind": kind_of(point),
        "group": point.way["group"],
        "label": point.way["label"],
        "spec": point.way["spec"],
        "model": point.way["model"],
        "num_inference_steps": point.way["num_inference_steps"],
        "error": point.error["message"] if point.error else "",
        "notes": " ".join(point.notes),
        "macs_per_image": point.macs,
        "macs_share": point.macs_share,
        "depth": point.depth,
        "same_time": point.same_time,
        "verdict": results.verdict(point),
    }
    for batch, timing in sorted(point.timings.items()):
        at = f"_at_{batch}"
        line |= {
            f"speedup{at}": timing.speedup.median,
            f"speedup{at}_low": timing.speedup.low,
            f"speedup{at}_high": timing.speedup.high,
            f"pairs{at}": timing.speedup.pairs,
            f"seconds_p50{at}": timing.pipeline.seconds,
            f"seconds_p95{at}": timing.pipeline.p95,
            f"images_per_second{at}": timing.pipeline.images_per_second,
            f"denoiser_seconds{at}": timing.denoiser.seconds if timing.denoiser else None,
            f"denoiser_speedup{at}": timing.denoiser_speedup.median if timing.denoiser_speedup else None,
            f"peak_bytes{at}": timing.peak_bytes,
        }
    for name, told in (point.quality or {}).items():
        line |= {name: told["value"], f"{name}_error": standard_error(told)}
    return line
