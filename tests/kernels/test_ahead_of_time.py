"""Machine code for GPUs that are not there: no spills, few registers, wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MAX_REGISTERS = 128
NARROW = {
    # The first pixel of every channel, where channels are far apart.
    ("_moments", "group_norm_act contiguous"): 4,
    # The weight, which has one element for each thread.
    ("_qk_norm_rope", "qk_norm_rope neighbours"): 1,
    # The bias, of which a thread has some rows of a product.
    ("_skip_shortcut", "skip_shortcut contiguous"): 4,
    ("_skip_shortcut", "skip_shortcut channels last"): 4,
}
"""16-bit loads that are not of the operands that fill memory, by kernel and case."""


def compiled(cache: Path, dtypes: str, *capabilities: int) -> list[dict[str, Any]]:
    """In one process, which takes seconds to start."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "kernel_checks.ahead_of_time", dtypes, *map(str, capabilities)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        assert row["stack"] == row["local"] == row["local_accesses"] == 0, row
        assert row["registers"] <= MAX_REGISTERS, row
        if row["case"] == "ones" or row["kernel"] in ("_lines", "_mean"):
            continue  # they read little, however they do it
        assert row["loads_128"] > 0, row
        narrow = NARROW.get((row["kernel"], row["case"]), 0)
        assert row["loads_16"] <= narrow, row


EVERY_RUN = [("bfloat16", (80, 90, 100, 120)), ("float16,float32", (90,))]
NOW_AND_THEN = [("float16,float32", (80, 100, 120))]


@pytest.mark.parametrize(
    ("dtypes", "capabilities"), [*EVERY_RUN, *(pytest.param(*each, marks=pytest.mark.slow) for each in NOW_AND_THEN)]
)
def test_kernels_compile(dtypes: str, capabilities: tuple[int, ...], tmp_path: Path) -> None:
    check(compiled(tmp_path, dtypes, *capabilities))
