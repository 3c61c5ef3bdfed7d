"""Losses of exits: what they are, and whom their gradients reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastdiff.backbones import Unit, view
from fastdiff.errors import ConfigError, ProfileMismatchError
from fastdiff.uem import ExitReadout, UncertaintyModules, losses, make_modules
from tiny.models import TINY_MODELS
from tiny.uncertainty import random_modules

MODELS = (
    "DiTTransformer2DModel",
    "UViT",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "FluxTransformer2DModel",
)
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
BATCH = 3


def call_of(model: str) -> tuple[nn.Module, dict[str, Any]]:
    tiny = TINY_MODELS[model]
    return tiny.build(), tiny.inputs(BATCH, 0)


# -- predictions at exits ----------------------------------------------------------------------------------------------


def ending_at(denoiser: nn.Module, name: str, head: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """Returns what a denoiser predicts when every unit from one on passes its input through, corrected by a head."""
    units = view(denoiser).units
    handles = []
    for unit in units[[unit.name for unit in units].index(name) :]:

        def passed(_: nn.Module, args: Any, kwargs: Any, __: Any, unit: Unit = unit) -> Any:
            assert unit.io is not None
            streams = unit.io.read(args, kwargs)
            return unit.io.build((head(streams[0]), *streams[1:]) if unit.name == name else streams)

        handles.append(unit.module.register_forward_hook(passed, with_kwargs=True))
    with torch.no_grad():
        predicted: torch.Tensor = denoiser(**arguments, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return predicted


@EVERY_MODEL
def test_predictions_are_those_of_a_denoiser_that_ends_there(model: str) -> None:
    denoiser, arguments = call_of(model)
    modules = random_modules(denoiser, heads="per_exit")
    channels = next(iter(arguments.values())).shape[1]
    with torch.no_grad(), ExitReadout(denoiser, modules) as readout:
        found = readout(**arguments)
        assert torch.equal(found.full, denoiser(**arguments, return_dict=False)[0][:, :channels])
    for name, head, prediction in zip(modules.exits, modules.exit_heads, found.predictions, strict=True):
        expected = ending_at(denoiser, name, head, arguments)[:, :channels]
        torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)


@EVERY_MODEL
def test_nothing_is_left_on_the_denoiser(model: str) -> None:
    denoiser, arguments = call_of(model)
    with torch.no_grad():
        expected = denoiser(**arguments, return_dict=False)[0]
        with ExitReadout(denoiser, random_modules(denoiser)) as readout:
            readout(**arguments)
        assert torch.equal(denoiser(**arguments, return_dict=False)[0], expected)
    assert not any("forward" in vars(unit.module) or unit.module._forward_pre_hooks for unit in view(denoiser).units)


@EVERY_MODEL
def test_a_module_tells_of_every_number_that_a_token_stands_for(model: str) -> None:
    denoiser, arguments = call_of(model)
    modules = make_modules(denoiser, arguments)
    with torch.no_grad(), ExitReadout(denoiser, modules) as readout:
        found = readout(**arguments)
    sample = next(iter(arguments.values()))
    maps = [modules.maps(number, state, found.timesteps) for number, state in enumerate(found.hidden)]
    labels = losses.token_labels(found.predictions, found.full, maps)
    for number, (state, map_, label) in enumerate(zip(found.hidden, maps, labels, strict=True)):
        assert map_.numel() == sample.numel()
        assert map_.shape == label.shape
        assert ((map_ > 0) & (map_ < 1)).all()
        assert modules.score(number, state, found.timesteps).shape == (BATCH,)


def test_exits_that_there_are_not_are_refused() -> None:
    denoiser, arguments = call_of("DiTTransformer2DModel")
    with pytest.raises(ConfigError, match=r"has no unit blocks.1; its units are transformer_blocks.0"):
        make_modules(denoiser, arguments, ["blocks.1"])


def test_modules_of_another_denoiser_are_refused() -> None:
    denoiser, _ = call_of("DiTTransformer2DModel")
    with pytest.raises(ProfileMismatchError):
        ExitReadout(denoiser, UncertaintyModules("UViT", 4, ["transformer_blocks.1"], 32, 16))


# -- whom the gradients reach ------------------------------------------------------------------------------------------


def gradients(model: str, loss: str, mode: str = "detached") -> dict[str, bool]:
    """Returns whether a loss has a gradient for the blocks, the output layers, the heads and the modules."""
    denoiser, arguments = call_of(model)
    modules = random_modules(denoiser, heads="per_exit")
    torch.manual_seed(0)
    with ExitReadout(denoiser, modules) as readout:
        found = readout(**arguments)
    target = torch.randn_like(found.full)
    maps = torch.stack([modules.maps(i, state, found.timesteps) for i, state in enumerate(found.hidden)])
    if loss == "uncertainty":
        labels = losses.token_labels(found.predictions, target, [*maps])
        losses.uncertainty_loss(maps, labels).backward()
    else:
        losses.layerwise_loss(found.predictions, target, maps.mean((2, 3)), mode).backward()
    blocks = {id(parameter) for unit in view(denoiser).units for parameter in unit.module.parameters()}
    parts = {
        "blocks": [parameter for parameter in denoiser.parameters() if id(parameter) in blocks],
        "output layers": [parameter for parameter in denoiser.parameters() if id(parameter) not in blocks],
        "heads": [*modules.exit_heads.parameters()],
        "modules": [*modules.uncertainty.parameters()],
    }
    return {
        name: any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)
        for name, parameters in parts.items()
    }


@EVERY_MODEL
def test_the_uncertainty_loss_trains_the_modules_alone(model: str) -> None:
    assert gradients(model, "uncertainty") == {
        "blocks": False,
        "output layers": False,
        "heads": False,
        "modules": True,
    }


@pytest.mark.parametrize(
    ("mode", "reaches"), [("detached", False), ("paper", True), ("official", True), ("stopping", False)]
)
@pytest.mark.parametrize("model", ["DiTTransformer2DModel", "UViT"])
def test_the_layerwise_loss_reaches_the_modules_only_where_its_weights_do(model: str, mode: str, reaches: bool) -> None:
    assert gradients(model, "layerwise", mode) == {
        "blocks": True,
        "output layers": True,
        "heads": True,
        "modules": reaches,
    }


# -- values ------------------------------------------------------------------------------------------------------------


def test_a_label_is_0_where_nothing_is_wrong_and_1_where_all_is() -> None:
    target = torch.randn(2, 4, 8, 8, requires_grad=True)
    wrong = torch.stack([target, target + 100, target - 0.5]).detach().requires_grad_()
    label = losses.error_label(wrong, target)
    assert not label.requires_grad
    assert label[0].abs().max() == 0
    assert label[1].min() == 1
    torch.testing.assert_close(label[2], torch.full_like(label[2], 0.5).tanh())


def test_tokens_are_patches_row_by_row() -> None:
    image = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    tokens = losses.patches(image, 6)
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
    assert tokens[0, 1, :2].tolist() == [2, 3]
    assert tokens[0, 3, :2].tolist() == [12, 13]
    stacked = losses.patches(torch.stack([image, image + 1]), 6)
    assert torch.equal(stacked[1], tokens + 1)


@pytest.mark.parametrize("tokens", [0, 5, 7, 48])
def test_a_map_that_does_not_consist_of_patches_is_refused(tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"4 x 6 does not consist of {tokens} square patches"):
        losses.patches(torch.zeros(1, 2, 4, 6), tokens)


def test_layerwise_weights() -> None:
    errors = torch.tensor([[4.0, 1.0], [1.0, 9.0], [0.0, 0.0]])
    predictions = errors.sqrt()[..., None, None].expand(3, 2, 2, 2)
    uncertainty = torch.tensor([[0.5, 0.9], [0.0, 0.2], [0.5, 0.9]])
    values = {mode: losses.layerwise_loss(predictions, torch.zeros(2, 2, 2), uncertainty, mode) for mode in losses.UAL}
    # Certainties 0.5, 1, 0.5 of the first sample and 0.1, 0.8, 0.1 of the second; both add up to more than one.
    assert values["detached"].item() == pytest.approx(((2 + 1) / 2 + (0.1 + 7.2) / 1) / 2)
    assert values["paper"].item() == pytest.approx(((2 + 1) + (0.1 + 7.2)) / 2)
    # Of thresholds from 0 to 1, those above 0.5 stop the first sample at once, and all others at the second exit.
    stops, even = (0.5 * 4 + 0.5 * 1) + (0.1 * 1 + 0.7 * 9), (4 + 1) / 3 + (1 + 9) / 3
    assert values["stopping"].item() == pytest.approx((stops + even) / 2 / 2)
    assert values["official"].item() == pytest.approx((0.3 * (4 + 1) + 0.9 * (1 + 9)) / 1.5 / 2)


@pytest.mark.parametrize("mode", losses.UAL)
def test_a_row_counts_by_its_weight(mode: str) -> None:
    torch.manual_seed(0)
    predictions, target, uncertainty = torch.randn(3, 2, 4), torch.randn(2, 4), torch.rand(3, 2)
    first, second = (
        losses.layerwise_loss(predictions, target, uncertainty, mode, weights=weights).item()
        for weights in torch.eye(2)
    )
    both = losses.layerwise_loss(predictions, target, uncertainty, mode, weights=torch.tensor([3.0, 0.5]))
    assert both.item() == pytest.approx(3 * first + 0.5 * second)
    assert losses.layerwise_loss(predictions, target, uncertainty, mode).item() == pytest.approx(first + second)


@pytest.mark.parametrize("largest", [0.3, 0.8, 1.0])
def test_stopping_weights_are_how_often_thresholds_stop_there(largest: float) -> None:
    uncertainty = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    thresholds = (torch.arange(20_000) + 0.5) / 20_000 * largest
    below = uncertainty[..., None] < thresholds
    stops = below & (below.cumsum(0) == 1)
    weights = losses.stopping_weights(uncertainty, largest)
    torch.testing.assert_close(weights, stops.float().mean(2), atol=1e-3, rtol=0)
    assert (weights.sum(0) <= 1 + 1e-6).all()


def test_the_detached_loss_does_not_couple_samples() -> None:
    torch.manual_seed(0)
    predictions, target, uncertainty = torch.randn(3, 2, 4), torch.randn(2, 4), torch.rand(3, 2)
    for mode, couples in (("detached", False), ("stopping", False), ("official", True)):
        whole = losses.layerwise_loss(predictions, target, uncertainty, mode)
        alone = [
            losses.layerwise_loss(predictions[:, [i]], target[[i]], uncertainty[:, [i]], mode).item() for i in (0, 1)
        ]
        assert (abs(whole.item() - sum(alone) / 2) > 1e-4) == couples


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="ual is one of 'detached', 'paper', 'official', 'stopping'; got 'none'"):
        losses.layerwise_loss(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), "none")


def test_features_are_compared_on_their_own_scale() -> None:
    torch.manual_seed(0)
    full = torch.randn(2, 5, 8, requires_grad=True)
    hidden = torch.stack([full * 1.5, full]).detach().requires_grad_()
    loss = losses.feature_loss(hidden, full)
    assert loss.item() == pytest.approx((0.25 + 0) / 2)
    scaled = losses.feature_loss(1000 * hidden.detach(), 1000 * full)
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    assert full.grad is None
    assert hidden.grad is not None
