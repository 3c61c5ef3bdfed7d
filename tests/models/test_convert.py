"""Published U-ViT weights: the paper's formulas on weights in the published layout, against the converted model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastdiff import ConfigError
from fastdiff.models import UViT, convert_uvit_state_dict

Weights = dict[str, torch.Tensor]

WIDTH, HEADS, PATCH, SIZE, CHANNELS = 32, 4, 2, 8, 3
HALF = 2
CLASSES, TEXT_DIM, TEXT_TOKENS = 11, 12, 5
VARIANTS: dict[str, dict[str, bool]] = {
    "unconditional": {},
    "classes": {"classes": True},
    "classes, no convolution": {"classes": True, "conv": False},
    "text": {"text": True},
    "everything optional": {"classes": True, "time_mlp": True, "qkv_bias": True},
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def published_weights(
    classes: bool = False, text: bool = False, conv: bool = True, time_mlp: bool = False, qkv_bias: bool = False
) -> Weights:
    """Random weights with the names and shapes of a published checkpoint."""
    generator = torch.Generator().manual_seed(0)
    weights: Weights = {}

    def draw(name: str, *shape: int, scale: float | None = None) -> None:
        fan_in = math.prod(shape[1:]) or 1
        weights[name] = torch.randn(shape, generator=generator) * (scale or fan_in**-0.5)

    def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        draw(f"{name}.weight", outputs, inputs)
        if bias:
            draw(f"{name}.bias", outputs, scale=0.1)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        draw(f"{name}.bias", WIDTH, scale=0.1)

    extra = 1 + classes + (TEXT_TOKENS if text else 0)
    draw("pos_embed", 1, extra + (SIZE // PATCH) ** 2, WIDTH, scale=0.5)
    draw("patch_embed.proj.weight", WIDTH, CHANNELS, PATCH, PATCH)
    draw("patch_embed.proj.bias", WIDTH, scale=0.1)
    if time_mlp:
        linear("time_embed.0", 4 * WIDTH, WIDTH)
        linear("time_embed.2", WIDTH, 4 * WIDTH)
    if classes:
        draw("label_emb.weight", CLASSES, WIDTH, scale=1.0)
    if text:
        linear("context_embed", WIDTH, TEXT_DIM)
    for place in [*(f"in_blocks.{i}" for i in range(HALF)), "mid_block", *(f"out_blocks.{i}" for i in range(HALF))]:
        norm(f"{place}.norm1")
        linear(f"{place}.attn.qkv", 3 * WIDTH, WIDTH, bias=qkv_bias)
        linear(f"{place}.attn.proj", WIDTH, WIDTH)
        norm(f"{place}.norm2")
        linear(f"{place}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"{place}.mlp.fc2", WIDTH, 4 * WIDTH)
        if place.startswith("out"):
            linear(f"{place}.skip_linear", WIDTH, 2 * WIDTH)
    norm("norm")
    linear("decoder_pred", PATCH**2 * CHANNELS, WIDTH)
    if conv:
        draw("final_layer.weight", CHANNELS, CHANNELS, 3, 3)
        draw("final_layer.bias", CHANNELS, scale=0.1)
    return weights


class Published:
    """What the paper computes, in formulas on a checkpoint's tensors."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        fused = self.linear(f"{name}.qkv", x)
        heads = []
        for head in range(HEADS):
            size = WIDTH // HEADS
            query, key, value = (
                fused[..., part * WIDTH + head * size : part * WIDTH + (head + 1) * size] for part in range(3)
            )
            scores = query @ key.mT / math.sqrt(size)
            heads.append(scores.softmax(-1) @ value)
        return self.linear(f"{name}.proj", torch.cat(heads, -1))

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x))
        hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + self.linear(f"{name}.mlp.fc2", gelu)

    def time(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = WIDTH // 2
        frequencies = torch.tensor([10_000 ** (-index / half) for index in range(half)])
        angles = timesteps[:, None].float() * frequencies
        token = torch.cat([angles.cos(), angles.sin()], -1)
        if "time_embed.0.weight" in self.weights:
            hidden = self.linear("time_embed.0", token)
            token = self.linear("time_embed.2", hidden * hidden.sigmoid())
        return token[:, None]

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, y: Any = None, context: Any = None) -> torch.Tensor:
        rows = SIZE // PATCH
        kernel = self.weights["patch_embed.proj.weight"].flatten(1)
        cut = [
            x[:, :, PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)].flatten(1)
            for i in range(rows)
            for j in range(rows)
        ]
        tokens = torch.stack(cut, 1) @ kernel.T + self.weights["patch_embed.proj.bias"]
        text = [] if context is None else [self.linear("context_embed", context)]
        tokens = torch.cat([self.time(timesteps), *text, tokens], 1)
        if y is not None:
            tokens = torch.cat([self.weights["label_emb.weight"][y][:, None], tokens], 1)
        tokens = tokens + self.weights["pos_embed"]
        skips = []
        for index in range(HALF):
            tokens = self.block(f"in_blocks.{index}", tokens)
            skips.append(tokens)
        tokens = self.block("mid_block", tokens)
        for index in range(HALF):
            tokens = self.linear(f"out_blocks.{index}.skip_linear", torch.cat([tokens, skips.pop()], -1))
            tokens = self.block(f"out_blocks.{index}", tokens)
        patches = self.linear("decoder_pred", self.norm("norm", tokens))[:, -(rows**2) :]
        image = torch.zeros(len(x), CHANNELS, SIZE, SIZE)
        for place, (i, j) in enumerate((i, j) for i in range(rows) for j in range(rows)):
            patch = patches[:, place].reshape(-1, PATCH, PATCH, CHANNELS).permute(0, 3, 1, 2)
            image[:, :, PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)] = patch
        if "final_layer.weight" not in self.weights:
            return image
        return F.conv2d(image, self.weights["final_layer.weight"], self.weights["final_layer.bias"], padding=1)


def convert(weights: Weights, **settings: Any) -> tuple[dict[str, Any], Weights]:
    return convert_uvit_state_dict(weights, num_attention_heads=HEADS, context_length=TEXT_TOKENS, **settings)


@EVERY_VARIANT
def test_converted_model_computes_the_published_formulas(variant: str) -> None:
    options = VARIANTS[variant]
    weights = published_weights(**options)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS, SIZE, SIZE, generator=generator)
    timesteps = torch.tensor([999.0, 123.5])
    y = torch.tensor([3, CLASSES - 1]) if options.get("classes") else None
    context = torch.randn(2, TEXT_TOKENS, TEXT_DIM, generator=generator) if options.get("text") else None

    config, converted = convert(weights)
    model = UViT(**config).eval()
    model.load_state_dict(converted)
    with torch.no_grad():
        predicted = model(x, timesteps, class_labels=y, encoder_hidden_states=context).sample
    expected = Published(weights)(x, timesteps, y, context)
    assert expected.std() > 0.1
    assert torch.allclose(predicted, expected, rtol=0, atol=1e-5)


@EVERY_VARIANT
def test_configuration_is_read_off_the_shapes(variant: str) -> None:
    options = VARIANTS[variant]
    config, _ = convert(published_weights(**options))
    assert config == {
        "sample_size": SIZE,
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "num_layers": 2 * HALF,
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH // HEADS,
        "mlp_ratio": 4.0,
        "attention_bias": options.get("qkv_bias", False),
        "time_embed_mlp": options.get("time_mlp", False),
        "num_classes": CLASSES - 1 if options.get("classes") else None,
        "null_class": True,
        "context_dim": TEXT_DIM if options.get("text") else None,
        "context_length": TEXT_TOKENS,
        "final_conv": options.get("conv", True),
    }


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (512, 8), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_published_sizes(width: int, heads: int) -> None:
    from fastdiff.models.convert import _config

    weights = {
        "pos_embed": torch.empty(1, 17, width, device="meta"),
        "patch_embed.proj.weight": torch.empty(width, 3, 2, 2, device="meta"),
        "mid_block.mlp.fc1.weight": torch.empty(4 * width, width, device="meta"),
        "decoder_pred.weight": torch.empty(12, width, device="meta"),
    }
    assert _config(weights, None, 77, None)["num_attention_heads"] == heads


def test_null_class_is_guessed_and_can_be_told() -> None:
    weights = published_weights(classes=True)
    assert convert(weights, null_class=False)[0]["num_classes"] == CLASSES
    weights["label_emb.weight"] = weights["label_emb.weight"][:10]
    assert convert(weights)[0]["num_classes"] == 10
    assert convert(weights)[0]["null_class"] is False
    assert convert(weights, null_class=True)[0]["num_classes"] == 9


def test_uncertainty_estimators_are_left_out_and_the_rest_is_untouched(tmp_path: Path) -> None:
    weights = published_weights()
    estimators = {f"lte_classifer.{i}.lte.{kind}": torch.zeros(2) for i in range(5) for kind in ("weight", "bias")}
    config, converted = convert(weights)
    again_config, again = convert(weights | estimators)
    assert again_config == config
    assert again.keys() == converted.keys()
    assert set(weights) == set(published_weights())
    save_file(converted, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == converted.keys()


def without(*keys: str) -> Weights:
    return {key: value for key, value in published_weights().items() if key not in keys}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "lacks pos_embed, patch_embed.proj.weight.* and 1 more"),
        ({"model": torch.zeros(1)}, "not of a U-ViT checkpoint: model"),
        ({f"module.{key}": value for key, value in published_weights().items()}, r"not of.*module\.pos_embed"),
        (published_weights() | {"cls_token": torch.zeros(1)}, "not of a U-ViT checkpoint: cls_token"),
        (published_weights() | {"in_blocks.0.skip_linear.bias": torch.zeros(1)}, r"in_blocks\.0\.skip_linear"),
        (published_weights() | {"in_blocks.0.attn.scale.weight": torch.zeros(1)}, r"in_blocks\.0\.attn\.scale"),
        (published_weights() | {"out_blocks.2.norm1.bias": torch.zeros(WIDTH)}, "more than its other weights"),
        (without("mid_block.norm1.bias"), r"lacks what becomes transformer_mid_block\.norm1\.bias"),
        (without("out_blocks.1.skip_linear.weight"), r"lacks what becomes transformer_out_blocks\.1\.skip"),
        (without("decoder_pred.weight"), r"lacks decoder_pred\.weight"),
        (published_weights() | {"pos_embed": torch.zeros(1, 16, WIDTH)}, "make no square.*context_length"),
        (published_weights() | {"norm.weight": torch.zeros(7)}, r"norm_out\.weight \(7,\) for \(32,\)"),
    ],
    ids=range(12),
)
def test_checkpoint_that_is_none_is_refused(weights: Weights, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(weights)


def test_heads_that_do_not_share_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="32 channels cannot be shared by 5 heads"):
        convert_uvit_state_dict(published_weights(), num_attention_heads=5)
