"""How fast the kernels of `fastdiff.ops` are on an NVIDIA GPU, at the shapes of real models.

    python benchmarks/kernel_speed.py
    python benchmarks/kernel_speed.py --kernels geglu lincomb --quick --out kernels

First the kernels' GPU tests run in this process: of a kernel whose tests did not pass, no time is shown. Then every
kernel takes turns with a copy of as many bytes as it cannot but read and write, with torch's own operations, and with
these compiled. A copy is the floor: what no kernel can be faster than. Written are kernels.json and kernels.md, and a
plot. Three regimes:

    cold          inputs are evicted from the second-level cache before every call
    L2-warm       the call before was the same one, and everything it read and wrote fits into that cache
    launch-bound  tiny inputs; wall-clock time of many calls in a row, with what Python does for each

Every measured cell is kept under --work, so that an interrupted run goes on where it stopped; other versions of the
kernels or another machine begin anew. Without a GPU nothing is measured, and the table says so.
"""

# Not called kernels.py: in this folder, where Python would find it, that is what transformers probes for.

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

import fastdiff.kernels.launch
from fastdiff.cost import synchronize
from fastdiff.eval import describe_environment
from fastdiff.plan import write_json

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
sys.path[:0] = [path for path in map(str, (ROOT / "benchmarks", TESTS)) if path not in sys.path]

from kernel_checks.listed import CASES, KERNELS, LAUNCH, WARM, Case  # noqa: E402
from kernel_report import COPY, as_table, draw, unmeasured  # noqa: E402

ROUNDS, QUICK_ROUNDS = 50, 10
WARM_UP = 5
CALLS = 100
"""Calls in a row where launches are timed."""
DTYPES = ("float16", "bfloat16", "float32")

Stopwatch = Callable[[Callable[[], Any]], float]
"""Calls something, and returns how many seconds one call took."""


# -- what is compared --------------------------------------------------------------------------------------------------


def contenders(case: Case, dtype: torch.dtype, device: torch.device | str, compiled: bool = True) -> dict[str, Any]:
    """What takes turns at one shape, by name; each call does the whole operation once."""
    given = case.inputs(dtype, device)
    half = max(case.moved(dtype) // 2, 1)
    source, target = (torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(2))
    found: dict[str, Callable[[], Any]] = {
        COPY: lambda: target.copy_(source),
        "fastdiff": lambda: case.operation.fused(**given),
        "eager": lambda: case.operation.eager(**given),
    }
    if compiled:
        torch.compiler.reset()
        # CUDA graphs would copy the inputs at every call, which is no part of the operation.
        for name, mode in (("default", "default"), ("max-autotune", "max-autotune-no-cudagraphs")):
            function = torch.compile(case.operation.eager, mode=mode, dynamic=False)
            found[f"compiled, {name}"] = lambda function=function: function(**given)  # type: ignore[misc]
    return found


def measure(calls: Mapping[str, Callable[[], Any]], stopwatch: Stopwatch, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the order moves on with every round."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-WARM_UP, rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            taken = stopwatch(calls[name])
            if index >= 0:
                seconds[name].append(taken)
    return seconds


def gpu_stopwatch(regime: str, device: torch.device) -> Stopwatch:
    """How one call is timed on a GPU."""
    if regime == LAUNCH:
        return lambda call: _many_calls(call, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    # Read and not written, so that no call has to wait for another's data to leave the cache.
    other = torch.zeros(max(8 * cache, 2**29), dtype=torch.uint8, device=device).view(torch.int64)

    def timed(call: Callable[[], Any]) -> float:
        if regime == WARM:
            call()
            # The launches of what is timed are queued in the meantime.
            torch.cuda._sleep(1_000_000)
        else:
            other.sum()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    return timed


def _many_calls(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / CALLS


# -- the tests that come first -----------------------------------------------------------------------------------------


class Verdicts:
    """Which kernels' tests ran and passed; a plugin of pytest.

    A kernel passes if some test of it did and none failed. A failed test that is no single kernel's counts for all.
    """

    def __init__(self) -> None:
        self._kernels: dict[str, str | None] = {}
        self._passed: set[str | None] = set()
        self._failed: set[str | None] = set()

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Note whose test it is."""
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        case = parameters.get("case")
        self._kernels[item.nodeid] = parameters.get("kernel") if case is None else case.kernel

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read may hold anyone's tests."""
        if report.failed:
            self._failed.add(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how it went."""
        kernel = self._kernels.get(report.nodeid)
        if report.failed:
            self._failed.add(kernel)
        elif report.when == "call" and report.passed:
            self._passed.add(kernel)

    def passed(self, kernels: Iterable[str]) -> set[str]:
        """Those of the kernels whose tests passed."""
        return set() if None in self._failed else (set(kernels) & self._passed) - self._failed


def passing(kernels: Iterable[str], folder: Path = TESTS / "kernels") -> set[str]:
    """Run the GPU tests in this process; the kernels whose tests passed."""
    verdicts = Verdicts()
    code = pytest.main([str(folder), "-m", "gpu", "-q", "-p", "no:cacheprovider"], plugins=[verdicts])
    finished = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return verdicts.passed(kernels) if finished else set()


# -- cells on disk -----------------------------------------------------------------------------------------------------


def sources() -> str:
    """A digest of the kernels and of what is listed, which measured times hold for."""
    folders = Path(fastdiff.kernels.launch.__file__).parent, TESTS / "kernel_checks"
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def cell(
    row: dict[str, Any], origin: dict[str, Any], work: Path, times: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A row's times: those on disk if they are of the same origin, else new ones, which are kept."""
    key = "-".join(str(row[name]) for name in ("kernel", "model", "what", "shape", "dtype", "regime") if row[name])
    path = work / row["kernel"] / f"{re.sub('[^0-9A-Za-z.]+', '-', key)}.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["origin"] == origin:
            return row | {"seconds": kept["seconds"]}
    seconds = times()
    write_json(path, {"origin": origin, "row": row, "seconds": seconds})
    return row | {"seconds": seconds}


def rows_of(cases: Iterable[Case], dtypes: Iterable[str]) -> list[tuple[Case, dict[str, Any]]]:
    """Every case, dtype and regime, and the row about it, without times."""
    return [
        (case, unmeasured(case, dtype, regime))
        for case in cases
        for dtype in dtypes
        for regime in case.regimes(getattr(torch, dtype))
    ]


# -- the command -------------------------------------------------------------------------------------------------------


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=[*KERNELS], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    parser.add_argument("--quick", action="store_true", help="the first shape of each kernel in each model; few rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="default: docs/images/kernels.png; with --out, kernels.png there")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/kernels", help="cells (default: %(default)s)")
    args = parser.parse_args(words)
    standard = args.out.resolve() == (ROOT / "benchmarks/results").resolve()
    args.plot = args.plot or (ROOT / "docs/images/kernels.png" if standard else args.out / "kernels.png")
    return args


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for."""
    cases = [case for case in CASES if case.kernel in args.kernels]
    if not args.quick:
        return cases
    first: dict[tuple[str, str, str], Case] = {}
    for case in cases:
        first.setdefault((case.kernel, case.model, case.what), case)
    return [*first.values()]


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Test, then measure everything that was asked for."""
    # Where dispatch leaves a shape to torch, its kernel is timed nevertheless.
    os.environ["FASTDIFF_KERNELS"] = "triton"
    settings = {"rounds": QUICK_ROUNDS if args.quick else ROUNDS, "calls": CALLS, "quick": args.quick}
    environment = describe_environment(device)
    origin = {"environment": environment, "settings": settings, "sources": sources()}
    passed = passing(args.kernels)
    rows = []
    for case, row in tqdm(rows_of(chosen(args), args.dtypes), desc="shapes, dtypes and regimes"):
        if case.kernel not in passed:
            rows.append(row | {"tests_passed": False})
            continue

        def times(case: Case = case, row: dict[str, Any] = row) -> dict[str, list[float]]:
            calls = contenders(case, getattr(torch, row["dtype"]), device)
            with torch.no_grad():
                return measure(calls, gpu_stopwatch(row["regime"], device), settings["rounds"])

        rows.append(cell(row | {"tests_passed": True}, origin, args.work, times))
    return {**origin, "rows": rows}


def write(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the results as JSON, the table beside it, and the plot where there is something to be seen."""
    write_json(args.out / "kernels.json", results)
    (args.out / "kernels.md").write_text(as_table(results) + "\n", encoding="utf-8")
    if any(row["seconds"] for row in results["rows"]):
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(results, args.plot)


def main(words: list[str] | None = None) -> None:
    """Test, measure, print, and write the results."""
    args = parse(words)
    if torch.cuda.is_available():
        results = run(args, torch.device("cuda", torch.cuda.current_device()))
        write(results, args)
        print(as_table(results))
        return
    path = args.out / "kernels.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["environment"] is not None:
        print(f"There is no NVIDIA GPU here. {path} stays as it was measured elsewhere.")
        return
    rows = [row for _, row in rows_of(chosen(args), args.dtypes)]
    write({"environment": None, "settings": None, "sources": None, "rows": rows}, args)
    print(f"There is no NVIDIA GPU here: nothing was measured, which {path} says of {len(rows)} rows.")


if __name__ == "__main__":
    main()
