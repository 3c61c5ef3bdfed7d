"""The demo from end to end on tiny random models: its files agree with each other and with the library."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastdiff
from fastdiff.cli.comparison import Row, mark_beaten
from fastdiff.cli.contenders import Contender, contenders, fewer_steps
from fastdiff.cli.main import main
from fastdiff.cli.sampler import Ran
from fastdiff.eval import Ratio
from fastdiff.eval.glyphs import GlyphJudge, Score
from fastdiff.plan import Action, ComputePlan
from fastdiff.zoo.data import render_many, to_tensor
from fastdiff.zoo.reader import GlyphReader

from .conftest import Command

STEPS, SAMPLES, BATCH = 12, 8, 4


@pytest.fixture(scope="module")
def out(tiny_dit: Path, tiny_finetuned: Path, tiny_reader: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of the demo wrote."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    models = ["--model", tiny_dit, "--finetuned", tiny_finetuned, "--reader", tiny_reader]
    # 7 samples are rounded up to two batches.
    sizes = ["--samples", SAMPLES - 1, "--batch", BATCH, "--steps", STEPS, "--renders", 40, "--seed", 3]
    assert main([str(word) for word in ["demo", *models, *sizes, "--out", folder]]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in results["rows"]}


def test_all_files_are_there_and_nothing_else(out: Path, rows: dict[str, Any]) -> None:
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    plans = {f"plans/{key}.{kind}" for key in rows for kind in ("json", "png")}
    named = {"report.html", "results.json", "results.csv", "results.md", "samples.png", "trade-off.png"}
    assert files == plans | named
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_all_contenders_have_a_row_in_every_table(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == [contender.key for contender in contenders(STEPS, finetuned=True, unet=False)]
    lines = list(csv.DictReader((out / "results.csv").open()))
    markdown = [line for line in (out / "results.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [line["key"] for line in lines] == list(rows)
    assert len(markdown) == len(rows)
    for line, row in zip(lines, rows.values(), strict=True):
        assert float(line["speedup"]) == row["speedup"]["median"]
        assert float(line["macs_share"]) == row["macs_share"]
        assert float(line["fid"]) == row["fid"]


def test_full_rows_are_compared_with_themselves(rows: dict[str, dict[str, Any]], out: Path) -> None:
    for key in ("full", "finetuned-full"):
        assert rows[key]["speedup"]["median"] == rows[key]["speedup"]["high"] == 1
        assert rows[key]["speedup_single"]["median"] == rows[key]["macs_share"] == 1
        assert rows[key]["psnr"] is None
        assert rows[key]["fid_change"] == {"value": 0, "error": 0}
    assert {line["key"]: line["psnr"] for line in csv.DictReader((out / "results.csv").open())}["full"] == "inf"
    assert all(math.isfinite(row["psnr"]) for key, row in rows.items() if not key.endswith("full"))


def test_ratios_follow_from_the_times(results: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    for row in rows.values():
        baseline = rows[row["baseline"]]
        ratios = [slow / fast for slow, fast in zip(baseline["seconds"], row["seconds"], strict=True)]
        assert len(ratios) == row["speedup"]["pairs"] == math.ceil(SAMPLES / BATCH)
        assert row["speedup"]["median"] == pytest.approx(np.median(ratios))
    timed = sum(sum(row["seconds"]) + sum(row["seconds_single"]) for row in rows.values())
    assert timed <= results["sampling_seconds"]


def test_macs_share_is_what_the_plan_costs(tiny_dit: Path, out: Path, rows: dict[str, dict[str, Any]]) -> None:
    from diffusers import DiTPipeline

    pipe = fastdiff.enable(DiTPipeline.from_pretrained(tiny_dit), fastdiff.ExitSchedule("full"))
    pipe([0] * BATCH, num_inference_steps=1, output_type="np")
    costs = pipe.fastdiff.last_run.denoisers["transformer"].measure()
    for key, row in rows.items():
        cost = ComputePlan.load(out / f"plans/{key}.json").cost(costs)
        assert cost.macs is not None
        assert row["macs_per_image"] == pytest.approx(cost.macs / BATCH)
        assert row["macs_share"] == pytest.approx(cost.macs / BATCH / rows[row["baseline"]]["macs_per_image"])
        steps = row["num_inference_steps"]
        assert row["macs_share"] == pytest.approx(cost.macs_share * steps / STEPS)


def test_plans_are_those_of_the_methods(tiny_dit: Path, out: Path) -> None:
    pipe = fastdiff.FastDiffPipeline.from_pretrained(tiny_dit, preset="off")
    for contender in contenders(STEPS, finetuned=True, unet=False):
        plan = ComputePlan.load(out / f"plans/{contender.key}.json")
        assert plan.evaluations == contender.steps
        if contender.methods:
            fastdiff.enable(pipe, contender.methods)
            np.testing.assert_array_equal(plan.table, pipe.fastdiff.plan(contender.steps).table)
        else:
            assert (plan.table == Action.COMPUTE).all()


@pytest.mark.parametrize("key", ["full", "preset-balanced", "layer-skipping", "finetuned-exit", "steps-6"])
def test_the_recorded_command_samples_the_judged_images_again(
    key: str, rows: dict[str, dict[str, Any]], tiny_reader: Path, command: Command, tmp_path: Path
) -> None:
    text = re.sub(r"\$\(seq 0 35\)", " ".join(map(str, range(36))), rows[key]["command"])
    _, *words = shlex.split(text)
    words[-1] = str(tmp_path)
    assert command(*words)[0] == 0
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))])
    score = GlyphJudge(GlyphReader.from_pretrained(tiny_reader), renders=40).score(images, np.arange(SAMPLES) % 36)
    assert score.fid == pytest.approx(rows[key]["fid"], rel=1e-6)
    assert score.correct == rows[key]["correct"]
    assert [score.read_low, score.read_high] == rows[key]["read_interval"]
    assert list(score.fid_interval) == pytest.approx(rows[key]["fid_interval"], rel=1e-6)


def test_where_the_numbers_come_from_is_recorded(results: dict[str, Any]) -> None:
    assert results["settings"]["samples"] == SAMPLES
    assert results["settings"]["samples_asked_for"] == SAMPLES - 1
    assert results["seeds"] == [3, 3 + SAMPLES - 1]
    assert results["environment"]["fastdiff"] == fastdiff.__version__
    assert results["environment"]["processor"]
    assert results["renders"]["samples"] == SAMPLES
    assert results["same_work_ratio"]["pairs"] == math.ceil(SAMPLES / BATCH)


# -- the report --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page refers to, and checks that tags are balanced."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.resources += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_report_needs_nothing_else(out: Path) -> None:
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.resources
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_report_shows_every_row_and_number(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    shown = " ".join("".join(Page((out / "report.html").read_text()).text).split())
    for row in rows.values():
        assert row["label"] in shown
        assert f"{row['speedup']['median']:.2f}×" in shown
        assert f"{100 * row['macs_share']:.1f} %" in shown
        assert row["command"] in shown


def test_report_escapes_what_it_is_given(tiny_dit: Path, tiny_reader: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a<b>&c"
    odd.symlink_to(tiny_dit)
    words = ["--model", odd, "--reader", tiny_reader, "--samples", 2, "--batch", 2, "--steps", 9, "--renders", 4]
    assert main([str(word) for word in ["demo", *words, "--out", tmp_path / "out"]]) == 0
    page = Page((tmp_path / "out/report.html").read_text())
    assert any("a<b>&c" in text for text in page.text)
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert not any(row["group"] == "Fine-tuned copy" for row in rows)


# -- interruption ------------------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_no_half_written_files(
    tiny_dit: Path, tiny_reader: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    # After sampling and after most files were written.
    monkeypatch.setattr("fastdiff.cli.report.render", interrupted)
    words = ["--model", tiny_dit, "--reader", tiny_reader, "--samples", 2, "--batch", 2, "--steps", 9, "--renders", 4]
    status, _, complaint = command("demo", *words, "--out", tmp_path / "out")
    assert status == 130
    assert "interrupted" in complaint
    assert not list(tmp_path.iterdir())


# -- what it compares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "fewer"), [(50, [25, 17, 12]), (12, [6, 4, 3]), (2, [1]), (3, [2, 1])])
def test_fewer_steps(steps: int, fewer: list[int]) -> None:
    assert fewer_steps(steps) == fewer


@pytest.mark.parametrize("unet", [False, True])
def test_contenders_have_their_own_keys_and_a_baseline(unet: bool) -> None:
    field = {contender.key: contender for contender in contenders(50, finetuned=True, unet=unet)}
    assert len(field) == len(contenders(50, finetuned=True, unet=unet))
    for contender in field.values():
        baseline = field[contender.baseline]
        assert not baseline.methods
        assert baseline.finetuned == contender.finetuned
        assert baseline.steps == 50


def make_row(key: str, speedup: float, fid: float, correct: int, methods: tuple[Any, ...] = ()) -> Row:
    contender = Contender(key, key, "group", 50, methods)
    score = Score(100, fid, np.zeros(2), correct, 0, 1)
    ran = Ran(ComputePlan.full(1, ["block"]), 1.0)
    ratio = Ratio(speedup, speedup, speedup, 1)
    return Row(contender, np.zeros(0), [], [], ran, 1.0, score, 30.0, ratio, ratio)


@pytest.mark.parametrize(
    ("speedup", "fid", "correct", "beaten"),
    [(2.0, 10.0, 90, True), (2.0, 11.0, 89, True), (2.1, 10.0, 90, False), (2.0, 9.0, 90, False), (2, 10, 91, False)],
)
def test_a_method_is_beaten_by_fewer_steps_that_are_as_fast_and_as_good(
    speedup: float, fid: float, correct: int, beaten: bool
) -> None:
    method = make_row("method", speedup, fid, correct, (fastdiff.LayerSkipping(),))
    plain = make_row("steps-25", 2.0, 10.0, 90)
    mark_beaten([make_row("full", 1.0, 10.0, 90), method, plain])
    assert method.beaten_by == (["steps-25"] if beaten else [])
    assert plain.beaten_by == []


def test_the_judge_tells_renders_from_blank_images(tiny_reader: Path) -> None:
    judge = GlyphJudge(GlyphReader.from_pretrained(tiny_reader), renders=200)
    images, labels = render_many(judge.seed, 0, 200)
    assert judge.score(images, labels[:, 0]).fid == pytest.approx(0, abs=1e-6)
    blank = np.zeros((60, 32, 32, 3), dtype=np.uint8)
    assert judge.score_renders(60).fid < 0.5 * judge.score(blank, np.zeros(60)).fid


def test_the_judge_counts_what_its_reader_reads(tiny_reader: Path) -> None:
    reader = GlyphReader.from_pretrained(tiny_reader)
    images, _ = render_many(0, 0, 30)
    read = reader.read(to_tensor(images)).numpy()
    asked = np.where(np.arange(30) < 20, read, (read + 1) % 36)
    score = GlyphJudge(reader, renders=4).score(images, asked)
    assert (score.correct, score.samples, score.read_share) == (20, 30, pytest.approx(2 / 3))
