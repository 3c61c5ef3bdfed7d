"""The benchmark of the kernels, as far as it needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kernel_report
import kernel_speed
import numpy as np
import pytest
import torch
from kernel_checks.listed import CASES, COLD, KERNELS, LAUNCH, WARM, Case

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
NAMES = [kernel_report.COPY, kernel_report.OURS, *kernel_report.OTHERS]
GEGLU = [case for case in CASES if case.kernel == "geglu"][:2]
ENVIRONMENT = {"processor": "p", "cpu_cores": 1, "torch_threads": 1, "device": "A GPU", "torch": "0", "diffusers": "0"}


def times(ours: float = 2.0, eager: float = 4.0) -> dict[str, list[float]]:
    """A copy that takes a microsecond, and the others; in the second of three rounds all take twice as long."""
    each = dict.fromkeys(NAMES, 5.0) | {kernel_report.COPY: 1.0, kernel_report.OURS: ours, "eager": eager}
    return {name: [1e-6 * factor * value for factor in (1, 2, 1)] for name, value in each.items()}


def made_up(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"environment": ENVIRONMENT, "settings": {"rounds": 3}, "sources": "0", "rows": list(rows)}


def row(case: Case = GEGLU[0], regime: str = COLD, **others: Any) -> dict[str, Any]:
    return kernel_report.unmeasured(case, "float16", regime) | {"tests_passed": True, "seconds": times()} | others


# -- what is listed and asked for --------------------------------------------------------------------------------------


def test_everything_is_measured_unless_something_is_asked_for() -> None:
    assert kernel_speed.chosen(kernel_speed.parse([])) == list(CASES)
    some = kernel_speed.chosen(kernel_speed.parse(["--kernels", "geglu", "lincomb"]))
    assert {case.kernel for case in some} == {"geglu", "lincomb"}
    quick = kernel_speed.chosen(kernel_speed.parse(["--quick"]))
    assert len(quick) < len(CASES) / 2
    assert {(case.kernel, case.model) for case in quick} == {(case.kernel, case.model) for case in CASES}
    with pytest.raises(SystemExit):
        kernel_speed.parse(["--kernels", "attention"])


def test_results_go_together(tmp_path: Path) -> None:
    assert kernel_speed.parse([]).plot.parts[-3:] == ("docs", "images", "kernels.png")
    assert kernel_speed.parse(["--out", str(tmp_path)]).plot == tmp_path / "kernels.png"


def test_every_kernel_is_measured_in_cold_and_bound_by_launches() -> None:
    rows = [row for _, row in kernel_speed.rows_of(CASES, ["bfloat16"])]
    for kernel in KERNELS:
        regimes = {row["regime"] for row in rows if row["kernel"] == kernel}
        # Of some kernels no listed shape fits into a cache.
        assert regimes - {WARM} == {COLD, LAUNCH}
    assert any(row["regime"] == WARM for row in rows)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_contenders_compute_the_same_and_the_copy_moves_as_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = GEGLU[0]
    calls = kernel_speed.contenders(case, torch.float32, "cpu", compiled=False)
    assert list(calls) == NAMES[:3]
    torch.testing.assert_close(calls[kernel_report.OURS](), calls["eager"]())
    assert 2 * calls[kernel_report.COPY]().numel() == case.moved(torch.float32)


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def stopwatch(call: Any) -> float:
        order.append(call())
        return float(len(order))

    seconds = kernel_speed.measure({name: lambda name=name: name for name in "abc"}, stopwatch, rounds=3)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == kernel_speed.WARM_UP + 3
    assert set(rounds) == {"abc", "bca", "cab"}
    assert all(len(set(part)) == 3 for part in rounds)
    first = 3 * kernel_speed.WARM_UP
    assert sorted(second for part in seconds.values() for second in part) == list(range(first + 1, first + 10))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Something like a GPU with two shapes to measure; grows with every measurement."""
    measured: list[str] = []
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    monkeypatch.setattr(kernel_speed, "CASES", GEGLU)
    monkeypatch.setattr(kernel_speed, "passing", set)
    monkeypatch.setattr(kernel_speed, "contenders", lambda case, *others: measured.append(str(case)))
    monkeypatch.setattr(kernel_speed, "gpu_stopwatch", lambda *others: None)
    monkeypatch.setattr(kernel_speed, "measure", lambda *others: times())
    return measured


def run(folder: Path, *words: str) -> dict[str, Any]:
    args = kernel_speed.parse(["--out", str(folder / "out"), "--work", str(folder / "work"), *words])
    results = kernel_speed.run(args, torch.device("cpu"))
    kernel_speed.write(results, args)
    return results


def test_an_interrupted_run_goes_on_where_it_stopped(
    machine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*others: Any) -> dict[str, list[float]]:
        if len(machine) == 2:
            raise KeyboardInterrupt
        return times()

    with monkeypatch.context() as patch:
        patch.setattr(kernel_speed, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    before = machine.copy()
    machine.clear()
    results = run(tmp_path)
    total = sum(len(case.regimes(torch.bfloat16)) for case in GEGLU)
    assert len(machine) == total - 1
    assert before[1] == machine[0]
    assert len(results["rows"]) == total
    assert all(row["seconds"] == times() for row in results["rows"])
    assert (tmp_path / "out/kernels.png").stat().st_size > 5000

    machine.clear()
    assert run(tmp_path) == results
    assert not machine
    # Other settings, or other kernels, are another measurement.
    run(tmp_path, "--quick")
    assert len(machine) == total
    machine.clear()
    monkeypatch.setattr(kernel_speed, "sources", lambda: "changed")
    run(tmp_path)
    assert len(machine) == total


def test_no_time_is_shown_of_a_kernel_whose_tests_did_not_pass(
    machine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)  # leaves cells on disk
    machine.clear()
    monkeypatch.setattr(kernel_speed, "passing", lambda kernels: set())
    results = run(tmp_path)
    assert not machine
    assert all(row["seconds"] is None and row["tests_passed"] is False for row in results["rows"])
    table = (tmp_path / "out/kernels.md").read_text()
    assert table.count(kernel_report.TESTS_FAILED) == 5 * len(results["rows"])
    assert "×" not in table.replace("×x", "")
    assert not kernel_report.shown(row(tests_passed=False))
    assert not kernel_report.slower(made_up(row(tests_passed=False, seconds=times(ours=9.0))))


TEST_FILE = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["good", "bad", "half"])
def test_one(kernel):
    assert kernel != "bad"

@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["half", "skipped"])
def test_two(kernel):
    if kernel == "skipped":
        pytest.skip("no device")
    raise AssertionError

@pytest.mark.gpu
def test_of_all():
    assert {shared}

def test_of_no_gpu():
    raise AssertionError
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEST_FILE.format(shared=True), {"good"}),
        (TEST_FILE.format(shared=False), set()),
        ("import nothing_of_that_name", set()),
        ("", set()),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
def test_a_kernel_passes_if_its_tests_ran_and_none_failed(text: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / f"test_{abs(hash(text))}.py").write_text(text)
    assert kernel_speed.passing(["good", "bad", "half", "skipped", "unknown"], tmp_path) == expected


# -- the table ---------------------------------------------------------------------------------------------------------


def test_table_of_made_up_measurements() -> None:
    results = made_up(row(), row(GEGLU[1], WARM, seconds=times(ours=5.0)))
    table = kernel_report.as_table(results)
    first, second = (line for line in table.splitlines() if "| float16 |" in line)
    assert "| 2 (2–3) | 0.50 (0.50–0.50) | 2.00× (2.00–2.00) | 2.50× (2.50–2.50) | 2.50×" in first
    assert f"| {WARM} |" in second
    assert "| 5 (5–7.5) | 0.20 (0.20–0.20) | 0.80× (0.80–0.80) | 1.00×" in second
    assert "A GPU" in table
    assert kernel_report.slower(results) == results["rows"][1:]
    _, _, excluded = table.partition("## Slower than eager")
    assert GEGLU[1].shape in excluded
    assert GEGLU[0].shape not in excluded
    assert "None of the measured shapes" in kernel_report.as_table(made_up(row()))


def test_ratios_are_of_pairs() -> None:
    seconds = times() | {"eager": [4e-6, 1e-6, 40e-6], kernel_report.OURS: [1e-6, 2e-6, 4e-6]}
    found = kernel_report.ratio(row(seconds=seconds), "eager")
    assert found.median == pytest.approx(np.median([4, 0.5, 10]))


# -- without a GPU -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_table_says_that_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--kernels", "geglu", "--out", str(tmp_path)]
    kernel_speed.main(words)
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert results["rows"]
    assert all(row["kernel"] == "geglu" and row["seconds"] is None for row in results["rows"])
    table = (tmp_path / "kernels.md").read_text()
    assert table.count(kernel_report.NOT_MEASURED) == 5 * len(results["rows"])
    assert not (tmp_path / "kernels.png").exists()
    assert "no NVIDIA GPU" in capsys.readouterr().out

    # What was measured elsewhere is not lost.
    (tmp_path / "kernels.json").write_text(json.dumps(made_up(row())))
    (tmp_path / "kernels.md").write_text("measured")
    kernel_speed.main(words)
    assert json.loads((tmp_path / "kernels.json").read_text()) == made_up(row())
    assert (tmp_path / "kernels.md").read_text() == "measured"
    assert "stays as it was measured" in capsys.readouterr().out


def test_the_committed_table_is_written_by_the_script() -> None:
    committed = json.loads((RESULTS / "kernels.json").read_text())
    assert (RESULTS / "kernels.md").read_text() == kernel_report.as_table(committed) + "\n"
    expected = [row for _, row in kernel_speed.rows_of(CASES, sorted({row["dtype"] for row in committed["rows"]}))]
    identity = [
        [{key: row[key] for key in row if key not in ("tests_passed", "seconds")} for row in rows]
        for rows in (committed["rows"], expected)
    ]
    assert identity[0] == identity[1]
