"""Samples in half precision with the kernels' rounding: measured here on few images, and the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import kernel_latents
import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks/results/kernel_latents.json"


def by_build(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["dtype"]), {})[row["build"]] = row
    return found


def check(builds: dict[str, dict[str, Any]]) -> None:
    eager, fused, matching = (builds[name] for name in kernel_latents.BUILDS)
    images = len(eager["to_float32"])
    assert not any(eager["to_eager"])
    assert matching["identical"] == images
    assert fused["identical"] < images
    # From the same noise, and not sent elsewhere: other noise is off by more than all of it.
    assert 0 < median(fused["to_eager"]) < 0.2
    # No further from float32 than half precision is anyway: its median lies where the middle half of the others does.
    assert median(fused["to_float32"]) < quantiles(eager["to_float32"], n=4)[2]


def test_rounding_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")  # the script sets another value, which is taken back with this
    out = tmp_path / "latents.json"
    settings = "--models glyphs-dit --dtypes float16 --images 4 --steps 3 --device cpu --out"
    kernel_latents.main([*settings.split(), str(out)])
    (builds,) = by_build(json.loads(out.read_text())["rows"]).values()
    check(builds)
    table = out.with_suffix(".md").read_text()
    assert "references in torch" in table
    assert table.count("| glyphs-dit | float16 |") == 3


def test_committed_results() -> None:
    results = json.loads(RESULTS.read_text())
    found = by_build(results["rows"])
    assert set(found) == {(model, dtype) for model in kernel_latents.MODELS for dtype in kernel_latents.DTYPES}
    for builds in found.values():
        check(builds)
