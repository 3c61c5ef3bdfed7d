"""Judging glyph images: what was asked of them decides whether they are read correctly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff import zoo
from fastdiff.eval.glyphs import GlyphJudge
from fastdiff.zoo import check
from fastdiff.zoo.data import BOLD_DIGITS, CHARACTERS, COLORS, color_pairs, render_many, to_tensor
from fastdiff.zoo.reader import QUESTIONS, GlyphReader, GlyphReaderOutput


@pytest.fixture(scope="module")
def judge() -> GlyphJudge:
    return GlyphJudge(GlyphReader.from_pretrained(zoo.path("glyphs-cnn")), renders=100)


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


def test_judge_counts_the_questions_that_were_asked(judge: GlyphJudge) -> None:
    images, labels = render_many(check.HELD_OUT_SEED, 5000, 60)
    asked = labels[:, [0, 2, 3]]
    right = judge.score(images, asked)
    assert right.correct >= 58
    wrong = asked.copy()
    wrong[:20, 2] = (wrong[:20, 2] + 1) % len(COLORS)
    assert judge.score(images, wrong).correct == judge.score(images[20:], asked[20:]).correct
    assert judge.score(images, wrong[:, 0]).correct >= 58
    assert judge.score(images, wrong).fid == judge.score(images).fid == right.fid


@pytest.mark.parametrize("questions", range(len(QUESTIONS) + 1))
def test_renders_are_read_whatever_is_asked(judge: GlyphJudge, questions: int) -> None:
    score = judge.score_renders(300, questions)
    assert score.read_share >= (0.95 if questions == 0 else 0.99)


def test_a_judge_of_a_subset_is_nearer_to_it(judge: GlyphJudge) -> None:
    reader = GlyphReader.from_pretrained(zoo.path("glyphs-cnn"))
    digits = GlyphJudge(reader, renders=100, subset=BOLD_DIGITS)
    images, labels = render_many(digits.seed, digits.renders, 100, BOLD_DIGITS)
    assert labels[:, 0].max() == 9
    assert digits.score_renders(100, 0).fid == digits.score(images).fid < judge.score(images).fid


def test_most_images_without_a_character_are_illegible(judge: GlyphJudge) -> None:
    chimeras = check.chimeras(300)
    noise = np.random.default_rng(0).integers(256, size=(300, 32, 32, 3)).astype(np.uint8)
    blank = np.repeat(render_many(check.HELD_OUT_SEED, 0, 100)[0][:, :1, :1], 32, 1).repeat(32, 2)
    assert judge.score(chimeras).read_share < 0.4  # some halves do make a character: E over F, say
    assert judge.score(noise).read_share < 0.1
    assert judge.score(blank).read_share < 0.02


def test_a_judge_of_batches_judges_as_the_reader_at_once(judge: GlyphJudge) -> None:
    images, labels = render_many(check.HELD_OUT_SEED, 0, 300)  # more than one batch
    reader = GlyphReader.from_pretrained(zoo.path("glyphs-cnn")).eval()
    asked = labels[:, [0, 2, 3]]
    asked[::3, 0] += 1
    assert judge.score(images, asked).read_share == pytest.approx(check.share_read(reader, to_tensor(images), asked))
