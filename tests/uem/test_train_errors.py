"""What goes wrong in training is said, and what was there before stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdiff.cli.main import main
from fastdiff.errors import ConfigError, FastDiffError, ProfileMismatchError, UnsupportedBackboneError
from fastdiff.output import OutputError
from fastdiff.uem import TrainConfig, load_modules
from fastdiff.uem.files import CheckpointError
from fastdiff.uem.train import train
from fastdiff.uem.trainer import DivergedError
from tiny.training import pipeline_and_call, small, tiny_dit

Trained = Callable[..., Any]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "magic"}, "objective is one of 'deediff', 'ase', 'heads'; got 'magic'"),
        ({"heads": "none"}, "heads is one of"),
        ({"ual": "none"}, "ual is one of"),
        ({"mixed_precision": "fp8"}, "mixed_precision is one of"),
        ({"steps": 0}, "steps is a whole number from 1; got 0"),
        ({"batch_size": 2.5}, "batch_size is a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate is a number from 0; got nan"),
        ({"ema_decay": 1.0}, r"ema_decay lies in \[0, 1\)"),
        ({"seed": -1}, "seed is a whole number"),
        ({"samples": 0}, "samples is a whole number"),
        ({"target": "truth"}, "target='truth' needs images"),
        ({"snr_gamma": 5.0}, "snr_gamma weighs noise that is added to images"),
        ({"snr_gamma": 0.0, "data": "zoo"}, "snr_gamma is a number above 0, or None; got 0.0"),
        ({"unconditional": 1.5}, r"unconditional lies in \[0, 1\], or is None; got 1.5"),
        ({"objective": "ase"}, "fine-tunes the denoiser"),
        ({"objective": "heads", "heads": "shared"}, "trains heads='per_exit'"),
        ({"batch_size": 10, "gradient_accumulation": 4}, "does not divide into 4 parts"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "spec", ["layer-skipping", "exit-schedule:preset=none", "exit-schedule:bin-edges=[0],depths=[9]"]
)
def test_a_schedule_that_is_none(spec: str, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        trained(tmp_path, objective="ase", train_backbone=True, schedule=spec)


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(trained: Trained, tmp_path: Path) -> None:
    trained(tmp_path, steps=20, learning_rate=1e30, stop_at=1)
    with pytest.raises(DivergedError, match=r"in step [23] \(loss nan.*no checkpoint|checkpoint of step") as caught:
        trained(tmp_path, steps=20, learning_rate=1e30, checkpoint_every=1)
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert caught.value.step in (2, 3)
    assert f"The checkpoint of step {caught.value.step - 1} is kept" in str(caught.value)
    assert kept
    assert not (tmp_path / "validation.json").exists()


def test_a_prediction_that_is_no_number_stops_before_it_changes_anything(trained: Trained, tmp_path: Path) -> None:
    trained(tmp_path, stop_at=4)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    pipe = tiny_dit()
    calls: list[int] = []

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * (torch.nan if len(calls) > 2 else 1)

    pipe.transformer.transformer_blocks[2].register_forward_hook(spoil)
    with pytest.raises(DivergedError, match="The checkpoint of step 4 is kept") as caught:
        trained(tmp_path, pipe=pipe)
    assert caught.value.step >= 5
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_checkpoint_that_is_cut_off(size: int, trained: Trained, tmp_path: Path) -> None:
    trained(tmp_path, stop_at=4)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged or cut off"):
        trained(tmp_path)


def test_a_checkpoint_of_other_settings_is_not_continued(trained: Trained, tmp_path: Path) -> None:
    trained(tmp_path, stop_at=4)
    with pytest.raises(ProfileMismatchError, match=r"with learning_rate=0\.002\. Give these settings"):
        trained(tmp_path, learning_rate=1e-3)
    trained(tmp_path, validate_every=3)


def test_a_checkpoint_of_another_denoiser_is_not_continued(trained: Trained, tmp_path: Path) -> None:
    trained(tmp_path, stop_at=4)
    pipe = tiny_dit()
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight.mul_(1.5)
    with pytest.raises(ProfileMismatchError, match="with denoiser="):
        trained(tmp_path, pipe=pipe)


def test_another_program_s_file_is_no_checkpoint(trained: Trained, tmp_path: Path) -> None:
    trained(tmp_path / "other", heads="shared")
    (tmp_path / "checkpoint.safetensors").write_bytes(
        (tmp_path / "other" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    with pytest.raises(FastDiffError):
        trained(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_keeps_the_last_checkpoint(trained: Trained, tmp_path: Path) -> None:
    trained(tmp_path, stop_at=2)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    os.symlink("/dev/full", tmp_path / "checkpoint.safetensors.partial")
    with pytest.raises(OutputError, match=r"checkpoint\.safetensors cannot be written: .*space") as caught:
        trained(tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert trained(tmp_path)["rmse"]  # there is room again: the same command goes on


def test_a_folder_that_is_a_file(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="--out"):
        trained(tmp_path / "out")


def test_modules_of_another_denoiser_are_refused(trained: Trained, tmp_path: Path) -> None:
    import fastdiff

    trained(tmp_path)
    pipe, _, _ = pipeline_and_call("UViTPipeline")
    fastdiff.enable(pipe, fastdiff.UncertaintyExit(weights=str(tmp_path)))
    with pytest.raises(ProfileMismatchError, match="are for DiTTransformer2DModel of 4 units, this denoiser is UViT"):
        pipe(class_labels=[1], num_inference_steps=2)


@pytest.mark.parametrize("missing", ["exit_heads.1.up.weight", "uncertainty.0.probe.bias"])
def test_a_missing_head_or_module_is_refused(missing: str, trained: Trained, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors[missing]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=missing):
        load_modules(tmp_path)


def test_a_denoiser_without_known_blocks_is_refused_before_it_is_called(tmp_path: Path) -> None:
    pipe = tiny_dit()
    pipe.transformer = pipe.vae
    with pytest.raises(UnsupportedBackboneError):
        train(pipe, small(), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_half_precision_that_the_device_does_not_have(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixed_precision='fp16'"):
        trained(tmp_path, mixed_precision="fp16", device="cpu")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_trains_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_dit().save_pretrained(tmp_path / "model")
    words = ["train-uem", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--samples", "8"]
    words += ["--record-batch", "4", "--num-inference-steps", "4", "--steps", "2", "--batch-size", "4"]
    assert main([*words, "--train-backbone", "--class-labels", "1", "2"]) == 0
    shown = capsys.readouterr().out
    use = [line.strip() for line in shown.partition("Use it:\n")[2].splitlines()]
    assert len(use) == 3
    import diffusers

    import fastdiff

    names: dict[str, Any] = {"fastdiff": fastdiff, "diffusers": diffusers}
    pipe = compile_lines(use, names)["pipe"]
    assert pipe.fastdiff.methods[0].modules().exits
    assert torch.equal(pipe.transformer.proj_out_1.weight, trained_weight(tmp_path / "out"))
    assert not torch.equal(pipe.transformer.proj_out_1.weight, tiny_dit().transformer.proj_out_1.weight)
    assert main([*words, "--class-labels", "1", "2"]) == 2
    assert "training run with train_backbone=True" in capsys.readouterr().err


def trained_weight(out: Path) -> torch.Tensor:
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out_1.weight"]


def compile_lines(lines: list[str], names: dict[str, Any]) -> dict[str, Any]:
    """Runs what a person would copy."""
    import code

    console = code.InteractiveConsole(names)
    assert not any(console.push(line) for line in lines)
    return names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere/at-all"], "cannot be loaded"),
        (["--target", "truth"], "needs images"),
        (["--data", "nowhere"], "no training data 'nowhere'"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--arg", "height=8"], "DiTPipeline takes no height"),
    ],
)
def test_errors_of_the_command_take_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-uem", "--out", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("fastdiff: error:") and message in line]


def test_defaults_that_the_help_tells_are_the_defaults() -> None:
    import argparse
    import re

    from fastdiff.cli.main import build_parser

    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    told = {}
    for action in commands.choices["train-uem"]._actions:
        found = re.search(r"\(default: ([^ )]+)\)", action.help or "")
        if found and hasattr(TrainConfig, action.dest):
            told[action.dest] = found[1]
    assert len(told) > 20
    for name, value in told.items():
        default = getattr(TrainConfig, name)
        words = ("never", "none") if default is None else (str(default), str(default).removesuffix(".0"))
        assert value in words, name
