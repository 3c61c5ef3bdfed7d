"""What `fastdiff.optimize` replaces, what it says about it, and that models compute the same with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from kernel_checks.formula import assert_model_close
from kernel_checks.patched import MODELS, build, call, cast, inputs
from torch import nn

import fastdiff
from fastdiff import ConfigError
from fastdiff.backbones import view
from fastdiff.cost import count_macs
from fastdiff.kernels.patching import optimizing, parts

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY = pytest.mark.parametrize("name", MODELS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
MANY = 16
"""Samples over which a model's error is taken: fewer leave it to chance which of two is smaller."""


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")


def left_behind(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


# -- values ------------------------------------------------------------------------------------------------------------


@EVERY
@EVERY_DTYPE
def test_without_a_kernel_that_can_run_nothing_changes(name: str, dtype: torch.dtype) -> None:
    model, arguments = build(name, dtype), inputs(name, dtype)
    plain = call(model, arguments)
    assert fastdiff.optimize(model).replaced
    assert torch.equal(call(model, arguments), plain)


@EVERY
@EVERY_DTYPE
@pytest.mark.usefixtures("reference")
def test_rounding_as_eager_changes_nothing(name: str, dtype: torch.dtype) -> None:
    model, arguments = build(name, dtype), inputs(name, dtype)
    plain = call(model, arguments)
    fastdiff.optimize(model, rounding="match_eager")
    assert torch.equal(call(model, arguments), plain)


@EVERY
@EVERY_DTYPE
@pytest.mark.usefixtures("reference")
def test_references_are_no_further_from_the_truth_than_eager(name: str, dtype: torch.dtype) -> None:
    model, arguments = build(name, dtype), inputs(name, dtype, MANY)
    eager = call(model, arguments)
    fastdiff.optimize(model)
    result = call(model, arguments)
    assert dtype == torch.float32 or not torch.equal(result, eager)
    fastdiff.restore(model)
    assert_model_close(result, call(model.double(), cast(arguments, torch.float64)), eager)


@pytest.mark.parametrize(
    "name", [name if name == "DiT" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("forced")
def test_kernels_are_no_further_from_the_truth_than_eager(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model, arguments = build(name, dtype).to(device), moved(inputs(name, dtype), device)
    eager = call(model, arguments)
    fastdiff.optimize(model)
    result = call(model, arguments)
    assert not torch.equal(result, eager)
    fastdiff.restore(model)
    assert_model_close(result, call(model.double(), cast(arguments, torch.float64)), eager)


@EVERY
@pytest.mark.usefixtures("reference")
def test_gradients_pass(name: str) -> None:
    model, arguments = build(name, torch.float64), inputs(name, torch.float64)
    parameter = next(parameter for parameter in model.parameters() if parameter.ndim > 1)

    def gradient() -> torch.Tensor:
        output = model(**arguments, return_dict=False)[0]
        return torch.autograd.grad(output.square().sum(), parameter)[0]

    plain = gradient()
    fastdiff.optimize(model)
    torch.testing.assert_close(gradient(), plain)


def test_sinusoids_are_computed_once_per_evaluation() -> None:
    model, arguments = build("DiT"), inputs("DiT")
    later = arguments | {"timestep": arguments["timestep"] - 100}
    plain = [call(model, each) for each in (arguments, later)]
    assert not torch.equal(*plain)
    fastdiff.optimize(model)
    calls: list[nn.Module] = []
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.register_forward_hook(lambda module, *others: calls.append(module))
    assert torch.equal(call(model, arguments), plain[0])
    assert torch.equal(call(model, later), plain[1])
    assert len(calls) == 2
    arguments["timestep"] -= 100
    assert torch.equal(call(model, arguments), plain[1])
    with torch.inference_mode():
        inside = inputs("DiT")
        assert torch.equal(call(model, inside), plain[0])
        inside["timestep"] -= 100
        assert torch.equal(call(model, inside), plain[1])


@pytest.mark.parametrize("name", ["U-ViT", "SD UNet"])
@pytest.mark.usefixtures("forced")
def test_multiplications_in_kernels_count(name: str, device: torch.device) -> None:
    """Kernels replace matrices too, which torch's counter of operations does not see."""
    model, arguments = build(name, torch.float16).to(device), cast(inputs(name), torch.float16)
    arguments = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()
    }
    expected = count_macs(view(model), arguments)
    fastdiff.optimize(model)
    macs, fixed = count_macs(view(model), arguments)
    assert macs.tolist() == expected[0].tolist()
    assert fixed == expected[1]


# -- what is replaced --------------------------------------------------------------------------------------------------


@EVERY
def test_restore_leaves_nothing_behind(name: str) -> None:
    model, arguments = build(name), inputs(name)
    plain, attributes = call(model, arguments), left_behind(model)
    state = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())

    report = fastdiff.optimize(model)
    assert dict(model.named_modules()) == modules
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(now[key].data_ptr() == place and torch.equal(now[key], value) for key, (place, value) in state.items())

    assert fastdiff.restore(model) == len(report.replaced)
    assert left_behind(model) == attributes
    assert torch.equal(call(model, arguments), plain)
    assert fastdiff.restore(model) == 0


@EVERY
@pytest.mark.usefixtures("reference")
def test_every_replaced_forward_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards that stand back for some reason would pass every comparison of values."""
    model, ran = build(name), set()
    report = fastdiff.optimize(model)
    names = {module: path for path, module in model.named_modules()}
    for path in report.replaced:
        replacement = model.get_submodule(path).forward

        def counting(module: nn.Module, *args: Any, forward: Any = replacement.forward, **kwargs: Any) -> Any:
            result = forward(module, *args, **kwargs)
            if result is not NotImplemented:
                ran.add(names[module])
            return result

        replacement.forward = counting
    call(model, inputs(name))
    assert ran == set(report.replaced)


def test_report_names_what_was_replaced_and_what_was_left() -> None:
    model = build("DiT")
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    report = fastdiff.optimize(model)
    assert report.replaced["transformer_blocks.1.norm1"] == "AdaLayerNormZero: norm and modulation in one pass"
    assert report.left == {
        "transformer_blocks.0.attn1": "Attention: its processor is AttnProcessor, not AttnProcessor2_0"
    }
    blocks = len(model.transformer_blocks)
    assert f"{blocks} × BasicTransformerBlock: residual, gate, norm and modulation in one pass" in str(report)
    assert "left: 1 module\n  1 × Attention: its processor" in str(report)


def test_report_names_blocks_that_nothing_is_known_of() -> None:
    from tiny.models import TINY_MODELS

    report = fastdiff.optimize(TINY_MODELS["WanTransformer3DModel"].build())
    assert not report.replaced
    assert report.left["blocks.0"] == "WanTransformerBlock: no kernel for what it does"


def test_empty_places_in_a_list_of_blocks_are_passed_over() -> None:
    assert not fastdiff.optimize(nn.Sequential(nn.ModuleList([nn.LayerNorm(1), None]))).replaced


def test_subclass_is_left() -> None:
    class Other(BasicTransformerBlock):
        pass

    model = build("DiT")
    model.transformer_blocks[0].__class__ = Other
    report = fastdiff.optimize(model)
    assert "a subclass of BasicTransformerBlock" in report.left["transformer_blocks.0"]
    assert "transformer_blocks.1" in report.replaced


def test_forward_of_another_version_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, hidden_states: torch.Tensor, something_new: int = 0) -> torch.Tensor:
        return hidden_states

    monkeypatch.setattr(BasicTransformerBlock, "forward", forward)
    report = fastdiff.optimize(build("DiT"))
    assert "takes hidden_states, something_new" in report.left["transformer_blocks.0"]


def test_forward_that_somebody_replaced_is_left() -> None:
    model = build("DiT")
    block = model.transformer_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    report = fastdiff.optimize(model)
    assert "its forward was replaced by something" in report.left["transformer_blocks.0"]
    fastdiff.restore(model)
    assert "forward" in vars(block)


def test_optimizing_again_replaces_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    model, arguments = build("DiT", torch.float16), inputs("DiT", torch.float16)
    plain = call(model, arguments)
    first = fastdiff.optimize(model)
    assert not torch.equal(call(model, arguments), plain)
    assert fastdiff.optimize(model, rounding="match_eager") == first
    assert torch.equal(call(model, arguments), plain)
    assert fastdiff.restore(model) == len(first.replaced)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("a model",), "pipeline or a torch module; got str"), ((nn.Linear(1, 1), "up"), "got 'up'")],
)
def test_arguments_that_do_not_fit_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fastdiff.optimize(arguments[0], **({"rounding": arguments[1]} if arguments[1:] else {}))


def test_copy_of_an_optimised_model_is_independent() -> None:
    model, arguments = build("DiT"), inputs("DiT")
    fastdiff.optimize(model)
    plain = call(model, arguments)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(call(copied, arguments), plain)
    assert fastdiff.restore(copied) > 0
    assert torch.equal(call(copied, arguments), plain)


# -- when the model's own forwards run ---------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, reference: None) -> list[int]:
    """Grows with every operation that runs in the place of a model's own."""
    calls: list[int] = []
    run = parts.residual_norm_modulate.residual_norm_modulate

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(parts.residual_norm_modulate, "residual_norm_modulate", counting)
    return calls


def test_compiled_code_sees_the_own_forward(joined: list[int]) -> None:
    model, arguments = build("DiT"), inputs("DiT")
    fastdiff.optimize(model)
    plain = call(model, arguments)
    assert joined
    joined.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(compiled, arguments), plain)
    assert not joined


def test_autocast_and_training_see_the_own_forward(joined: list[int]) -> None:
    model, arguments = build("PixArt"), inputs("PixArt")
    with torch.autocast("cpu", torch.bfloat16):
        plain = call(model, arguments)
    fastdiff.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(model, arguments), plain)
    model.train()
    call(model, arguments)
    assert not joined


def test_hooks_on_norms_are_called(joined: list[int]) -> None:
    """Whoever hooks a norm, to load its weights or to look at it, sees every call of it."""
    model, arguments = build("SD UNet"), inputs("SD UNet")
    plain, seen = call(model, arguments), []
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm))]
    fastdiff.optimize(model)
    for norm in norms:
        norm.register_forward_hook(lambda *arguments: seen.append(arguments[0]))
    assert torch.equal(call(model, arguments), plain)
    assert len(seen) == len(norms)
    assert not joined


def test_hooks_on_output_layers_are_called(reference: None) -> None:
    model, seen = build("U-ViT"), []
    fastdiff.optimize(model)
    layers = [model.norm_out, model.proj_out]
    for layer in layers:
        layer.register_forward_hook(lambda *arguments: seen.append(arguments[0]))
    call(model, inputs("U-ViT"))
    assert {*seen} == {*layers}


def test_every_kind_has_a_reason_to_be_there() -> None:
    """A class that no tiny model has would go untested."""
    found = {type(module) for name in MODELS for module in build(name).modules()}
    assert set(optimizing.KINDS) <= found
