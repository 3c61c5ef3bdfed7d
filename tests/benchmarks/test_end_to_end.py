"""The benchmark of whole denoisers, as far as it needs no accelerator."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import end_to_end
import end_to_end_loop
import end_to_end_report
import pytest
import torch
from architectures.denoisers import PUBLISHED, Denoiser, counted
from end_to_end import Cell
from end_to_end_loop import Sampling, did, make

from fastdiff.backbones import view
from fastdiff.cost import flop_counter
from fastdiff.engine import graphs
from fastdiff.errors import StateError
from tiny.tape import TapeRecorder

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
TRY = ("--small", "--device", "cpu", "--backend", "eager", "--dtype", "float32", "--steps", "2", "--rounds", "1")
DIT, FLUX, SD = "dit-xl-2-256", "flux.1-dev", "sd-1.5"
WEIGHTS = {
    "pixart-sigma-1024": 610_856_096,
    SD: 859_520_964,
    "sdxl-1.0": 2_567_463_684,
    "sd3-medium": 2_028_328_000,
    FLUX: 11_901_408_320,
}
ENVIRONMENT = {"processor": "p", "cpu_cores": 1, "torch_threads": 1, "device": "A GPU", "torch": "0", "diffusers": "0"}
TIMES = {
    "seconds": [2.0, 4.0, 2.0],
    "speedup": {"median": 1.5, "low": 1.25, "high": 1.75, "pairs": 3},
    "cold_start": 3.0,
    "peak_bytes": 5 * 2**30,
    "computed_share": 0.5,
    "notes": [],
}


def run(out: Path, *words: str) -> dict[str, Any]:
    end_to_end.main([*words, "--out", str(out)])
    return json.loads(out.read_text())


def identities(rows: list[dict[str, Any]]) -> list[Cell]:
    return [Cell.of(row) for row in rows]


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes of everything where there is no accelerator."""
    out = tmp_path_factory.mktemp("unmeasured") / "end_to_end.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        end_to_end.main(["--out", str(out)])
    return out


# -- without an accelerator --------------------------------------------------------------------------------------------


def test_every_combination_has_a_row_that_says_it_was_not_measured(unmeasured: Path) -> None:
    results = json.loads(unmeasured.read_text())
    assert identities(results["rows"]) == [*end_to_end.cells(end_to_end.parse([]))]
    assert not any(row["measured"] or row["failed"] for row in results["rows"])
    refused = [row for row in results["rows"] if row["refused"]]
    assert {(row["model"], row["plan"]) for row in refused} == {(SD, "half"), ("sdxl-1.0", "half")}
    table = unmeasured.with_suffix(".md").read_text()
    assert table.count(f"| {end_to_end_report.NOT_MEASURED} |") == len(results["rows"]) - len(refused)
    assert table.count(f"| {end_to_end_report.REFUSED} |") == len(refused)
    assert table.count("no exit head can read the hidden state") == 2
    assert not unmeasured.with_suffix(".png").exists()


def test_models_are_the_published_ones(unmeasured: Path) -> None:
    models = json.loads(unmeasured.read_text())["models"]
    found = {key: about["parameters"] for key, about in models.items()}
    # diffusers has the embedding of timestep and class in every block, where the published DiT has it once.
    denoiser, _, _ = counted(DIT)
    embedding = sum(weight.numel() for weight in denoiser.module.transformer_blocks[0].norm1.emb.parameters())
    positions = denoiser.module.pos_embed.pos_embed.numel()
    assert found.pop(DIT) - 27 * embedding + positions == 675_129_632
    assert found == WEIGHTS
    images = {Cell.of(row).model: row["images"] for row in json.loads(unmeasured.read_text())["rows"]}
    assert images == {DIT: 32, "pixart-sigma-1024": 8, SD: 8, "sdxl-1.0": 4, "sd3-medium": 4, FLUX: 2}


def test_shares_of_macs(unmeasured: Path) -> None:
    for row in json.loads(unmeasured.read_text())["rows"]:
        share = row["macs_share"]
        if row["plan"] == "full":
            assert share == 1
        elif row["plan"] in ("half", "uncertainty") and not row["refused"]:
            assert 0.46 < share < 0.54
        elif row["plan"] in ("sequential", "parallel"):
            # Four of five evaluations leave out the encoder, which takes 32.5 % and 43.4 %.
            assert share == pytest.approx(1 - 0.8 * {SD: 0.325, "sdxl-1.0": 0.434}[row["model"]], abs=0.003)


def test_the_committed_files_are_written_by_the_script(unmeasured: Path) -> None:
    committed = json.loads((RESULTS / "end_to_end.json").read_text())
    assert (RESULTS / "end_to_end.md").read_text() == end_to_end_report.as_table(committed) + "\n"
    written = json.loads(unmeasured.read_text())
    if committed["environment"] is None:
        assert committed == written
    assert identities(committed["rows"]) == identities(written["rows"])
    assert committed["models"] == written["models"]


def test_what_was_measured_elsewhere_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "end_to_end.json"
    out.write_text(json.dumps({"environment": ENVIRONMENT}))  # all that is looked at
    assert run(out) == {"environment": ENVIRONMENT}
    assert not out.with_suffix(".md").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    standard = end_to_end.parse(["--out", str(RESULTS / "end_to_end.json")])
    assert standard.plot.parts[-3:] == ("docs", "images", "end_to_end.png")
    assert end_to_end.parse(["--out", str(tmp_path / "a.json")]).plot == tmp_path / "a.png"
    for words in (["--device", "cpu"], ["--steps", "0"], ["--models", "gan"]):
        with pytest.raises(SystemExit):
            end_to_end.parse(words)
    assert "on a CPU there is --small only" in capsys.readouterr().err


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_small_models_are_measured_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tried.json"
    monkeypatch.setattr(end_to_end, "sources", lambda: "some code")
    words = (*TRY, "--models", FLUX, DIT, "--batches", "one")
    run(out, *words, "--builds", "eager", "graphs")
    compiled = ("--builds", "compile-kernels", "--plans", "half")
    results = run(out, *TRY, "--models", DIT, "--batches", "one", *compiled)

    expected = [
        Cell(model, 1, build, plan)
        for model in (DIT, FLUX)
        for build in ("eager", "compile-kernels", "graphs")
        for plan in ("full", "half", "uncertainty")
        if build != "compile-kernels" or (model, plan) == (DIT, "half")
    ]
    assert identities(results["rows"]) == expected
    for row in results["rows"]:
        times = row["measured"]
        assert times["cold_start"] > 0
        assert len(times["seconds"]) == times["speedup"]["pairs"] == 1
        assert times["computed_share"] == (1.0 if row["plan"] == "full" else 0.5)
        assert any("without a CUDA graph" in note for note in times["notes"]) == (row["build"] == "graphs")
        assert row["build"] != "compile-kernels" or times["cold_start"] > 0.3  # a compiler takes its time
    table = out.with_suffix(".md").read_text()
    assert sum(line.startswith("| 1 |") for line in table.splitlines()) == len(expected)
    assert results["environment"]["processor"] in table
    assert f"| {end_to_end_report.NOT_MEASURED} |" not in table
    assert out.with_suffix(".png").stat().st_size > 10_000

    # Known rows stay as they are; another setting, or other code, begins anew.
    measured: list[Cell] = []
    monkeypatch.setattr(end_to_end, "measured", lambda cell, *others: measured.append(cell) or TIMES)
    assert run(out, *words, "--builds", "eager", "graphs") == results
    assert not measured
    monkeypatch.setattr(end_to_end, "sources", lambda: "other code")
    other = run(out, *words, "--builds", "eager")["rows"]
    assert identities(other) == expected
    assert {Cell.of(row) for row in other if row["measured"]} == set(measured)
    assert len(measured) == 6
    run(out, *words, "--builds", "eager", "--rounds", "2")
    assert len(measured) == 12


def test_results_hold_for_the_code_that_was_measured() -> None:
    files = {path.as_posix() for path in end_to_end.measured_files()}
    for name in (
        "engine/exits.py",
        "kernels/launch.py",
        "uem/modules.py",
        "end_to_end.py",
        "end_to_end_loop.py",
        f"{FLUX}.json",
    ):
        assert any(path.endswith(f"/{name}") for path in files)


def test_interrupted_refused_and_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tried.json"
    monkeypatch.setattr(end_to_end, "sources", lambda: "some code")
    words = (*TRY, "--models", DIT, "--batches", "one", "--builds", "eager", "kernels")
    answers: list[Any] = [
        TIMES,
        StateError("not like this"),
        RuntimeError("out of memory\nsee above"),
        KeyboardInterrupt,
    ]
    calls: list[Cell] = []

    def measured(cell: Cell, *others: Any) -> dict[str, Any]:
        calls.append(cell)
        answer = answers[len(calls) - 1] if len(calls) <= len(answers) else TIMES
        if answer is TIMES:
            return TIMES
        raise answer

    monkeypatch.setattr(end_to_end, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        run(out, *words)
    rows = json.loads(out.read_text())["rows"]
    assert [bool(row["measured"]) for row in rows] == [True] + [False] * 5
    assert (rows[1]["refused"], rows[2]["failed"]) == ("not like this", "RuntimeError: out of memory")
    table = out.with_suffix(".md").read_text()
    assert "- depth share 0.5, eager: refused: not like this" in table
    assert "- uncertainty exit, eager: failed: RuntimeError: out of memory" in table

    again = run(out, *words)["rows"]
    assert calls[4:] == identities(rows)[2:]  # what failed is tried again, what was refused is not
    assert [row["failed"] for row in again] == [None] * 6
    assert again[1] == rows[1]


@pytest.mark.parametrize("key", [*PUBLISHED])
def test_builds_share_weights_and_leave_the_plain_model_alone(key: str) -> None:
    denoiser = Denoiser(key, small=True)
    twin = denoiser.twin()
    pairs = zip(denoiser.module.parameters(), twin.parameters(), strict=True)
    assert all(one is two for one, two in pairs)
    make(twin, end_to_end.BUILDS["compile-kernels"], "eager")
    assert all(getattr(module, "_compiled_call_impl", None) is None for module in denoiser.module.modules())
    assert not any("forward" in vars(module) for module in denoiser.module.modules())
    assert any(module._compiled_call_impl is not None for module in twin.modules())
    plain = predictions(denoiser, denoiser.module)
    kernels = denoiser.twin()
    make(kernels, end_to_end.BUILDS["kernels"], "eager")
    assert all(map(torch.equal, plain, predictions(denoiser, kernels)))
    assert len(plain) == 2


def test_blocks_of_the_dit_embed_alike() -> None:
    """As in converted checkpoints, where the optimised model embeds once."""
    states = [block.norm1.emb.state_dict() for block in Denoiser(DIT, small=True).module.transformer_blocks]
    assert len(states) > 1
    for state in states[1:]:
        assert all(torch.equal(state[name], weight) for name, weight in states[0].items())


def predictions(denoiser: Denoiser, module: Any) -> list[torch.Tensor]:
    """Returns what each evaluation of a loop predicted."""
    torch.manual_seed(0)
    sampling = Sampling(denoiser, module, 1, 2)
    predicted: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda *call: predicted.append(call[2][0]))
    sampling()
    handle.remove()
    return predicted


@pytest.mark.parametrize(("key", "plan"), [(DIT, "half"), (FLUX, "half"), (SD, "sequential")])
def test_counted_shares_are_what_a_loop_spends(key: str, plan: str) -> None:
    denoiser, backbone, costs = counted(key, small=True)
    share = end_to_end.macs_share(plan, denoiser, backbone, costs, steps=6)
    spent = []
    denoiser = Denoiser(key, small=True)
    for method in (None, end_to_end.method_of(plan, view(denoiser.module), end_to_end._no_modules)):
        with flop_counter() as counter:
            Sampling(denoiser, denoiser.module, 1, 6, method)()
        spent.append(counter.get_total_flops())
    assert spent[1] / spent[0] == pytest.approx(share, rel=0.01)


def test_decoders_of_several_evaluations_are_one_batch() -> None:
    denoiser = Denoiser(SD, small=True)
    method = end_to_end.method_of("parallel", view(denoiser.module), end_to_end._no_modules)
    record = Sampling(denoiser, denoiser.module, 1, 6, method)()
    assert record.batches == [4]
    assert did(record)["notes"] == []


def test_recorded_evaluations_are_replayed_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DeviceRecorder", TapeRecorder)
    monkeypatch.setattr(end_to_end_loop, "Graphs", lambda: graphs.Graphs(("cpu",)))
    denoiser = Denoiser(DIT, small=True)
    sampling = Sampling(denoiser, denoiser.twin(), 1, 3, graphs=True)
    records = [sampling() for _ in range(end_to_end.WARM_UP + 1)]
    assert [record.graphs for record in records] == [1, 0, 0]
    assert records[-1].replays == len(records[-1].calls) == 3


# -- the table ---------------------------------------------------------------------------------------------------------


def test_table_of_made_up_measurements(unmeasured: Path, tmp_path: Path) -> None:
    results = json.loads(unmeasured.read_text()) | {"environment": ENVIRONMENT}
    for row in results["rows"]:
        row["measured"] = None if row["refused"] else copy.deepcopy(TIMES)
    half = next(row for row in results["rows"] if Cell.of(row) == Cell(DIT, 32, "kernels", "half"))
    half["macs_share"] = 0.4
    assert end_to_end_report.realised(half) == pytest.approx(0.6)
    table = end_to_end_report.as_table(results)
    assert "| 32 | kernels | depth share 0.5 | 16 | 5.00 | 3.00 | 1.50× (1.25–1.75) | 2.50× | 0.60 |" in table
    assert "A GPU" in table
    end_to_end_report.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 50_000
    assert asdict(Cell.of(half)) == {"model": DIT, "images": 32, "build": "kernels", "plan": "half"}
