"""An evaluation's settings, and the library's way of running one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.errors import ConfigError
from fastdiff.eval.evaluation import Evaluation, default_reader
from fastdiff.eval.results import load_results
from fastdiff.eval.sweep import Settings
from tiny.pipelines import TINY_PIPELINES

MINIMAL: dict[str, Any] = {"model": "m", "reference": "zoo:glyphs"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reference": None}, "--reference"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [-1]}, "from 0"),
        ({"seeds": [0, 0]}, "overlap"),
        ({"seeds": [0, 499]}, "overlap"),
        ({"seeds": [600, 0], "num_samples": 601}, "overlap"),
        ({"num_samples": 1}, "two at least"),
        ({"num_inference_steps": 0}, "num_inference_steps is at least 1"),
        ({"timing_batch": 0}, "timing_batch is at least 1"),
        ({"feature_weights": {"inception": "x"}}, "features, lpips or clip; got inception"),
        ({"copies": {"main": "x"}}, "another name"),
        ({"methods": ["tuned@preset:fast"], "copies": {"other": "x"}}, r"copy 'tuned'.*\['other'\]"),
        ({"clip": True}, "--prompts"),
        ({"reader": "r", "class_labels": [1]}, "--reader none"),
        ({"reader": "r", "prompts": "p.txt"}, "--reader none"),
    ],
)
def test_settings_that_do_not_fit_are_a_typed_error(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Evaluation(**{**MINIMAL, **given})


def test_settings_that_fit() -> None:
    assert Evaluation(**MINIMAL, seeds=[500, 0]).num_samples == 500
    assert Evaluation(**MINIMAL, methods=["plan:me@home.json"]).methods  # no copy's name stands before the colon
    first = Evaluation(**MINIMAL, rounds=3, timing_batch=4)
    expected = Settings(num_inference_steps=50, num_samples=500, batch_size=16, rounds=3, timing_batch=4)
    assert first.sweep_settings() == expected
    assert first.sweep_settings(timed=False).rounds == 0
    assert default_reader("zoo:glyphs-dit") == "zoo:glyphs-cnn"
    assert default_reader("some/model") is None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    TINY_PIPELINES["DiTPipeline"].build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_library_user_gets_the_results(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "own_features.py").write_text("def mean(images): return images.float().flatten(2).mean(dim=2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    images = TINY_PIPELINES["DiTPipeline"].build()([1, 2, 3], num_inference_steps=1).images
    for index, image in enumerate(images):
        (tmp_path / "reference").mkdir(exist_ok=True)
        image.save(tmp_path / "reference" / f"{index}.png")
    given: dict[str, Any] = {"model": str(model), "reference": str(tmp_path / "reference"), "class_labels": [1, 2]}
    given |= {"num_inference_steps": 4, "num_samples": 4, "batch_size": 2, "rounds": 0, "out": str(tmp_path / "out")}
    given |= {"features": "own_features:mean", "methods": ["feature-inheritance:interval=2,min-evaluations=2"]}
    with pytest.raises(ConfigError, match="no features"):
        Evaluation(**given, trusted=False).run(progress=False)
    assert not list(tmp_path.rglob("*.npz"))

    results = Evaluation(**given).run(["my-script"], progress=False)
    assert results is not None
    assert [point.way["num_inference_steps"] for point in results.measured] == [4, 4, 2, 1]
    assert results.batch is None
    assert results.header["command"] == "my-script"
    assert results.header["judged"]["features"].startswith("own_features:mean@")
    kept = load_results(tmp_path / "out")
    assert [point["key"] for point in kept["points"]] == [point.key for point in results.points]
    assert torch.get_num_threads() == results.header["environment"]["torch_threads"]
