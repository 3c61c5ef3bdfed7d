"""Glyphs: what pipelines are asked for, and that it decides whether an image is read correctly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from fastdiff import zoo
from fastdiff.errors import ConfigError
from fastdiff.eval.glyphs import GlyphTask, glyph_task, read_as_asked
from fastdiff.zoo import check
from fastdiff.zoo.captions import caption
from fastdiff.zoo.data import BOLD_DIGITS, CHARACTERS, COLORS, LABELS, color_pairs, render_many, to_tensor
from fastdiff.zoo.reader import QUESTIONS, GlyphReader, GlyphReaderOutput
from tiny.pipelines import TINY_PIPELINES
from tiny.unet_pipelines import UNET_PIPELINES


@pytest.fixture(scope="module")
def reader() -> GlyphReader:
    return GlyphReader.from_pretrained(zoo.path("glyphs-cnn")).eval()


def _logits(answers: list[int], options: int, certainty: float = 20.0) -> torch.Tensor:
    return certainty * torch.nn.functional.one_hot(torch.tensor(answers), options).float()


def _output(characters: list[int], fore: list[int], back: list[int], certainty: float = 20.0) -> GlyphReaderOutput:
    return GlyphReaderOutput(
        character=_logits(characters, len(CHARACTERS), certainty),
        font=torch.zeros(len(characters), 12),
        foreground=_logits(fore, len(COLORS)),
        background=_logits(back, len(COLORS)),
    )


class TestAsAsked:
    output = _output([5, 5, 5, 6], [1, 1, 2, 1], [0, 3, 0, 0])

    def test_every_question_asked_has_to_be_answered_right(self) -> None:
        asked = torch.tensor([[5, 1, 0]] * 4)
        assert self.output.as_asked(asked).tolist() == [True, False, False, False]
        assert self.output.as_asked(asked[:, :2]).tolist() == [True, True, False, False]
        assert self.output.as_asked(asked[:, :1]).tolist() == [True, True, True, False]
        assert self.output.as_asked(asked[:, 0]).tolist() == [True, True, True, False]

    def test_where_nothing_was_asked_an_image_has_to_be_legible(self) -> None:
        fore, back = color_pairs()[0]
        same = _output([5, 6], [fore, fore], [back, fore])
        assert same.as_asked(None).tolist() == [True, False]
        assert _output([5], [fore], [back], certainty=3.0).as_asked(None).tolist() == [False]


def test_only_the_questions_that_were_asked_count(reader: GlyphReader) -> None:
    images, labels = render_many(check.HELD_OUT_SEED, 5000, 60)
    asked = labels[:, [0, 2, 3]]
    right = read_as_asked(reader, images, asked)
    assert right.shape == (60,)
    assert right.sum() >= 58
    wrong = asked.copy()
    wrong[:20, 2] = (wrong[:20, 2] + 1) % len(COLORS)
    assert read_as_asked(reader, images, wrong).tolist() == [False] * 20 + right[20:].tolist()
    assert read_as_asked(reader, images, wrong[:, 0]).sum() >= 58


@pytest.mark.parametrize("questions", range(len(QUESTIONS) + 1))
def test_renders_are_read_whatever_is_asked(reader: GlyphReader, questions: int) -> None:
    asked = None if questions == 0 else np.zeros((4, questions), dtype=int)
    images, labels = GlyphTask(None, asked).renders(100, 300)  # type: ignore[arg-type]
    assert read_as_asked(reader, images, labels).mean() >= (0.95 if questions == 0 else 0.99)


def test_renders_are_of_the_subset_that_was_asked_for() -> None:
    images, asked = GlyphTask(None, subset=BOLD_DIGITS).renders(100, 50)  # type: ignore[arg-type]
    expected, labels = render_many(check.HELD_OUT_SEED, 100, 50, BOLD_DIGITS)
    assert asked is None
    np.testing.assert_array_equal(images, expected)
    assert labels[:, LABELS.index("character")].max() == 9


def test_most_images_without_a_character_are_illegible(reader: GlyphReader) -> None:
    chimeras = check.chimeras(300)
    noise = np.random.default_rng(0).integers(256, size=(300, 32, 32, 3)).astype(np.uint8)
    blank = np.repeat(render_many(check.HELD_OUT_SEED, 0, 100)[0][:, :1, :1], 32, 1).repeat(32, 2)
    assert read_as_asked(reader, chimeras, None).mean() < 0.4  # some halves do make a character: E over F, say
    assert read_as_asked(reader, noise, None).mean() < 0.1
    assert read_as_asked(reader, blank, None).mean() < 0.02


def test_batches_are_read_as_all_at_once(reader: GlyphReader) -> None:
    images, labels = render_many(check.HELD_OUT_SEED, 0, 300)  # more than one batch
    asked = labels[:, [0, 2, 3]]
    asked[::3, 0] += 1
    at_once = check.share_read(reader, to_tensor(images), asked)
    assert read_as_asked(reader, images, asked).mean() == pytest.approx(at_once)


class TestAsking:
    def test_every_image_has_its_own_caption(self) -> None:
        glyphs = glyph_task(UNET_PIPELINES["StableDiffusionPipeline"].build(), 40, seed=3, guidance_scale=2.5)
        given = glyphs.task.arguments(range(36, 39))
        assert glyphs.asked is not None
        assert given["prompt"] == [caption(*glyphs.asked[index]) for index in (36, 37, 38)]
        assert given["guidance_scale"] == 2.5
        assert (glyphs.questions, glyphs.subset, glyphs.reference) == (3, None, "zoo:glyphs")
        # More images than were asked for come to the first ones again.
        assert glyphs.task.arguments(range(40, 41))["prompt"] == [caption(*glyphs.asked[0])]

    def test_an_unconditional_pipeline_is_asked_for_a_number(self) -> None:
        glyphs = glyph_task(UNET_PIPELINES["DDPMPipeline"].build(), 40, seed=3, guidance_scale=2.5)
        given = glyphs.task.arguments(range(36, 39))
        assert {name: value for name, value in given.items() if name != "generator"} == {"batch_size": 3}
        assert (glyphs.asked, glyphs.questions, glyphs.subset) == (None, 0, BOLD_DIGITS)

    def test_a_class_conditional_pipeline_is_asked_for_characters(self) -> None:
        glyphs = glyph_task(TINY_PIPELINES["DiTPipeline"].build(), 40, seed=3, guidance_scale=2.5)
        given = glyphs.task.arguments(range(35, 38))
        assert (given["class_labels"], given["guidance_scale"], glyphs.questions) == ([35, 0, 1], 2.5, 1)

    def test_a_pipeline_that_cannot_be_asked_is_refused(self) -> None:
        class Upscaler(DiffusionPipeline):
            def __call__(self, image: object) -> None: ...

        with pytest.raises(ConfigError, match="Upscaler has to be asked for something"):
            glyph_task(Upscaler(), 4)
