"""What is asked of a glyph model in words: captions of glyph images, and the tokenizer that reads them.

`caption` is the phrase that samples are asked with; training also sees the other phrasings of ``PHRASES``. The
tokenizer is a byte-level BPE as CLIP's is, with merges of our own: every word of a caption is one token and any other
text falls into smaller pieces, so nothing is unknown.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from .data import CHARACTERS, COLORS, color_pairs

PHRASES = (
    "{a_fore} {kind} {character} on {a_back} background",
    "{fore} {kind} {character} on {back}",
    "the {kind} {character} in {fore} on {a_back} background",
    "{a_back} background with {a_fore} {kind} {character}",
    "{a_fore} {character} on {back}",
)
"""All that a caption may look like; the first is what `caption` says."""

MAX_TOKENS = 16
"""Length of a tokenised caption with its start and end: the longest phrase takes 11."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(character: int, foreground: int, background: int, phrase: int = 0) -> str:
    """The caption of an image, such as "a red letter K on a white background".

    Args:
        character: index into ``CHARACTERS``.
        foreground: index into ``COLORS``.
        background: index into ``COLORS``.
        phrase: index into ``PHRASES``.
    """
    fore, back = COLORS[foreground], COLORS[background]
    return PHRASES[phrase].format(
        character=CHARACTERS[character],
        kind="digit" if CHARACTERS[character].isdigit() else "letter",
        fore=fore,
        back=back,
        a_fore=_with_article(fore),
        a_back=_with_article(back),
    )


def caption_sequence(count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Captions to evaluate with: every character in turn, in contrasting colours.

    Args:
        count: number of captions; a multiple of 36 has every character equally often.
        seed: seed of the colours.

    Returns:
        The captions, and what they ask for: int64 (count, 3), character, foreground and background.
    """
    pairs = np.array(color_pairs())
    characters = np.arange(count) % len(CHARACTERS)
    chosen = pairs[np.random.default_rng(seed).integers(len(pairs), size=count)]
    asked = np.column_stack([characters, chosen]).astype(np.int64)
    return [caption(*row) for row in asked.tolist()], asked


def all_captions(phrase: int) -> Iterator[str]:
    """Every caption of one phrase: characters outermost, backgrounds innermost."""
    counts = (len(CHARACTERS), len(COLORS), len(COLORS))
    for character, fore, back in itertools.product(*map(range, counts)):
        yield caption(character, fore, back, phrase)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Joins the most frequent pair of neighbours until every word is one piece."""
    pieces = [(*word[:-1], word[-1] + _WORD_END) for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)


def write_tokenizer(folder: Path) -> None:
    """Writes ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``, the files of a `CLIPTokenizer`."""
    texts = (text for phrase in range(len(PHRASES)) for text in all_captions(phrase))
    words = sorted({word for text in texts for word in text.lower().split()})
    merges = _merges(words)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes, each as a printable character
    pieces = [*letters, *(letter + _WORD_END for letter in letters), *(left + right for left, right in merges)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, _START, _END])}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer that `write_tokenizer` wrote."""
    return CLIPTokenizer.from_pretrained(folder)
