"""Heads of queries and keys in Flux and Stable Diffusion 3.5, and output layers of DiT: which operation runs when."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from kernel_checks.patched import build, call, inputs
from torch import nn

import fastdiff
from fastdiff.kernels import exit_head, qk_norm_rope
from tiny.base import build as build_model
from tiny.joint import SD3

QUERIES_AND_KEYS = 2
OPERATIONS = {"qk_norm_rope": qk_norm_rope, "exit_head": exit_head}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operation ran, by its reference."""
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    calls: Counter[str] = Counter()
    for name, module in OPERATIONS.items():
        run = getattr(module, name)

        def counting(*args: Any, name: str = name, run: Any = run, **kwargs: Any) -> Any:
            calls[name] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)
    return calls


def streams(model: nn.Module) -> int:
    """Returns how many streams the attention layers of a model read."""
    layers = [module for module in model.modules() if hasattr(module, "norm_added_q") or hasattr(module, "norm_q")]
    return sum(2 if getattr(layer, "norm_added_q", None) is not None else 1 for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["fused", "match_eager"])
@pytest.mark.parametrize("name", ["Flux", "SD3.5", "DiT", "U-ViT"])
def test_which_operations_run(name: str, rounding: Any, dtype: torch.dtype, called: Counter[str]) -> None:
    model, arguments = build(name, dtype), inputs(name, dtype)
    call(model, arguments)
    fastdiff.optimize(model, rounding=rounding)
    assert not called
    call(model, arguments)
    expected: Counter[str] = Counter()
    if name in ("DiT", "U-ViT"):
        expected["exit_head"] = int(rounding == "fused")
    elif (name, rounding, dtype) != ("SD3.5", "match_eager", torch.bfloat16):  # its norm rounds once more
        expected["qk_norm_rope"] = QUERIES_AND_KEYS * streams(model)
        assert streams(model) > 4
    assert called == expected


# -- what is left as it is ---------------------------------------------------------------------------------------------


class OtherProcessor(FluxAttnProcessor):
    """One that nobody knows."""


def test_flux_layers_are_left_with_a_reason() -> None:
    model, arguments = build("Flux"), inputs("Flux")
    first, second, third = (model.transformer_blocks[index].attn for index in range(3))
    first.set_processor(OtherProcessor())
    second.fuse_projections()
    third.norm_k = nn.LayerNorm(third.head_dim)
    plain = call(model, arguments)
    report = fastdiff.optimize(model)
    assert {name: reason for name, reason in report.left.items() if name.endswith("attn")} == {
        "transformer_blocks.0.attn": "FluxAttention: its processor is OtherProcessor, not FluxAttnProcessor",
        "transformer_blocks.1.attn": "FluxAttention: its projections are fused",
        "transformer_blocks.2.attn": "FluxAttention: a norm of its heads is LayerNorm, not an RMSNorm without bias",
    }
    assert "single_transformer_blocks.0.attn" in report.replaced
    assert torch.equal(call(model, arguments), plain)


def test_without_norms_there_is_nothing_to_gain() -> None:
    model = build_model(SD3Transformer2DModel, SD3 | {"qk_norm": None, "dual_attention_layers": ()})
    report = fastdiff.optimize(model)
    assert report.left["transformer_blocks.0.attn"] == "Attention: it does not normalise queries and keys"
    assert "transformer_blocks.0" in report.replaced


def test_what_is_changed_later_is_respected(called: Counter[str]) -> None:
    model, arguments = build("Flux"), inputs("Flux")
    fastdiff.optimize(model)
    other = copy.deepcopy(model)
    fastdiff.restore(other)
    for each in (model, other):
        for block in (*each.transformer_blocks, *each.single_transformer_blocks):
            block.attn.set_processor(OtherProcessor())
    fastdiff.optimize(other)
    assert torch.equal(call(model, arguments), call(other, arguments))
    assert not called
    for each in (model, other):
        for block in each.transformer_blocks:
            block.attn.set_processor(FluxAttnProcessor())
            block.attn.fuse_projections()
    call(model, arguments)
    assert not called


def test_hooks_on_norms_of_heads_are_called(called: Counter[str]) -> None:
    model, arguments, seen = build("SD3.5"), inputs("SD3.5"), []
    plain = call(model, arguments)
    fastdiff.optimize(model, rounding="match_eager")
    norms = [module for name, module in model.named_modules() if ".norm_" in name and "attn" in name]
    for norm in norms:
        norm.register_forward_hook(lambda *arguments: seen.append(arguments[0]))
    assert torch.equal(call(model, arguments), plain)
    assert len(seen) == len(norms) == QUERIES_AND_KEYS * streams(model)
    assert not called


@torch.no_grad()
def test_flux_attention_takes_what_its_processor_takes(called: Counter[str]) -> None:
    torch.manual_seed(0)
    attn = FluxAttention(32, heads=2, dim_head=16, added_kv_proj_dim=32, bias=True).eval()
    image, text = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    angles = torch.randn(8, 16), torch.randn(8, 16)
    mask = torch.zeros(2, 1, 1, 8).index_fill(3, torch.tensor([2]), float("-inf"))
    variants = [
        {"encoder_hidden_states": text},
        {"encoder_hidden_states": text, "image_rotary_emb": angles},
        {"encoder_hidden_states": text, "image_rotary_emb": angles, "attention_mask": mask},
        {"encoder_hidden_states": text, "image_rotary_emb": tuple(part.double() for part in angles)},
    ]
    expected = [attn(image, **variant) for variant in variants]
    fastdiff.optimize(attn, rounding="match_eager")
    for variant, parts in zip(variants, expected, strict=True):
        called.clear()
        assert all(map(torch.equal, attn(image, **variant), parts))
        # Angles in double precision are for torch.
        doubled = "image_rotary_emb" in variant and variant["image_rotary_emb"][0].dtype == torch.float64
        assert called["qk_norm_rope"] == (0 if doubled else 4)
    assert not torch.equal(expected[1][0], expected[2][0])


def test_ip_adapters_run_as_ever(called: Counter[str]) -> None:
    torch.manual_seed(0)
    attn = FluxAttention(32, heads=2, dim_head=16, added_kv_proj_dim=32, bias=True).eval()
    image, text, prompt = torch.randn(2, 5, 32), torch.randn(2, 3, 32), torch.randn(2, 1, 32)
    fastdiff.optimize(attn)
    attn.set_processor(FluxIPAdapterAttnProcessor(32, 32))
    arguments: dict[str, Any] = {"encoder_hidden_states": text, "ip_hidden_states": [prompt]}
    result = attn(image, **arguments)
    fastdiff.restore(attn)
    assert all(map(torch.equal, result, attn(image, **arguments)))
    assert len(result) == 3
    assert not called


def test_adapter_on_the_output_layer_is_used(called: Counter[str]) -> None:
    model, arguments = build("DiT"), inputs("DiT")
    plain = call(model, arguments)
    fastdiff.optimize(model)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["proj_out_2"], init_lora_weights=False), model)
    result = call(model, arguments)
    assert not called
    fastdiff.restore(model)
    torch.testing.assert_close(result, call(model, arguments))
    assert not torch.allclose(result, plain)
