"""Skip-Tuning: which factor each long skip gets in each evaluation, and when there is none to give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, HeunDiscreteScheduler, UniDiffuserModel
from torch import nn

from fastdiff import ConfigError, FeatureInheritance, SkipTuning
from fastdiff.backbones import view
from fastdiff.engine import Grid, sampling_run
from fastdiff.methods import Method, PlanRequest
from fastdiff.methods.skip_tuning import RHO_BY_EVALUATIONS
from fastdiff.spec import format_method, parse_method
from tiny.base import TinyModel, build
from tiny.models import TINY_MODELS
from tiny.plans import grid_of
from tiny.sampling import accelerate, calls_of
from tiny.unets import TINY_UNETS

BACKBONE = view(TINY_UNETS["UNet2DModel (resnet sampling)"].build())
SKIPS = 9


def factors(method: SkipTuning, grid: Grid | int = 1) -> np.ndarray:
    """Returns the factors of a UNet of nine long skips, deepest first, of shape `(evaluations, 9)`."""
    grid = grid_of(np.linspace(999, 0, grid)) if isinstance(grid, int) else grid

    def costs() -> Any:
        raise AssertionError("nothing is measured")

    return method.skip_scales(PlanRequest(BACKBONE, grid, costs))[:, ::-1]


def grid_with(scheduler: Any, steps: int) -> Grid:
    scheduler.set_timesteps(steps)
    return Grid.of(scheduler)


# -- over the skips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("evaluations", "rho"), [(1, 0.68), (9, 0.68), (19, 0.78), (39, 0.85), (79, 0.9), (999, 0.9)])
def test_constant_by_number_of_evaluations(evaluations: int, rho: float) -> None:
    assert factors(SkipTuning(), evaluations) == pytest.approx(np.full((evaluations, SKIPS), rho))


def test_constants_rise_with_the_number_of_evaluations() -> None:
    constants = [factors(SkipTuning(), evaluations)[0, 0] for evaluations in range(9, 80)]
    assert all(np.diff(constants) > 0)
    assert constants[-1] == RHO_BY_EVALUATIONS[79]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (SkipTuning(rho=0.8), [0.8] * 9),
        (SkipTuning(rho_bottom=0.5, rho_top=0.9), [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]),
        (SkipTuning(rho_bottom=0.5, rho_top=0.9, reverse=True), [0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5]),
        (SkipTuning(rho_bottom=0.1, rho_top=1.0, literal=True), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        (
            SkipTuning(rho_bottom=0.1, rho_top=1.0, literal=True, reverse=True),
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
        ),
        (SkipTuning(rho=[0, 2, 1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), [0, 2, 1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    ],
    ids=str,
)
def test_factors_deepest_first(method: SkipTuning, expected: Sequence[float]) -> None:
    assert factors(method, 2) == pytest.approx(np.array([expected] * 2))


# -- over time ---------------------------------------------------------------------------------------------------------


def test_factor_grows_or_falls_with_the_noise() -> None:
    """Row 0 is the noisiest: `increasing` is 1 there, `decreasing` is 1 at the clean end."""
    increasing = factors(SkipTuning(rho_bottom=0.2, rho_top=0.6, time="increasing"), 5)
    decreasing = factors(SkipTuning(rho_bottom=0.2, rho_top=0.6, time="decreasing"), 5)
    assert increasing[:, 0] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert increasing[:, -1] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])
    assert np.array_equal(increasing[0], np.ones(SKIPS))
    assert np.array_equal(decreasing[-1], np.ones(SKIPS))
    assert decreasing == pytest.approx(increasing[::-1])


def test_window_of_noise_levels() -> None:
    grid = grid_with(EDMEulerScheduler(sigma_min=0.002, sigma_max=80), 12)
    sigmas = EDMEulerScheduler(sigma_min=0.002, sigma_max=80)
    sigmas.set_timesteps(12)
    inside = ((sigmas.sigmas[:-1] >= 0.1) & (sigmas.sigmas[:-1] <= 10)).numpy()
    assert 2 < inside.sum() < 10
    tuned = factors(SkipTuning(rho=0.7, time="sigma-window", window=[0.1, 10]), grid)
    assert tuned == pytest.approx(np.where(inside, 0.7, 1.0)[:, None].repeat(SKIPS, axis=1))


def test_window_on_a_variance_preserving_scheduler_is_of_noise_over_signal() -> None:
    scheduler = DDIMScheduler()
    grid = grid_with(scheduler, 10)
    signal = scheduler.alphas_cumprod[scheduler.timesteps]
    ratio = float((1 / signal[4] - 1).sqrt())
    tuned = factors(SkipTuning(rho=0.7, time="sigma-window", window=(0.999 * ratio, 1.001 * ratio)), grid)
    assert np.flatnonzero((tuned != 1).all(axis=1)).tolist() == [4]


def test_window_needs_noise_levels() -> None:
    with pytest.raises(ConfigError, match="noise level"):
        factors(SkipTuning(rho=0.7, time="sigma-window", window=(0.1, 10)), 5)


def test_evaluations_are_counted_and_not_steps() -> None:
    grid = grid_with(HeunDiscreteScheduler(), 10)
    assert len(grid) == 19
    assert factors(SkipTuning(), grid)[0] == pytest.approx([0.78] * SKIPS)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"rho": -0.1},
        {"rho": 2.1},
        {"rho": float("nan")},
        {"rho": True},
        {"rho": "0.8"},
        {"rho": ()},
        {"rho": (0.5, 3)},
        {"rho": (0.5, None)},
        {"rho_bottom": 0.5},
        {"rho_top": 0.5},
        {"rho_bottom": 0.5, "rho_top": 2.5},
        {"rho": 0.8, "rho_bottom": 0.5, "rho_top": 1},
        {"literal": True},
        {"rho": 0.8, "reverse": True},
        {"rho_bottom": 0.5, "rho_top": 1, "literal": 1},
        {"time": "linear"},
        {"time": "sigma-window"},
        {"window": (0.1, 1)},
        {"time": "sigma-window", "window": (1, 0.1)},
        {"time": "sigma-window", "window": (-1, 1)},
        {"time": "sigma-window", "window": (1,)},
        {"time": "sigma-window", "window": 1},
        {"time": "sigma-window", "window": ("a", "b")},
        {"time": "sigma-window", "window": (float("nan"), 1)},
        {"exclude_control": "yes"},
    ],
    ids=str,
)
def test_bad_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="SkipTuning"):
        SkipTuning(**fields)


@pytest.mark.parametrize("rho", [0, 2, 1.5])
def test_ends_of_the_range_are_allowed(rho: float) -> None:
    assert factors(SkipTuning(rho=rho))[0, 0] == rho


def test_list_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="lists 8 factors; this denoiser has 9"):
        factors(SkipTuning(rho=(0.5,) * 8))


@pytest.mark.parametrize(
    ("method", "is_neutral"),
    [
        (SkipTuning(rho=1), True),
        (SkipTuning(rho=(1, 1.0)), True),
        (SkipTuning(rho_bottom=1, rho_top=1), True),
        (SkipTuning(), False),
        (SkipTuning(rho=(1, 0.9)), False),
        (SkipTuning(rho_bottom=0.5, rho_top=1), False),
    ],
    ids=str,
)
def test_neutral_settings(method: SkipTuning, is_neutral: bool) -> None:
    assert method.is_neutral is is_neutral


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("skip-tuning", SkipTuning()),
        ("skip-tuning:rho=0.8,exclude-control=true", SkipTuning(rho=0.8, exclude_control=True)),
        ("skip-tuning:rho=[0.5,0.6,1.0]", SkipTuning(rho=(0.5, 0.6, 1.0))),
        ("skip-tuning:rho-bottom=0.5,rho-top=1,time=increasing", SkipTuning(None, 0.5, 1, time="increasing")),
        ("skip-tuning:time=sigma-window,window=[0.1,10]", SkipTuning(time="sigma-window", window=(0.1, 10))),
    ],
)
def test_settings_as_text_and_json(spec: str, method: SkipTuning) -> None:
    assert parse_method(spec) == method
    assert parse_method(format_method(method)) == method
    assert Method.from_dict(method.to_dict()) == method


# -- denoisers without long skips --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiny", "name"),
    [
        (TINY_MODELS["DiTTransformer2DModel"], "DiTTransformer2DModel"),
        (TINY_MODELS["FluxTransformer2DModel"], "FluxTransformer2DModel"),
        (TINY_UNETS["Kandinsky3UNet"], "Kandinsky3UNet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_denoisers_without_long_skips_are_refused(tiny: TinyModel, name: str) -> None:
    model = tiny.build()
    for methods in (SkipTuning(rho=0.5), [FeatureInheritance(), SkipTuning(rho=1)]):
        with pytest.raises(ConfigError, match=f"none in {name}"):
            accelerate(model, calls_of(tiny, 2), methods, [900.0, 100.0])
    with pytest.raises(ConfigError, match=f"none in {name}"), SkipTuning(rho=0.5).fold(model):
        pass


# -- folded into the weights -------------------------------------------------------------------------------------------


def u_vit() -> nn.Module:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 6}
    text = {"text_dim": 16, "clip_img_dim": 12, "num_text_tokens": 6}
    return build(UniDiffuserModel, config | text | {"sample_size": 8, "patch_size": 2, "attention_bias": True})


def u_vit_predictions(model: nn.Module, methods: Any = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (1, 12), (6, 16))]
    names = ("latent_image_embeds", "image_embeds", "prompt_embeds")
    timesteps = torch.tensor([900.0, 500.0, 100.0])

    def predict(timestep: torch.Tensor) -> torch.Tensor:
        return model(**dict(zip(names, draw, strict=True)), timestep_img=timestep, timestep_text=0 * timestep)[0]

    with torch.no_grad():
        if methods is None:
            return torch.stack([predict(timestep) for timestep in timesteps])
        predictions = []
        with sampling_run(model, methods, timesteps=timesteps) as run:
            for timestep in timesteps:
                predictions.append(predict(timestep))
                run.tick()
    return torch.stack(predictions)


LINEAR = SkipTuning(rho_bottom=0.4, rho_top=0.9)


def test_folded_u_vit_is_the_scaled_one() -> None:
    model = u_vit()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    objects = [id(weight) for weight in model.parameters()]
    plain = u_vit_predictions(model)
    scaled = u_vit_predictions(model, LINEAR)
    with LINEAR.fold(model) as folded:
        assert folded is model
        predicted = u_vit_predictions(model)
    size = float(plain.abs().max())
    assert torch.allclose(predicted, scaled, rtol=0, atol=1e-5 * size)
    assert not torch.allclose(predicted, plain, rtol=0, atol=1e-2 * size)

    assert [id(weight) for weight in model.parameters()] == objects
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert torch.equal(u_vit_predictions(model), plain)


def test_u_vit_reads_its_skips_deepest_first() -> None:
    model = u_vit()
    made: list[torch.Tensor] = []
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.transformer.transformer_in_blocks:
        block.register_forward_hook(lambda module, args, output: made.append(output))
    for pair in model.transformer.transformer_out_blocks:
        linear = pair["skip"].skip_linear
        linear.register_forward_hook(lambda module, args, output: read.append((args[0], made.pop())))
    u_vit_predictions(model, LINEAR)
    expected = [0.4, 0.65, 0.9] * 3
    assert len(read) == len(expected)
    for (joined, skip), rho in zip(read, expected, strict=True):
        assert torch.equal(joined[..., skip.shape[-1] :], skip * rho)


def test_weights_come_back_after_an_error() -> None:
    model = u_vit()
    before = list(model.parameters())
    with pytest.raises(KeyboardInterrupt), LINEAR.fold(model):
        raise KeyboardInterrupt
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("make", "method", "why"),
    [
        (u_vit, SkipTuning(), "give it"),
        (u_vit, SkipTuning(rho=0.5, time="increasing"), "same factors in every evaluation"),
        (u_vit, SkipTuning(rho=(0.5, 0.5)), "lists 2 factors"),
        (TINY_UNETS["UNet2DModel (DDPM)"].build, SkipTuning(rho=0.5), "normalises it first"),
        (TINY_MODELS["HunyuanDiT2DModel"].build, SkipTuning(rho=0.5), "normalises it first"),
    ],
    ids=["no-rho", "time", "length", "unet", "hunyuan"],
)
def test_folding_that_would_not_be_exact_is_refused(make: Any, method: SkipTuning, why: str) -> None:
    with pytest.raises(ConfigError, match=why), method.fold(make()):
        pass
