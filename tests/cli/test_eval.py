"""``fastdiff eval`` from end to end on tiny random models, its files, its errors and what interrupts it.

Some of it runs in processes of its own, to be killed or started by a launcher.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastdiff
from fastdiff.cli.main import main
from fastdiff.eval.evaluation import SWEEPS, Evaluation
from fastdiff.eval.sampling import BadImageError
from fastdiff.eval.store import Store

from .conftest import Command

STEPS, SAMPLES, BATCH, ROUNDS = 6, 6, 3, 3
SIZES = ["--num-inference-steps", STEPS, "--num-samples", SAMPLES, "--batch-size", BATCH, "--renders", 20]
METHODS = ["--method", "exit-schedule:d-min=1..2", "--method", "tuned@layer-skipping:speedup=2"]
PEERS = ["--baseline", "first-block-cache:threshold=0.3", "--baseline", "deepcache"]
SEEDS = (0, 100)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Features of references are kept here, not in the user's folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def run_eval(*arguments: object) -> int:
    return main(["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def line(tiny_dit: Path, tiny_finetuned: Path, tiny_reader: Path) -> list[object]:
    """The command, but for the folder that it fills."""
    models = [tiny_dit, "--copy", f"tuned={tiny_finetuned}", "--reader", tiny_reader]
    return [*models, *METHODS, *PEERS, *SIZES, "--seeds", *SEEDS, "--rounds", ROUNDS, "--timing-batch", 2]


@pytest.fixture(scope="module")
def out(line: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of the command wrote."""
    folder = tmp_path_factory.mktemp("eval") / "out"
    assert run_eval(*line, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found: dict[str, Any] = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    return found


@pytest.fixture(scope="module")
def points(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {point["key"]: point for point in results["points"]}


# -- the whole of it ---------------------------------------------------------------------------------------------------


def test_every_way_has_a_row(points: dict[str, dict[str, Any]]) -> None:
    kinds = [point["kind"] for point in points.values()]
    labels = {point["label"]: point for point in points.values() if point["model"] == "main"}
    assert kinds == sorted(kinds, key=["baseline", "fastdiff", "peer", "steps"].index)
    assert {"exit-schedule d-min=1", "exit-schedule d-min=2", "first-block-cache threshold=0.3"} <= set(labels)
    assert {f"{steps} step{'s' * (steps > 1)}" for steps in (STEPS, 3, 2)} <= set(labels)
    assert [p["spec"] for p in points.values() if p["model"] == "tuned"][1].endswith("layer-skipping")
    unable = [point for point in points.values() if point["error"]]
    assert [(point["label"], point["quality"]) for point in unable] == [("deepcache", {})]
    assert unable[0]["error"]["kind"] == "PeerUnavailableError"


def test_every_row_was_timed_judged_and_compared(points: dict[str, dict[str, Any]]) -> None:
    for point in points.values():
        if point["error"]:
            continue
        assert {"fid", "kid", "read", "psnr", "ssim", "latent_error"} <= set(point["quality"])
        assert all(told["sets"] == len(SEEDS) for told in point["quality"].values())
        assert sorted(point["timings"]) == ["1", "2"]
        assert point["timings"]["2"]["speedup"]["pairs"] >= ROUNDS
        assert 0 < point["macs_share"] <= 1.01
        if point["kind"] in ("fastdiff", "peer"):
            match = points[point["same_time"]]
            assert match["model"] == point["model"]
            assert match["kind"] in ("steps", "baseline")
            assert point["verdict"] in ("better", "worse", "mixed", "level")
            ours, other = point["quality"]["fid"]["value"], match["quality"]["fid"]["value"]
            assert point["changes_to_same_time"]["fid"]["value"] == pytest.approx(ours - other)


def test_a_copy_is_compared_with_itself(points: dict[str, dict[str, Any]]) -> None:
    full, skipping, *_ = (point for point in points.values() if point["model"] == "tuned")
    assert full["key"] == skipping["baseline"] == f"tuned+steps-{STEPS}"
    assert full["quality"]["psnr"]["value"] == 100
    assert full["quality"]["fid"] != points[f"steps-{STEPS}"]["quality"]["fid"]
    assert skipping["timings"]["2"]["speedup"]["pairs"] == ROUNDS


def test_plain_sampling_in_the_same_time_is_that_of_the_copy(
    tiny_dit: Path, tiny_finetuned: Path, tiny_reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdiff.eval.sweep.steps_in_time", lambda *_: 4)
    models = [tiny_dit, "--copy", f"tuned={tiny_finetuned}", "--reader", tiny_reader, *METHODS[2:]]
    timing = ["--rounds", 1, "--timing-batch", 1, "--seeds", *SEEDS]
    assert run_eval(*models, *SIZES, *timing, "--out", tmp_path) == 0
    found = {point["key"]: point for point in json.loads((tmp_path / "results.json").read_text())["points"]}
    (skipping,) = (point for point in found.values() if point["kind"] == "fastdiff")
    assert skipping["same_time"] == "tuned+steps-4"
    assert found["tuned+steps-4"]["quality"]["fid"]["sets"] == 2
    assert skipping["verdict"]
    assert "steps-4" not in found


def test_sets_of_seeds_are_pooled(out: Path, points: dict[str, dict[str, Any]]) -> None:
    for key in ("steps-3", next(key for key in points if "exit-schedule" in key)):
        sets = [Store(out / SWEEPS / f"seed-{seed}").quality(key) or {} for seed in SEEDS]
        assert points[key]["quality"]["fid"]["value"] == pytest.approx(np.mean([one["fid"]["value"] for one in sets]))
        assert sets[0]["psnr"]["values"] != sets[1]["psnr"]["values"]
    timed = {seed: Store(out / SWEEPS / f"seed-{seed}").timed_batches for seed in SEEDS}
    assert timed == {0: [1, 2], 100: []}


def test_the_files_agree(out: Path, points: dict[str, dict[str, Any]]) -> None:
    files = {path.name for path in out.iterdir()}
    assert {"report.html", "results.json", "results.csv", "results.md", "samples.png", "plans", SWEEPS} <= files
    assert {"trade-off-fid.svg", "trade-off-fid.png", "trade-off-read.png", "trade-off-psnr.svg"} <= files
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert [line["key"] for line in lines] == list(points)
    for line, point in zip(lines, points.values(), strict=True):
        if not point["error"]:
            assert float(line["fid"]) == point["quality"]["fid"]["value"]
            assert float(line["speedup_at_2"]) == point["timings"]["2"]["speedup"]["median"]
    page = (out / "report.html").read_text()
    for point in points.values():
        assert f"{point['quality']['psnr']['value']:.1f}" in page if point["kind"] == "steps" else True
    planned = {path.stem for path in (out / "plans").glob("*.json")}
    assert planned == {key for key, point in points.items() if point["kind"] == "fastdiff"}


def test_where_the_numbers_come_from_is_recorded(results: dict[str, Any], line: list[object]) -> None:
    assert results["schema_version"] == 1
    assert results["seeds"] == list(SEEDS)
    assert results["environment"]["fastdiff"] == fastdiff.__version__
    assert {"torch", "diffusers", "processor"} <= set(results["environment"])
    assert {"DeepCache", "tomesd", "torchmetrics", "clean-fid"} <= set(results["packages"])
    assert results["options"]["methods"] == METHODS[1::2]
    assert (results["options"]["batch_size"], results["options"]["rounds"]) == (BATCH, ROUNDS)
    assert results["judged"]["features"].startswith("glyphs-cnn@")
    assert results["judged"]["reference_samples"] == 20
    assert results["floor"]["fid"]["value"] > 0
    assert results["command"].startswith("fastdiff eval ")


def test_nothing_tells_where_the_user_keeps_things(results: dict[str, Any], line: list[object]) -> None:
    told = {name: value for name, value in results.items() if name != "command"}
    text = json.dumps(told)
    for given in map(str, line):  # models are told as they were typed
        text = text.replace(given, "").replace(given.partition("=")[2] or given, "")
    assert str(Path(fastdiff.__file__).parent.parent) not in text
    assert str(Path.home()) not in text
    assert sys.prefix not in text


def test_the_same_command_again_measures_nothing(out: Path, line: list[object], capsys: Any) -> None:
    def ages() -> dict[str, int]:
        measured = [path for kind in ("*.npz", "quality.json", "timing/*") for path in (out / SWEEPS).rglob(kind)]
        return {str(path): path.stat().st_mtime_ns for path in measured}

    before, report = ages(), (out / "results.json").read_bytes()
    assert run_eval(*line, "--out", out) == 0
    assert ages() == before
    assert (out / "results.json").read_bytes() == report
    assert capsys.readouterr().out.startswith("|  | speedup, 2 at a time |")


def test_fewer_ways_are_reported_alone(out: Path, line: list[object]) -> None:
    # Into the same folder, whose other ways are kept for later.
    few = [word for word in line if word not in (*METHODS, *PEERS)]
    before = (out / "results.json").read_bytes()
    try:
        assert run_eval(*few, "--out", out) == 0
        found = json.loads((out / "results.json").read_text())["points"]
        assert {point["key"] for point in found} == {"steps-6", "steps-3", "steps-2"}
    finally:
        assert run_eval(*line, "--out", out) == 0
    assert json.loads((out / "results.json").read_text())["points"] == json.loads(before)["points"]


@pytest.mark.parametrize("kind", ["sd", "ddpm"])
def test_other_kinds_of_pipelines(kind: str, request: pytest.FixtureRequest, tiny_reader: Path, tmp_path: Path) -> None:
    model = request.getfixturevalue(f"tiny_{kind}")
    sizes = ["--num-inference-steps", 4, "--num-samples", 4, "--batch-size", 4, "--renders", 20, "--rounds", 0]
    method = "feature-inheritance:interval=2,min-evaluations=2"
    assert run_eval(model, "--reader", tiny_reader, "--method", method, *sizes, "--out", tmp_path) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["timing_batch"] is None
    assert found["judged"]["questions"] == {"sd": 3, "ddpm": 0}[kind]
    assert found["judged"]["reference"] == {"sd": "zoo:glyphs", "ddpm": "zoo:glyphs:bold-digits"}[kind]
    assert [point["kind"] for point in found["points"]] == ["baseline", "fastdiff", "steps", "steps"]


def test_pictures_of_anything_are_held_against_a_folder(tiny_dit: Path, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "reference" / f"{index}.png")
    judging = ["--reference", tmp_path / "reference", "--features", "zoo", "--class-labels", 1, 2]
    sizes = ["--num-inference-steps", 2, "--num-samples", 4, "--batch-size", 2, "--rounds", 0, "--out", tmp_path / "o"]
    assert run_eval(tiny_dit, *judging, *sizes) == 0
    found = json.loads((tmp_path / "o" / "results.json").read_text())
    assert (found["judged"]["reference"], found["judged"]["reference_samples"]) == ("reference", 8)
    assert "read" not in found["points"][0]["quality"]
    assert "floor" not in found


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "no-such-method"], "no way of sampling 'no-such-method'"),
        (["--baseline", "no-such-peer"], "no way of sampling 'no-such-peer'"),
        (["--method", "other@preset:fast"], "copy 'other'"),
        (["--copy", "nothing"], "--copy takes NAME=VALUE"),
        (["--copy", "main=x"], "'main' is the pipeline itself"),
        (["--features", "no-such-features"], "no features 'no-such-features'"),
        (["--features", "inception", "--feature-weights", "missing.pth"], "pip install|missing.pth"),
        (["--feature-weights", "other=x"], "features, lpips or clip"),
        (["--reader", "none"], "--reference"),
        (["--reader", "missing"], "reader of glyphs"),
        (
            ["--reader", "none", "--reference", "missing", "--features", "zoo", "--class-labels", 1],
            "no reference 'missing'",
        ),
        (["--prompts", "missing.txt"], "--reader none"),
        (["--reader", "none", "--reference", "zoo:glyphs", "--prompts", "missing.txt"], "file of prompts"),
        (["--reader", "none", "--reference", "zoo:glyphs", "--clip"], "--prompts"),
        (["--scheduler", "DDIM"], "no scheduler 'DDIM'"),
        (["--seeds", 0, 3], "overlap"),
        (["--seeds", -1], "from 0"),
        (["--num-samples", 1], "two at least"),
        (["--batch-size", 0], "batch_size is at least 1"),
        (["--rounds", -1], "rounds is at least 0"),
        (["--device", "nowhere"], "device 'nowhere'"),
        (["--arg", "nothing"], "--arg takes name=value"),
        (["--arg", "unknown=1"], "unknown"),
        (
            ["--reader", "none", "--reference", "zoo:glyphs", "--class-labels", 1, "--arg", "unknown=1"],
            "takes no unknown",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_sampled(
    arguments: list[object], said: str, tiny_dit: Path, tiny_reader: Path, tmp_path: Path, command: Command
) -> None:
    given = [] if "--reader" in arguments else ["--reader", tiny_reader]
    status, output, error = command("eval", tiny_dit, *SIZES, *given, *arguments, "--out", tmp_path / "out")
    message = error.strip().splitlines()[-1]
    assert status == 2
    assert message.startswith("fastdiff: error: ")
    assert any(part in message for part in said.split("|"))
    assert not output
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("report.html"))


def test_a_reference_of_another_size_is_noticed_after_one_image(
    tiny_dit: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "reference").mkdir()
    for index in range(2):
        Image.fromarray(np.full((16, 16, 3), index, np.uint8)).save(tmp_path / "reference" / f"{index}.png")
    (tmp_path / "features.py").write_text("def mean(images): return images.float().flatten(2).mean(dim=2)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        judging = ["--reference", tmp_path / "reference", "--features", "features:mean", "--class-labels", 1]
        status, _, error = command("eval", tiny_dit, *SIZES, *judging, "--out", tmp_path / "out")
    assert status == 2
    assert "16x16, the samples 32x32" in error
    assert not list(tmp_path.rglob("*.npz"))


def test_no_model_is_an_error(command: Command) -> None:
    assert command("eval")[0] == 2
    assert "Name the pipeline" in command("eval")[2]


def test_bad_images_of_one_way_leave_a_report_of_the_rest(
    tiny_dit: Path, tiny_reader: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdiff.eval import sampling

    checked = sampling._check

    def refused(pixels: np.ndarray, way: Any, task: Any, indices: Any) -> None:
        if way.methods:
            raise BadImageError("The image is black throughout.", way=way.key, seed=0)
        checked(pixels, way, task, indices)

    monkeypatch.setattr(sampling, "_check", refused)
    line = [tiny_dit, "--reader", tiny_reader, "--method", "exit-schedule:d-min=1", *SIZES, "--rounds", 0]
    status, _, error = command("eval", *line, "--out", tmp_path / "out")
    assert status == 2
    assert "1 of 4 ways made images that are none" in error
    assert f"The report in {tmp_path / 'out'} has the rest" in error
    assert "black throughout" in (tmp_path / "out" / "report.html").read_text()
    assert "black throughout" in (tmp_path / "out" / "results.md").read_text()


def test_a_disk_that_fills_up_while_the_report_is_written(
    out: Path, line: list[object], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdiff.eval import evaluation

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "write_report", full)
    status, _, error = command("eval", *line, "--out", out)
    assert status == 2
    assert "No space left on device. What was measured is kept" in error


def test_ctrl_c_says_that_the_same_command_goes_on(
    tiny_dit: Path, tiny_reader: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "run", interrupted)
    status, _, error = command("eval", tiny_dit, "--reader", tiny_reader, "--out", tmp_path)
    assert status == 130
    assert "what is finished is kept: the same command goes on" in error


# -- interruptions and processes ---------------------------------------------------------------------------------------


def numbers(folder: Path) -> dict[str, Any]:
    """All that does not depend on the clock."""
    found = json.loads((folder / "results.json").read_text())
    return {
        point["key"]: {name: point[name] for name in ("quality", "macs_per_image", "depth", "error")}
        for point in found["points"]
    }


def images(folder: Path) -> dict[str, bytes]:
    kept = Store(folder / SWEEPS / "seed-0")
    return {key: kept.samples(key, SAMPLES, BATCH).images.tobytes() for key in kept.way_keys() if not kept.error(key)}


@pytest.fixture(scope="module")
def untimed(tiny_dit: Path, tiny_reader: Path) -> list[str]:
    """A command whose results do not depend on the clock."""
    words = [tiny_dit, "--reader", tiny_reader, "--method", "exit-schedule:d-min=1..3", *PEERS, *SIZES, "--rounds", 0]
    return list(map(str, words))


@pytest.fixture(scope="module")
def uninterrupted(untimed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, "-m", "fastdiff.eval", *untimed, "--out", folder], env=environment(), check=True)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_numbers(untimed: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "fastdiff.eval", *untimed, "--out", str(tmp_path / "out")]

    def shards() -> int:
        return len(list(tmp_path.rglob("*.npz")))

    for _ in range(3):
        started = shards()
        process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and shards() <= started + 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out" / "report.html").exists()
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert numbers(tmp_path / "out") == numbers(uninterrupted)
    assert images(tmp_path / "out") == images(uninterrupted)


LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "fastdiff.eval"]


@pytest.mark.slow
def test_two_processes_make_the_same_images_and_one_report(
    untimed: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    line = [sys.executable, *LAUNCH, *untimed, "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert images(tmp_path / "out") == images(uninterrupted)
    ours, whole = numbers(tmp_path / "out"), numbers(uninterrupted)
    for key, point in whole.items():
        for name, told in point["quality"].items():
            assert ours[key]["quality"][name]["value"] == pytest.approx(told["value"], rel=1e-6)
    assert done.stdout.count("Open ") == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["processes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_an_error_is_said_by_one_process(untimed: list[str], tmp_path: Path) -> None:
    line = [sys.executable, *LAUNCH, *untimed, "--device", "cpu", "--features", "nothing", "--out", str(tmp_path / "o")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("fastdiff: error:") == 1
    assert "no features 'nothing'" in done.stderr
