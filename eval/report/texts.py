"""Numbers as text, with the digits that mean something; the same in every table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastdiff.eval.judging import CRITERIA, Z, is_equal_to_full, standard_error
from fastdiff.eval.speed import Ratio

NOTHING = "–"
SHARES = ("read", "precision", "recall")
"""Criteria that come with an interval of a share."""


def ratio(value: Ratio | None) -> str:
    """A ratio with its quartiles."""
    if value is None:
        return NOTHING
    if value.low == value.high:
        return f"{value.median:.2f}×"
    return f"{value.median:.2f}× ({value.low:.2f}–{value.high:.2f})"


def median(value: Ratio | None) -> str:
    """A ratio alone."""
    return NOTHING if value is None else f"{value.median:.2f}×"


def percent(share: float | None, digits: int = 1) -> str:
    """A share."""
    return NOTHING if share is None else f"{100 * share:.{digits}f}%"


def value(name: str, told: Mapping[str, Any] | None) -> tuple[str, str]:
    """A criterion's value, and its 95 % interval or spread; the latter may be empty."""
    if told is None:
        return NOTHING, ""
    if name == "psnr" and is_equal_to_full(told):
        return "equal", ""
    scale, digits = CRITERIA[name].scale, decimals(name, told)
    text = number(scale * told["value"], digits)
    if name in SHARES:  # next to 0 and 1 the interval is not symmetric
        return text, f"{scale * told['low']:.0f}–{scale * told['high']:.0f}"
    if "spread" in told:
        return text, f"sd {number(scale * told['spread'], digits)}"
    error = standard_error(told)
    return text, "" if error is None else f"± {number(scale * Z * error, digits)}"


def decimals(name: str, told: Mapping[str, Any]) -> int | None:
    """How many digits after the point a criterion is shown with: two of the interval or spread count.

    None for three digits in all, where neither is known.
    """
    fixed, error = CRITERIA[name].decimals, standard_error(told)
    noise = told.get("spread") if error is None else Z * error
    if fixed is not None or noise is None:
        return fixed
    noise *= CRITERIA[name].scale
    return 2 if noise == 0 else min(6, max(0, 1 - math.floor(math.log10(noise))))


def number(value: float, decimals: int | None) -> str:
    """A number with some digits after the point, or None for three in all."""
    return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"


def difference(name: str, change: tuple[float, float | None], told: Mapping[str, Any]) -> str:
    """A difference in a criterion, with half its 95 % interval, in the digits of the value it belongs to."""
    scale, digits = CRITERIA[name].scale, decimals(name, told)
    size, error = number(abs(scale * change[0]), digits), change[1]
    sign = "" if not float(size) else "−" if change[0] < 0 else "+"
    return f"{sign}{size}" if error is None else f"{sign}{size} ± {number(scale * Z * error, digits)}"


def seconds(taken: float) -> str:
    """A duration."""
    if taken < 1:
        return f"{1000 * taken:.{0 if taken >= 0.1 else 1}f} ms"
    return f"{taken:.2f} s" if taken < 100 else f"{taken:.0f} s"


def macs(count: float | None) -> str:
    """Multiply-accumulates."""
    if count is None or not count:
        return NOTHING
    power = min(5, int(math.log10(count)) // 3)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}MAC"


def line(text: str) -> str:
    """Text of several lines in one."""
    return " ".join(text.split())


def shortened(text: str, length: int) -> str:
    """Text with something left out before its end where it is too long: settings are told apart by both ends."""
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - 1 - end]}…{text[-end:]}"
