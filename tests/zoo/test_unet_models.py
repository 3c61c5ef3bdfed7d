"""The shipped UNets: that plain diffusers loads them, that captions decide what is drawn, that samples can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from fastdiff import zoo
from fastdiff.zoo import captions, check, data
from fastdiff.zoo.reader import GlyphReader


@pytest.fixture(scope="module")
def reader() -> GlyphReader:
    return GlyphReader.from_pretrained(zoo.path("glyphs-cnn")).eval()


def _load_text_to_image() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(zoo.path("glyphs-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load_unconditional() -> DDPMPipeline:
    pipe = DDPMPipeline.from_pretrained(zoo.path("glyphs-ddpm"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return _load_text_to_image()


@pytest.mark.parametrize(
    ("name", "inputs", "pipeline", "prediction"),
    [
        (
            "glyphs-sd",
            {"prompt": ["a red letter K on a white background", "hello"]},
            "StableDiffusionPipeline",
            "epsilon",
        ),
        ("glyphs-ddpm", {"batch_size": 2}, "DDPMPipeline", "sample"),
    ],
)
def test_plain_diffusers_loads_and_samples_without_fastdiff(
    name: str, inputs: dict[str, object], pipeline: str, prediction: str, tmp_path: Path
) -> None:
    code = """
import json, sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastdiff":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
images = pipe(num_inference_steps=2, **json.loads(sys.argv[2])).images
models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
print(json.dumps({
    "pipeline": type(pipe).__name__,
    "dtypes": sorted({str(p.dtype) for model in models for p in model.parameters()}),
    "sizes": [image.size for image in images],
    "layers": pipe.unet.config.layers_per_block,
    "scheduler": type(pipe.scheduler).__name__,
    "prediction": pipe.scheduler.config.prediction_type,
    "clipped": pipe.scheduler.config.clip_sample,
    "fastdiff": "fastdiff" in sys.modules,
}))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(zoo.path(name)), json.dumps(inputs)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "pipeline": pipeline,
        "dtypes": ["torch.float32"],
        "sizes": [[32, 32], [32, 32]],
        "layers": 2,
        "scheduler": "DDIMScheduler",
        "prediction": prediction,
        "clipped": name == "glyphs-ddpm",
        "fastdiff": False,
    }


class TestTextToImage:
    def test_guided_samples_show_the_character_and_both_colours(
        self, pipe: StableDiffusionPipeline, reader: GlyphReader
    ) -> None:
        # Were the true share the promised 90 %, 26 or fewer of 36 would be read less than once in 300 tries.
        prompts, asked = captions.caption_sequence(36, seed=1000)
        images = check.sample_captions(pipe, prompts, num_inference_steps=20, seed=1000)
        assert check.share_read(reader, images, asked) > 26 / 36
        others = asked[[*range(1, 36), 0]]
        assert check.share_read(reader, images, others[:, 0]) < 0.2
        assert check.share_read(reader, images, others) < 0.1

    @pytest.mark.parametrize("phrase", range(1, len(captions.PHRASES)))
    def test_other_phrasings_are_followed_too(
        self, pipe: StableDiffusionPipeline, reader: GlyphReader, phrase: int
    ) -> None:
        _, asked = captions.caption_sequence(18, seed=phrase)
        prompts = [captions.caption(*row, phrase=phrase) for row in asked.tolist()]
        images = check.sample_captions(pipe, prompts, num_inference_steps=12, seed=2000 * phrase)
        assert check.share_read(reader, images, asked) > 11 / 18

    def test_an_empty_caption_leaves_the_choice_to_the_model(
        self, pipe: StableDiffusionPipeline, reader: GlyphReader
    ) -> None:
        images = check.sample_captions(pipe, [""] * 36, num_inference_steps=12, guidance_scale=1.0)
        assert len(set(reader.read(images).tolist())) > 5

    def test_batch_size_does_not_matter(self, pipe: StableDiffusionPipeline) -> None:
        prompts, _ = captions.caption_sequence(5)
        whole = check.sample_captions(pipe, prompts, num_inference_steps=3)
        parts = check.sample_captions(pipe, prompts, num_inference_steps=3, batch_size=2)
        torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)
        assert not torch.allclose(whole, check.sample_captions(pipe, prompts, num_inference_steps=3, seed=1), atol=0.1)

    @pytest.mark.parametrize(
        "scheduler",
        [
            DDPMScheduler,
            DPMSolverMultistepScheduler,
            EulerDiscreteScheduler,
            HeunDiscreteScheduler,
            UniPCMultistepScheduler,
        ],
    )
    def test_other_schedulers_draw_what_was_asked(self, reader: GlyphReader, scheduler: type) -> None:
        pipe = _load_text_to_image()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        prompts, asked = captions.caption_sequence(36, seed=7)
        images = check.sample_captions(pipe, prompts, num_inference_steps=12, seed=77)
        # Chance is 1 in 3600; few steps of an ancestral sampler are noisier than DDIM's.
        assert check.share_read(reader, images, asked) >= 0.6

    @pytest.mark.slow
    def test_promised_share_of_720_samples_at_50_steps(
        self, pipe: StableDiffusionPipeline, reader: GlyphReader
    ) -> None:
        prompts, asked = captions.caption_sequence(720)
        images = check.sample_captions(pipe, prompts, num_inference_steps=50)
        assert check.share_read(reader, images, asked) >= 0.9


class TestUnconditional:
    def test_samples_are_legible_and_of_many_kinds(self, reader: GlyphReader) -> None:
        # Of images without a character, three in ten pass.
        images = check.sample_unconditional(_load_unconditional(), 36, num_inference_steps=25, seed=1000)
        assert check.share_read(reader, images, None) > 20 / 36
        with torch.no_grad():
            answers = reader(images)
        assert len(set(answers.character.argmax(1).tolist())) > 7
        pairs = set(zip(answers.foreground.argmax(1).tolist(), answers.background.argmax(1).tolist(), strict=True))
        assert len(pairs & set(data.color_pairs())) > 12

    def test_batch_size_does_not_matter(self) -> None:
        pipe = _load_unconditional()
        whole = check.sample_unconditional(pipe, 5, num_inference_steps=3)
        parts = check.sample_unconditional(pipe, 5, num_inference_steps=3, batch_size=2)
        torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)

    def test_dpm_solver_draws_legible_characters(self, reader: GlyphReader) -> None:
        pipe = _load_unconditional()
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        images = check.sample_unconditional(pipe, 24, num_inference_steps=20, seed=5)
        assert check.share_read(reader, images, None) >= 0.5

    @pytest.mark.slow
    def test_share_of_720_samples_at_50_steps(self, reader: GlyphReader) -> None:
        images = check.sample_unconditional(_load_unconditional(), 720, num_inference_steps=50)
        assert check.share_read(reader, images, None) >= 0.9
