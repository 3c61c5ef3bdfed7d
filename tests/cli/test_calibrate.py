"""calibrate on a tiny pipeline, and what its files are good for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image

from fastdiff import UncertaintyExit
from fastdiff.cli.calibrate import RULES
from fastdiff.eval.ways import parse_ways
from fastdiff.methods import Method
from fastdiff.plan import ComputePlan
from fastdiff.spec import load_method, parse_method
from fastdiff.uem import calibration, load_modules
from tiny.uncertainty import random_modules

from .conftest import Command

SAMPLES = ("--class-labels", 3, 7, 9, "--num-samples", 6, "--batch-size", 3, "--num-inference-steps", 10)
SETTINGS = (*SAMPLES, "--bins", 3, "--tolerance", 0.03, "--guidance-scale", 2)
PICTURES = ("thresholds.png", "depths.png", "correlations.png")


@pytest.fixture(scope="session")
def trained(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    random_modules(DiTPipeline.from_pretrained(tiny_dit).transformer, heads="per_exit").save_pretrained(folder)
    return folder


@pytest.fixture
def done(tiny_dit: Path, trained: Path, tmp_path: Path, command: Command) -> tuple[Path, str]:
    out = tmp_path / "calibrated"
    status, printed, _ = command(
        "calibrate", tiny_dit, "--weights", trained, "--budget", 0.7, *SETTINGS, "--freeze", "--out", out
    )
    assert status == 0
    return out, printed


def test_the_rules_are_those_of_the_calibration() -> None:
    assert set(RULES) == set(calibration.RULES)


def test_the_folder_tells_everything_and_works_elsewhere(
    done: tuple[Path, str], tiny_dit: Path, tmp_path: Path, command: Command
) -> None:
    out, printed = done
    numbers = json.loads((out / "calibration.json").read_text())
    assert numbers["schema_version"] == 1
    assert numbers["calibration"]["share"] == pytest.approx(0.7, abs=0.03)
    assert {*numbers["held_out"]} == {"full", "dynamic", "frozen"}
    assert numbers["held_out"]["full"]["share"] == 1
    assert numbers["held_out"]["full"]["psnr"]["value"] is None
    assert f"{numbers['held_out']['dynamic']['share']:.2%}" in (out / "calibration.md").read_text()
    assert (out / "calibration.md").read_text() in printed
    for name in PICTURES:
        assert min(Image.open(out / name).size) > 100
    assert len(numbers["depth_by_bin"]) == len(numbers["bin_edges"]) == 3
    assert {path.name for path in out.iterdir()} == {
        "uncertainty_exit.json",
        "uem",
        "calibration.json",
        "calibration.md",
        "frozen_plan.json",
        *PICTURES,
    }

    # The method finds its modules beside it, wherever the folder is, and costs what the report says.
    out = out.rename(tmp_path / "elsewhere")
    assert str(tmp_path) not in (out / "uncertainty_exit.json").read_text()
    shares = []
    for seed in (6, 9):
        labels = [[3, 7, 9][(seed + place) % 3] for place in range(3)]
        arguments = ("--class-labels", *labels, "--seed", seed, "--num-inference-steps", 10)
        spec = f"saved:{out / 'uncertainty_exit.json'}"
        folder = tmp_path / f"images-{seed}"
        status, _, _ = command(
            "generate", tiny_dit, "--method", spec, *arguments, "--guidance-scale", 2, "--batch", 3, "--out", folder
        )
        assert status == 0
        (call,) = json.loads((folder / "record.json").read_text())["calls"]
        shares.append(call["denoisers"]["transformer"]["macs_share"])
    assert np.mean(shares) == pytest.approx(numbers["held_out"]["dynamic"]["share"], abs=1e-6)


def test_the_frozen_plan_runs_with_the_modules_heads(
    done: tuple[Path, str], tiny_dit: Path, tmp_path: Path, command: Command
) -> None:
    out, _ = done
    numbers = json.loads((out / "calibration.json").read_text())
    methods = (
        "--method",
        f"plan:{out / 'frozen_plan.json'}",
        "--method",
        f"uncertainty-exit:threshold=0,weights={out / 'uem'}",
    )
    arguments = ("--class-labels", 3, 7, 9, "--num-inference-steps", 10, "--out", tmp_path / "images")
    status, _, _ = command("generate", tiny_dit, *methods, *arguments)
    assert status == 0
    (call,) = json.loads((tmp_path / "images/record.json").read_text())["calls"]
    assert call["denoisers"]["transformer"]["macs_share"] == pytest.approx(
        numbers["held_out"]["frozen"]["share"], abs=1e-6
    )
    assert ComputePlan.load(out / "frozen_plan.json").evaluations == 10


def test_saved_methods_are_methods_everywhere(done: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = done
    file = out / "uncertainty_exit.json"
    method = parse_method(f"saved:{file}")
    assert isinstance(method, UncertaintyExit)
    assert method == load_method(file)
    assert method.weights == str(out / "uem")
    assert load_modules(method.weights).config["heads"] == "per_exit"
    assert Method.from_dict(method.to_dict()) == method
    (way,) = parse_ways([f"saved:{file}"], 10)
    assert way.methods == (method,)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read as a saved method"),
        ("{", "cannot be read"),
        ('{"type": "Nothing"}', "no method 'Nothing'"),
    ],
)
def test_what_is_no_saved_method_is_explained(
    content: str | None, says: str, tiny_dit: Path, tmp_path: Path, command: Command
) -> None:
    file = tmp_path / "method.json"
    if content is not None:
        file.write_text(content)
    status, _, error = command("generate", tiny_dit, "--method", f"saved:{file}", "--class-labels", 3)
    assert status == 2
    assert says in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budget", 0.05), "it can be from 0."),
        (("--budget", 1.5), "above 0 and at most 1"),
        (("--budget", 0.7, "--bins", 0), "bins is a whole number"),
        (("--budget", 0.7, "--scheduler", "Nothing"), "no scheduler 'Nothing'"),
        (("--budget", 0.7, "--weights", "nowhere"), "holds no uncertainty modules"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(
    arguments: tuple[object, ...], says: str, tiny_dit: Path, trained: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    status, _, error = command("calibrate", tiny_dit, "--weights", trained, *SAMPLES, *arguments, "--out", out)
    assert status == 2
    assert says in error
    assert not list(tmp_path.iterdir())


def test_another_scheduler(tiny_dit: Path, trained: Path, tmp_path: Path, command: Command) -> None:
    torch.manual_seed(0)
    arguments = ("--weights", trained, "--budget", 0.8, *SETTINGS, "--scheduler", "DPMSolverMultistepScheduler")
    status, _, _ = command("calibrate", tiny_dit, *arguments, "--out", tmp_path / "out")
    assert status == 0
    assert json.loads((tmp_path / "out/calibration.json").read_text())["calibration"]["share"] == pytest.approx(
        0.8, abs=0.03
    )
