"""The U-ViT model: shapes, conditioning, precision, files, checkpointing, and what diffusers does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff import Action, ComputePlan, ConfigError, SkipTuning
from fastdiff.backbones import view
from fastdiff.models import UViT
from tiny.sampling import accelerate, calls_of, evaluate
from tiny.uvit import MODEL, TEXT, UNCONDITIONAL, UVIT, build_uvit

VARIANTS = {"classes": UVIT, "nothing": UNCONDITIONAL, "text": TEXT}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def inputs_of(variant: str, batch: int = 2) -> dict[str, Any]:
    inputs = MODEL.inputs(batch, 0)
    if variant != "classes":
        del inputs["class_labels"]
    if variant == "text":
        generator = torch.Generator().manual_seed(1)
        shape = (batch, TEXT["context_length"], TEXT["context_dim"])
        inputs["encoder_hidden_states"] = torch.randn(shape, generator=generator)
    return inputs


def predict(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return evaluate(model, [inputs])[0][0]


# -- what the prediction depends on ------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_every_input_is_heard_and_samples_are_independent(variant: str) -> None:
    model, inputs = build_uvit(VARIANTS[variant]), inputs_of(variant)
    plain = predict(model, inputs)
    assert plain.shape == inputs["hidden_states"].shape
    for name, value in inputs.items():
        other = value.flip(0) if name == "class_labels" else value * 0.9
        assert not torch.allclose(predict(model, inputs | {name: other}), plain, rtol=0, atol=1e-4), name
    alone = predict(model, {name: value[:1] for name, value in inputs.items()})
    assert torch.allclose(alone, plain[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500.0, 500.0])])
def test_timestep_may_be_a_number_or_a_tensor(timestep: Any) -> None:
    model, inputs = MODEL.build(), MODEL.inputs(2, 0)
    assert torch.equal(predict(model, inputs | {"timestep": timestep}), predict(model, inputs))


def test_tokens_are_class_time_patches_and_time_text_patches() -> None:
    for variant, order in (("classes", ["class", "time"]), ("text", ["time", "text"]), ("nothing", ["time"])):
        model, inputs = build_uvit(VARIANTS[variant]), inputs_of(variant)
        with torch.no_grad():
            tokens = model._embed(*(inputs.get(name) for name in ("hidden_states", "timestep")), *conditioning(inputs))
            parts = {
                "class": lambda model=model, inputs=inputs: model.class_embed(inputs["class_labels"])[:, None],
                "time": lambda model=model, inputs=inputs: model.time_proj(inputs["timestep"])[:, None],
                "text": lambda model=model, inputs=inputs: model.context_embed(inputs["encoder_hidden_states"]),
            }
            patches = model.patch_embed(inputs["hidden_states"]).flatten(2).transpose(1, 2)
            expected = torch.cat([*(parts[part]() for part in order), patches], dim=1)
        assert torch.equal(tokens - model.pos_embed, expected + model.pos_embed - model.pos_embed)


def conditioning(inputs: dict[str, Any]) -> tuple[Any, Any]:
    return inputs.get("class_labels"), inputs.get("encoder_hidden_states")


@pytest.mark.parametrize("changes", [{"time_embed_mlp": True}, {"final_conv": False}, {"attention_bias": True}])
def test_options_change_the_model(changes: dict[str, Any]) -> None:
    before, after = build_uvit(UVIT), build_uvit(UVIT | changes)
    assert set(before.state_dict()) != set(after.state_dict())
    assert predict(after, MODEL.inputs(2, 0)).isfinite().all()


def test_long_skips_reach_their_counterparts() -> None:
    model = MODEL.build()
    made: list[torch.Tensor] = []
    for block in model.transformer_in_blocks:
        block.register_forward_hook(lambda module, args, output: made.append(output))
    for pair in model.transformer_out_blocks:
        pair["skip"].register_forward_hook(lambda module, args, output: read.append(args[1] is made.pop()))
    read: list[bool] = []
    predict(model, MODEL.inputs(2, 0))
    assert read == [True] * 3


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 5}, "even number.*5"),
        ({"num_layers": 0}, "even number.*0"),
        ({"sample_size": 9}, "whole patches.*9"),
        ({"context_dim": 8}, "classes or on text"),
    ],
)
def test_configuration_that_fits_no_u_vit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UViT(**UVIT | changes)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("classes", {"class_labels": None}, "needs class_labels"),
        ("nothing", {"class_labels": torch.tensor([1, 2])}, "takes no class_labels"),
        ("text", {"encoder_hidden_states": None}, "needs encoder_hidden_states"),
        ("classes", {"hidden_states": torch.zeros(2, 4, 16, 16)}, r"\(batch, 4, 8, 8\).*\(2, 4, 16, 16\)"),
        ("classes", {"hidden_states": torch.zeros(2, 3, 8, 8)}, r"\(batch, 4, 8, 8\).*\(2, 3, 8, 8\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(build_uvit(VARIANTS[variant]), inputs_of(variant) | changes)


# -- diffusers' model features -----------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_saved_model_is_the_same(variant: str, tmp_path: Path) -> None:
    model, inputs = build_uvit(VARIANTS[variant]), inputs_of(variant)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert torch.equal(predict(UViT.from_pretrained(tmp_path), inputs), predict(model, inputs))
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_split_saved_model_is_spread_by_a_device_map(tmp_path: Path) -> None:
    model, inputs = MODEL.build(), MODEL.inputs(2, 0)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    spread = UViT.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(predict(spread, inputs), predict(model, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY_VARIANT
def test_half_precision_predicts_about_the_same(variant: str, dtype: torch.dtype) -> None:
    model, inputs = build_uvit(VARIANTS[variant]), inputs_of(variant)
    full = predict(model, inputs)
    given = {
        name: value.to(dtype) if name != "timestep" and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    half = predict(model.to(dtype), given)
    assert half.dtype == dtype
    error = (half.float() - full).abs().max() / full.std()
    assert error < (0.02 if dtype == torch.float16 else 0.15)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients, forwards = [], []
    for checkpointed in (False, True):
        model = MODEL.build().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        runs = 0

        def count(*_: Any) -> None:
            nonlocal runs
            runs += 1

        model.transformer_mid_block.register_forward_pre_hook(count)
        model(**MODEL.inputs(2, 0)).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        forwards.append(runs)
    assert forwards == [1, 2]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_repeated_blocks_are_what_diffusers_compiles_and_keeps_together() -> None:
    model = MODEL.build()
    kinds = {type(unit.module).__name__ for unit in view(model).units}
    assert kinds == set(UViT._no_split_modules)
    assert set(UViT._repeated_blocks) < kinds
    compiled: list[str] = []
    for name, module in model.named_modules():
        module.compile = lambda *args, name=name, **kwargs: compiled.append(name)  # type: ignore[method-assign]
    model.compile_repeated_blocks()
    assert sorted(compiled) == sorted(unit.name for unit in view(model).units if not unit.merges_skip)


# -- its skips in fastdiff ---------------------------------------------------------------------------------------------


def test_blocks_whose_skips_are_read_are_not_dropped() -> None:
    backbone = view(MODEL.build())
    reads = {trait.name: trait.reads for trait in backbone.traits if trait.reads}
    assert reads == {
        f"transformer_out_blocks.{index}.skip": (f"transformer_in_blocks.{2 - index}",) for index in range(3)
    }
    names = backbone.names
    reused = [Action.REUSE if name == "transformer_mid_block" else Action.COMPUTE for name in names]
    plan = ComputePlan(np.array([[Action.COMPUTE] * len(names), reused]), names, {"replaced": list(names)})
    assert plan.prune(backbone.traits) == plan
    left = plan.table.copy()
    left[1, names.index("transformer_out_blocks.0.skip")] = Action.REUSE
    pruned = ComputePlan(left, names, plan.meta).prune(backbone.traits)
    dropped = {name for name, action in zip(names, pruned.table[1], strict=True) if action == Action.DROP}
    assert dropped == {"transformer_in_blocks.2", "transformer_mid_block"}


def test_constant_skip_scales_fold_into_the_weights() -> None:
    model, calls = MODEL.build(), calls_of(MODEL, 3)
    method = SkipTuning(rho_bottom=0.4, rho_top=0.9)
    plain = evaluate(model, calls)
    scaled, _ = accelerate(model, calls, method, [900.0, 500.0, 100.0])
    with method.fold(model):
        folded = evaluate(model, calls)
    for a, b, c in zip(plain, scaled, folded, strict=True):
        assert torch.allclose(b[0], c[0], rtol=0, atol=1e-5)
        assert not torch.allclose(a[0], b[0], rtol=0, atol=1e-2)
