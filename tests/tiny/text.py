"""Tiny encoders of prompts and images, and tokenizers from files of their own: nothing is downloaded."""

from __future__ import annotations

import functools
import json
import string
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from .base import TEXT_DIM, build

PROMPT_TOKENS = 12
"""Length to which every prompt is padded."""
IMAGE_SIZE = 224
"""Height and width of the images that the vision encoder takes."""
START, END = "<|startoftext|>", "<|endoftext|>"
_LETTERS = string.ascii_lowercase


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """Returns a CLIP tokenizer that spells words letter by letter."""
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), START, END]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=PROMPT_TOKENS)
    assert len(tokenizer) == len(tokens), "transformers made a tokenizer of something else than our files"
    return tokenizer


@functools.cache
def bert_tokenizer() -> BertTokenizer:
    """Returns a BERT tokenizer that spells words letter by letter."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
        tokenizer = BertTokenizer.from_pretrained(folder, model_max_length=PROMPT_TOKENS)
    assert len(tokenizer) == len(tokens), "transformers made a tokenizer of something else than our files"
    return tokenizer


def encoder(cls: type[nn.Module], config: Any, seed: int = 0) -> nn.Module:
    """Returns a transformers model with seeded weights."""
    return build(functools.partial(cls, config), {}, seed=seed)


_SHAPE = {"hidden_size": TEXT_DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def text_encoder(projection: int = 0, width: int = TEXT_DIM, seed: int = 0) -> nn.Module:
    """Returns a CLIP text encoder.

    Args:
        projection: width of the projected pooled prompt; 0 for the class without projection.
        width: width of the hidden states.
        seed: seed of the weights.
    """
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        **_SHAPE | {"hidden_size": width},
        vocab_size=len(tokenizer),
        max_position_embeddings=PROMPT_TOKENS,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return encoder(CLIPTextModelWithProjection if projection else CLIPTextModel, config, seed)


def image_encoder(projection: int = TEXT_DIM) -> CLIPVisionModelWithProjection:
    """Returns a CLIP image encoder whose embeddings are as wide as `projection`."""
    config = CLIPVisionConfig(**_SHAPE, image_size=IMAGE_SIZE, patch_size=IMAGE_SIZE // 2, projection_dim=projection)
    return encoder(CLIPVisionModelWithProjection, config)


def image_processor() -> CLIPImageProcessor:
    """Returns what prepares images for the image encoder."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
