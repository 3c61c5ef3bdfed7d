"""What is asked in words: captions, the prompts of evaluations, and the tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from fastdiff import zoo
from fastdiff.zoo import captions, data


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    captions.write_tokenizer(folder)
    return captions.load_tokenizer(folder)


def _label(character: str, foreground: str, background: str) -> tuple[int, int, int]:
    return data.CHARACTERS.index(character), data.COLORS.index(foreground), data.COLORS.index(background)


def test_captions_read_as_english() -> None:
    assert captions.caption(*_label("K", "red", "blue")) == "a red letter K on a blue background"
    assert captions.caption(*_label("7", "white", "black")) == "a white digit 7 on a black background"
    assert captions.caption(*_label("A", "orange", "purple")) == "an orange letter A on a purple background"
    assert captions.caption(*_label("0", "blue", "orange"), phrase=3) == "an orange background with a blue digit 0"


@pytest.mark.parametrize("phrase", range(len(captions.PHRASES)))
def test_every_caption_of_a_phrase_is_different(phrase: int) -> None:
    texts = list(captions.all_captions(phrase))
    assert len(texts) == len(set(texts)) == 36 * 10 * 10
    assert texts[1234] == captions.caption(12, 3, 4, phrase)


class TestSequence:
    def test_is_the_same_for_the_same_seed_and_begins_alike_whatever_its_length(self) -> None:
        texts, asked = captions.caption_sequence(50, seed=3)
        again, asked_again = captions.caption_sequence(50, seed=3)
        assert texts == again
        assert np.array_equal(asked, asked_again)
        assert captions.caption_sequence(20, seed=3)[0] == texts[:20]
        assert captions.caption_sequence(50, seed=4)[0] != texts

    def test_asks_every_character_equally_often_in_contrasting_colours(self) -> None:
        texts, asked = captions.caption_sequence(720)
        assert (asked.shape, asked.dtype) == ((720, 3), np.int64)
        assert set(Counter(asked[:, 0].tolist()).values()) == {20}
        assert {tuple(pair) for pair in asked[:, 1:].tolist()} == set(data.color_pairs())
        assert texts == [captions.caption(*row) for row in asked.tolist()]

    def test_may_be_empty(self) -> None:
        texts, asked = captions.caption_sequence(0)
        assert texts == []
        assert asked.shape == (0, 3)


class TestTokenizer:
    @pytest.mark.parametrize("phrase", range(len(captions.PHRASES)))
    def test_every_word_of_a_caption_is_one_token(self, tokenizer: CLIPTokenizer, phrase: int) -> None:
        texts = list(captions.all_captions(phrase))
        for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
            words = [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]
            assert words == ["<|startoftext|>", *text.lower().split(), "<|endoftext|>"]
            assert len(ids) <= captions.MAX_TOKENS

    @pytest.mark.parametrize("text", ["zebra", "grün ✓ 12%", "\n\t", "日本", "'s <b>", "a" * 500])
    def test_any_other_text_falls_into_known_pieces(self, tokenizer: CLIPTokenizer, text: str) -> None:
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1])
        spelled = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(spelled.split()) == "".join(text.lower().split())

    def test_pads_and_cuts_to_the_length_of_the_text_encoder(self, tokenizer: CLIPTokenizer) -> None:
        assert tokenizer.model_max_length == captions.MAX_TOKENS
        options = {"padding": "max_length", "truncation": True}
        short, long = tokenizer(["a", "red " * 40], **options).input_ids
        assert len(short) == len(long) == captions.MAX_TOKENS
        assert set(short[2:]) == {tokenizer.pad_token_id}

    def test_files_are_the_same_each_time_and_the_shipped_ones(self, tmp_path: Path) -> None:
        captions.write_tokenizer(tmp_path / "first")
        captions.write_tokenizer(tmp_path / "second")
        for file in sorted((tmp_path / "first").iterdir()):
            assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
            assert file.read_bytes() == (zoo.path("glyphs-sd") / "tokenizer" / file.name).read_bytes()

    def test_numbers_its_tokens_without_a_gap(self, tmp_path: Path) -> None:
        captions.write_tokenizer(tmp_path)
        vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
        assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
