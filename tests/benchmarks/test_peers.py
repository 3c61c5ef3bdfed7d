"""The recorded table of other packages: what it says is what was measured, and nothing was left on a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers
import pytest

from fastdiff.eval.peers import names

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))


def test_the_page_shows_the_recorded_numbers(data: dict[str, Any]) -> None:
    assert (RESULTS / "peers.md").read_text(encoding="utf-8") == peers.render(data)


def test_every_peer_was_tried_on_every_model(data: dict[str, Any]) -> None:
    assert tuple(data["models"]) == peers.MODELS
    for rows in data["models"].values():
        assert {peers.name_of(row) for row in rows} == set(names())


def test_everything_was_undone_and_whatever_cannot_run_has_a_reason(data: dict[str, Any]) -> None:
    rows = [row for rows in data["models"].values() for row in rows]
    assert all(row["restored"] for row in rows)
    assert all(row["repeats"] for row in rows if row["outcome"] != peers.CANNOT)
    assert all(bool(row["reason"]) == (row["outcome"] == peers.CANNOT) for row in rows)


def test_statistics_of_a_peer_agree_with_its_images(data: dict[str, Any]) -> None:
    told = [row for rows in data["models"].values() for row in rows if row["engaged"] is not None]
    assert told
    assert all(row["engaged"] == (row["outcome"] == peers.RUNS) for row in told)
