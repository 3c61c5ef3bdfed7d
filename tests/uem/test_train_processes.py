"""Two processes take the steps of one, and write one result."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdiff.uem.train import train
from tiny.training import small, tiny_dit, train_in_turns

SETTINGS: dict[str, dict[str, Any]] = {
    "frozen": {"gradient_accumulation": 2},
    "fine-tuned": {"train_backbone": True, "backbone_learning_rate": 1e-3},
    "ase": {"objective": "ase", "train_backbone": True, "backbone_learning_rate": 1e-3},
    "uneven": {"batch_size": 6, "gradient_accumulation": 2},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where two processes trained, and what they say."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")  # autograd's threads do not survive a fork
    said: Any = context.Queue()
    both = [context.Process(target=train_in_turns, args=(rank, port, folder, said, SETTINGS)) for rank in range(2)]
    for process in both:
        process.start()
    heard = dict(said.get(timeout=240) for _ in both)
    for process in both:
        process.join(60)
    return folder, [heard[0], heard[1]]


@pytest.mark.parametrize("name", ["frozen", "fine-tuned", "ase"])
def test_two_processes_train_as_one(name: str, two: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, said = two
    one = train(tiny_dit(), small(**SETTINGS[name]), tmp_path / "one")
    assert said[0][name] == said[1][name]
    assert said[0][name]["error"] == pytest.approx(one["error"], rel=1e-3)
    expected, found = (load_file(run / "checkpoint.safetensors") for run in (tmp_path / "one", folder / name))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if key.startswith("model."):
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-4, msg=key)
    recorded = [sorted(path.name for path in run.rglob("0*.safetensors")) for run in (tmp_path / "one", folder / name)]
    assert recorded[0] == recorded[1]
    steps = [json.loads(line)["step"] for line in (folder / name / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_batch_that_two_processes_cannot_share_is_refused(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for said in two[1]:
        assert said["uneven"].startswith("ConfigError")
        assert "2 processes that accumulate 2 each" in said["uneven"]


@pytest.mark.slow
def test_accelerate_launches_the_command(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "fastdiff.uem.train", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    command += ["--samples", "8", "--record-batch", "4", "--num-inference-steps", "4", "--evaluations", "2"]
    command += ["--steps", "2", "--batch-size", "4", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Use it:") == 1
    assert (tmp_path / "out" / "validation.json").exists()
