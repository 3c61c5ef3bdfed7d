"""Reads U-ViT checkpoints in the layout in which they were published."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from fastdiff.errors import ConfigError
from fastdiff.models.uvit import UViT

_OUTSIDE_BLOCKS = {
    "patch_embed.proj": "patch_embed",
    "time_embed.0": "time_embed.linear_1",
    "time_embed.2": "time_embed.linear_2",
    "label_emb": "class_embed",
    "context_embed": "context_embed",
    "norm": "norm_out",
    "decoder_pred": "proj_out",
    "final_layer": "conv_out",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm3",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_BLOCK = re.compile(r"(?:(in|out)_blocks\.(\d+)|mid_block)\.(.+)\.(weight|bias)")
_UNCERTAINTY = "lte_classifer."  # as the AdaDiff checkpoints spell it
_HEADS = {1152: 16}  # of the published sizes only the largest has heads of other than 64 channels
_USUAL_HEAD_DIM = 64


def convert_uvit_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    *,
    num_attention_heads: int | None = None,
    context_length: int = 77,
    null_class: bool | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Turn a published U-ViT checkpoint into a configuration and the weights of a `UViT`.

    Load the checkpoint yourself: with `safetensors.torch.load_file`, or, where it is a ``.pth`` file,
    ``torch.load(path, map_location="cpu", weights_only=True)``, which runs no code from the file. Then::

        config, weights = convert_uvit_state_dict(state_dict)
        model = UViT(**config)
        model.load_state_dict(weights)

    Checkpoints of AdaDiff are read too; their uncertainty estimators are no part of the denoiser and are left out.

    Args:
        state_dict: the published keys, such as ``in_blocks.0.attn.qkv.weight``. Stays as it is.
        num_attention_heads: heads of each attention, which the weights do not tell; None for those of the published
            models of this width.
        context_length: text embeddings of a text-conditional model, which the weights do not tell either.
        null_class: whether the last class stands for no class; None guesses so if the table has one row more than a
            multiple of ten.

    Returns:
        Keyword arguments of `UViT`, and its state dict, in the dtype given.

    Raises:
        ConfigError: naming the keys that are unknown or missing, or the shape that fits no U-ViT.
    """
    known = {key: value for key, value in state_dict.items() if not key.startswith(_UNCERTAINTY)}
    converted: dict[str, torch.Tensor] = {}
    unknown = []
    for key, value in known.items():
        renamed = _rename(key)
        if renamed is None:
            unknown.append(key)
        elif renamed.endswith((".qkv.weight", ".qkv.bias")):
            stem, kind = renamed.rsplit(".qkv.", 1)
            for name, part in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
                converted[f"{stem}.{name}.{kind}"] = part.clone()  # safetensors refuses to save views of one tensor
        else:
            converted[renamed] = value
    if unknown:
        raise ConfigError(f"These keys are not of a U-ViT checkpoint: {_few(unknown)}. {_EXPECTED}")
    config = _config(known, num_attention_heads, context_length, null_class)
    _check(config, converted)
    return config, converted


_EXPECTED = (
    "Expected is what the published code saves for its network, e.g. 'in_blocks.0.attn.qkv.weight'; unwrap a "
    "checkpoint that holds more than that, and take prefixes such as 'module.' off."
)


def _rename(key: str) -> str | None:
    """Our name of a published key; that of fused queries, keys and values ends in ``attn1.qkv``."""
    if key == "pos_embed":
        return key
    if match := _BLOCK.fullmatch(key):
        half, number, name, kind = match.groups()
        place = "transformer_mid_block" if half is None else f"transformer_{half}_blocks.{number}"
        if name == "skip_linear":
            return f"{place}.skip.skip_linear.{kind}" if half == "out" else None
        own = "attn1.qkv" if name == "attn.qkv" else _IN_BLOCK.get(name)
        inner = ".block" if half == "out" else ""
        return None if own is None else f"{place}{inner}.{own}.{kind}"
    module, _, kind = key.rpartition(".")
    return f"{_OUTSIDE_BLOCKS[module]}.{kind}" if module in _OUTSIDE_BLOCKS else None


def _config(
    weights: Mapping[str, torch.Tensor], heads: int | None, context_length: int, null_class: bool | None
) -> dict[str, Any]:
    """What the shapes of the published weights tell."""
    needed = ("pos_embed", "patch_embed.proj.weight", "mid_block.mlp.fc1.weight", "decoder_pred.weight")
    if missing := [key for key in needed if key not in weights]:
        raise ConfigError(f"The checkpoint lacks {_few(missing)}. {_EXPECTED}")
    width, channels, patch_size = weights["patch_embed.proj.weight"].shape[:3]
    heads = heads or _HEADS.get(width) or max(width // _USUAL_HEAD_DIM, 1)
    if width % heads:
        raise ConfigError(f"Tokens of {width} channels cannot be shared by {heads} heads; give num_attention_heads.")
    classes = len(weights["label_emb.weight"]) if "label_emb.weight" in weights else None
    if null_class is None:
        null_class = classes is None or classes % 10 == 1
    context = weights["context_embed.weight"].shape[1] if "context_embed.weight" in weights else None
    extra = 1 + (classes is not None) + (context_length if context is not None else 0)
    patches = weights["pos_embed"].shape[1] - extra
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise ConfigError(
            f"Of {patches + extra} places in pos_embed, {extra} are not patches; the other {patches} make no square. "
            "Give the context_length that the checkpoint was trained with."
        )
    return {
        "sample_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "num_layers": 2 * len({key.split(".")[1] for key in weights if key.startswith("in_blocks.")}),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "mlp_ratio": len(weights["mid_block.mlp.fc1.weight"]) / width,
        "attention_bias": "mid_block.attn.qkv.bias" in weights,
        "time_embed_mlp": "time_embed.0.weight" in weights,
        "num_classes": None if classes is None else classes - null_class,
        "null_class": null_class,
        "context_dim": context,
        "context_length": context_length,
        "final_conv": "final_layer.weight" in weights,
    }


def _check(config: dict[str, Any], converted: Mapping[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        expected = UViT(**config).state_dict()
    if missing := sorted(expected.keys() - converted.keys()):
        raise ConfigError(f"The checkpoint lacks what becomes {_few(missing)}. {_EXPECTED}")
    if unknown := sorted(converted.keys() - expected.keys()):
        raise ConfigError(f"The checkpoint has more than its other weights ask for, as {_few(unknown)}. {_EXPECTED}")
    shapes = {key: (tuple(converted[key].shape), tuple(value.shape)) for key, value in expected.items()}
    if wrong := [f"{key} {given} for {asked}" for key, (given, asked) in shapes.items() if given != asked]:
        raise ConfigError(f"The checkpoint's shapes do not fit each other: {_few(wrong)}.")


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
