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
MAX_PIVOTS = 4


def compiled(cache: Path, dtypes: str, *capabilities: int) -> list[dict[str, Any]]:
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
        if row["case"] == "ones" or row["kernel"] == "_lines":
            continue  # they read little, however they do it
        assert row["loads_128"] > 0, row
        # The first pixel of every channel, where channels are far apart.
        pivots = row["kernel"] == "_moments" and "contiguous" in row["case"]
        assert row["loads_16"] <= (MAX_PIVOTS if pivots else 0), row


def test_kernels_compile_for_sm_90(tmp_path: Path) -> None:
    check(compiled(tmp_path, "bfloat16", 90))


@pytest.mark.slow
def test_kernels_compile_for_all_targets(tmp_path: Path) -> None:
    check(compiled(tmp_path, "float16,bfloat16,float32", 80, 90, 100, 120))
