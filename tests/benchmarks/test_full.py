"""The settings of the full comparisons are read, and every way in them is one that there is."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fastdiff.backbones import view
from fastdiff.cli import evaluate
from fastdiff.eval.evaluation import Evaluation
from fastdiff.eval.ways import parse_ways
from fastdiff.eval.work import denoisers_of
from fastdiff.pipelines.calling import load

FILES = sorted((Path(__file__).parents[2] / "benchmarks/full").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_settings_name_what_there_is(file: Path) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_options(parser)
    evaluation = evaluate.build(parser.parse_args(["--config", str(file)]), parser)
    assert isinstance(evaluation, Evaluation)
    assert file.stem.startswith(evaluation.model.removeprefix("zoo:"))
    assert evaluation.out == f"runs/{file.stem}"
    assert evaluation.num_samples >= 500
    (denoiser,) = denoisers_of(load(evaluation.model, "cpu", "float32", preset="off"))
    specs = [spec.rpartition("@")[2] for spec in evaluation.methods]
    ways = parse_ways(specs, evaluation.num_inference_steps, units=len(view(denoiser).units))
    assert len(ways) >= len(specs)
    if evaluation.rounds:
        exits = {"saved", "uncertainty-exit + plan", "exit-schedule", "layer-skipping"}
        every = {"feature-inheritance", "preset", "encoder-propagation"}
        assert (exits if file.stem.endswith("-exits") else every) <= {way.group for way in ways}
