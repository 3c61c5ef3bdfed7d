"""The demo on UNets: a pipeline that is given prompts, and one that cannot be asked for anything."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from fastdiff.cli.contenders import contenders
from fastdiff.cli.main import main
from fastdiff.cli.tasks import glyph_task
from fastdiff.errors import UnsupportedPipelineError
from fastdiff.eval.glyphs import GlyphJudge
from fastdiff.plan import ComputePlan
from fastdiff.zoo.captions import caption, caption_sequence
from fastdiff.zoo.data import BOLD_DIGITS
from fastdiff.zoo.reader import GlyphReader

from .conftest import Command

STEPS, SAMPLES, SEED = 12, 4, 5


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_ddpm"])
def model(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module")
def out(model: Path, tiny_reader: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of the demo wrote."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    models = ["--model", model, "--reader", tiny_reader]
    sizes = ["--samples", SAMPLES, "--batch", 2, "--steps", STEPS, "--renders", 40, "--seed", SEED]
    assert main([str(word) for word in ["demo", *models, *sizes, "--out", folder]]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def asked_of(model: Path) -> np.ndarray | None:
    return caption_sequence(SAMPLES, SEED)[1] if model.name == "sd" else None


def test_every_method_for_unets_is_compared(results: dict[str, Any], out: Path) -> None:
    rows = {row["key"]: row for row in results["rows"]}
    assert list(rows) == [contender.key for contender in contenders(STEPS, finetuned=False, unet=True)]
    for key in ("encoder-propagation", "encoder-propagation-sequential", "deepcache-3", "preset-balanced"):
        assert 0.2 < rows[key]["macs_share"] < 1
        assert ComputePlan.load(out / f"plans/{key}.json").evaluations == STEPS
    both = rows["encoder-propagation"], rows["encoder-propagation-sequential"]
    assert both[0]["macs_share"] == pytest.approx(both[1]["macs_share"])
    assert both[0]["fid"] == pytest.approx(both[1]["fid"], rel=1e-3)


def test_guidance_and_prompts_are_said_where_there_are_any(model: Path, results: dict[str, Any], out: Path) -> None:
    has_prompts = model.name == "sd"
    report, command = (out / "report.html").read_text(), results["rows"][0]["command"]
    assert (out / "prompts.txt").exists() == has_prompts
    for text, word in ((report, "guidance 4"), (command, "--guidance-scale 4"), (command, "--prompt-file")):
        assert (word in text) == has_prompts
    assert ("both colours asked for" if has_prompts else "nothing was asked for") in report


@pytest.mark.parametrize("key", ["full", "encoder-propagation", "deepcache-3", "preset-fast", "steps-6"])
def test_the_recorded_command_samples_the_judged_images_again(
    key: str,
    model: Path,
    out: Path,
    results: dict[str, Any],
    tiny_reader: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = next(row for row in results["rows"] if row["key"] == key)
    monkeypatch.chdir(out)  # where the prompts are
    _, *words = shlex.split(row["command"])
    words[-1] = str(tmp_path)
    assert command(*words)[0] == 0
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))])
    asked = asked_of(model)
    judge = GlyphJudge(GlyphReader.from_pretrained(tiny_reader), 40, subset=BOLD_DIGITS if asked is None else None)
    score = judge.score(images, asked)
    assert len(images) == SAMPLES
    assert score.fid == pytest.approx(row["fid"], rel=1e-6)
    assert score.correct == row["correct"]


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_every_image_has_its_own_caption(tiny_sd: Path) -> None:
    task = glyph_task(DiffusionPipeline.from_pretrained(tiny_sd), 40, seed=3, guidance_scale=2.5)
    given = task.arguments(range(36, 39))
    assert task.asked is not None
    assert given == {"prompt": [caption(*task.asked[index]) for index in (36, 37, 38)], "guidance_scale": 2.5}
    assert task.questions == 3
    assert [task.label(index) for index in (0, 10, 36)] == ["0", "A", "0"]
    # More images than were asked for come to the first ones again.
    assert task.arguments(range(40, 41))["prompt"] == [caption(*task.asked[0])]


def test_an_unconditional_pipeline_is_asked_for_a_number(tiny_ddpm: Path) -> None:
    task = glyph_task(DiffusionPipeline.from_pretrained(tiny_ddpm), 40, seed=3, guidance_scale=2.5)
    assert task.arguments(range(36, 39)) == {"batch_size": 3}
    assert (task.asked, task.questions, task.label(7)) == (None, 0, "7")


def test_a_class_conditional_pipeline_is_asked_for_characters(tiny_dit: Path) -> None:
    task = glyph_task(DiffusionPipeline.from_pretrained(tiny_dit), 40, seed=3, guidance_scale=2.5)
    assert task.arguments(range(35, 38)) == {"class_labels": [35, 0, 1], "guidance_scale": 2.5}
    assert (task.questions, task.label(36)) == (1, "0")


def test_a_pipeline_that_cannot_be_asked_is_refused() -> None:
    class Upscaler(DiffusionPipeline):
        def __call__(self, image: Any) -> None: ...

    with pytest.raises(UnsupportedPipelineError, match=r"Upscaler cannot be asked for glyphs.* image"):
        glyph_task(Upscaler(), 4, seed=0, guidance_scale=1)


def test_prompts_come_from_a_file(tiny_sd: Path, tmp_path: Path, command: Command) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red digit 1 on a white background\na letter K\n")
    words = ["--num-inference-steps", 1, "--preset", "off"]
    assert command("generate", tiny_sd, "--prompt-file", prompts, *words, "--out", tmp_path / "file")[0] == 0
    given = prompts.read_text().splitlines()
    assert command("generate", tiny_sd, "--prompt", *given, *words, "--out", tmp_path / "words")[0] == 0
    for name in ("00000.png", "00001.png"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "words" / name).read_bytes()


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused(
    content: str | bytes | None, tiny_sd: Path, tmp_path: Path, command: Command
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, complaint = command("generate", tiny_sd, "--prompt-file", prompts, "--out", tmp_path / "out")
    assert status == 2
    assert "--prompt-file" in complaint
    assert not (tmp_path / "out").exists()


def test_prompts_are_given_in_one_way(tiny_sd: Path, tmp_path: Path, command: Command) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a letter K\n")
    words = ["--prompt", "a letter K", "--prompt-file", prompts, "--out", tmp_path / "out"]
    status, _, complaint = command("generate", tiny_sd, *words)
    assert status == 2
    assert "one of --class-labels, --prompt and --prompt-file" in complaint
