"""What a reader wants to know first, whatever it turns out to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastdiff.eval.judging import CRITERIA
from fastdiff.eval.points import Point
from fastdiff.eval.report import texts
from fastdiff.eval.report.tables import deciding_criteria, name_of
from fastdiff.eval.results import Results, kind_of
from fastdiff.pipelines.pipeline import DEFAULT_PRESET

WORDS = {
    "better": "better",
    "worse": "worse",
    "mixed": "better in one way and worse in another",
    "level": "no different",
}


def headline(results: Results) -> str:
    """A few sentences: how fastdiff and others do against fewer steps, and who does best."""
    sentences = [
        *_default_preset(results),
        *_against_fewer_steps(results, "fastdiff", "fastdiff's"),
        *_against_fewer_steps(results, "peer", "other packages"),
        *filter(None, (_front(results, name) for name in deciding_criteria(results)[:2])),
    ]
    if not sentences:
        return f"{len(results.measured)} ways of sampling, none of them timed against fewer steps."
    return " ".join(sentences)


def _default_preset(results: Results) -> list[str]:
    """What is gained by one line and no choice, if it is among the rows."""
    label = f"preset {DEFAULT_PRESET}"
    preset = next((point for point in results.measured if point.way["label"] == label), None)
    timing = None if preset is None else results.timing(preset)
    if preset is None or timing is None:
        return []
    told = (
        f"With nothing but the default preset, sampling took {texts.percent(1 / timing.speedup.median, 0)} of the time "
        f"({texts.median(timing.speedup)}) at {texts.percent(preset.macs_share, 0)} of the multiply-accumulates"
    )
    ours, full = preset.quality or {}, results.point(preset.baseline).quality or {}
    if "read" not in ours or "read" not in full:
        return [f"{told}."]
    read = [texts.percent(quality["read"]["value"]) for quality in (ours, full)]
    return [f"{told}; {read[0]} of the samples were read as asked, against {read[1]} of those sampled in full."]


def _against_fewer_steps(results: Results, kind: str, what: str) -> list[str]:
    """How a kind of ways does against plain sampling in the same time."""
    points = [point for point in results.measured if kind_of(point) == kind]
    verdicts = Counter(filter(None, map(results.verdict, points)))
    if not verdicts:
        return []
    counts = {word: verdicts[name] for name, word in WORDS.items() if verdicts[name]}
    told = [f"{count} {'is' if count == 1 else 'are'} {word}" for word, count in counts.items()]
    count = sum(verdicts.values())
    settings = f"setting{'' if count == 1 else 's'} of {what}"
    return [f"Of {count} {settings}, against plain sampling that takes the same time, {_listed(told)}."]


def _front(results: Results, criterion: str) -> str:
    """Which points none beats in both speed and a criterion, without full sampling."""
    dominated = results.dominated(criterion)
    front = [
        point
        for point in results.measured
        if not point.is_baseline
        and point.key not in dominated
        and criterion in (point.quality or {})
        and (results.speedup(point) or 0.0) > 1
    ]
    if not front:
        return ""
    front.sort(key=lambda point: results.speedup(point) or 0.0)
    return (
        f"By {CRITERIA[criterion].title} and speed, none beats {_listed([_told(results, point) for point in front])}."
    )


def _told(results: Results, point: Point) -> str:
    timing = results.timing(point)
    return f"{name_of(point)} ({texts.median(timing.speedup if timing else None)})"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
