"""What exits of a UNet read and tell, and what they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.backbones import view
from fastdiff.errors import ConfigError
from fastdiff.uem import ExitReadout, load_modules, losses, make_modules
from fastdiff.uem.objectives import mean_uncertainty
from fastdiff.uem.train import train
from fastdiff.uem.validation import spearman
from tiny.stops import BATCH
from tiny.training import DRAWN_ANEW, small
from tiny.unet_exits import EVERY_MODEL, PIPELINES, batch_of, ending_at, random_modules
from tiny.unet_pipelines import UNET_PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore::fastdiff.errors.FastDiffNoEffectWarning")


# -- predictions at exits ----------------------------------------------------------------------------------------------


@EVERY_MODEL
def test_predictions_are_those_of_a_head_in_front_of_the_output_layers(model: str) -> None:
    denoiser, arguments = batch_of(model)
    modules = random_modules(denoiser, arguments)
    with torch.no_grad(), ExitReadout(denoiser, modules) as readout:
        found = readout(**arguments)
    with torch.no_grad():
        torch.testing.assert_close(found.full, denoiser(**arguments, return_dict=False)[0], rtol=1e-4, atol=1e-5)
    assert [name.partition(".resnets")[0] for name in modules.exits] == [
        f"up_blocks.{stage}"
        for stage in range(len(denoiser.up_blocks))  # type: ignore[arg-type]
    ]
    for stage, prediction in enumerate(found.predictions):
        expected = ending_at(denoiser, stage, modules.exit_heads[stage], arguments)
        torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())


@EVERY_MODEL
def test_a_pixel_of_an_exit_tells_of_all_that_it_covers(model: str) -> None:
    denoiser, arguments = batch_of(model)
    modules = make_modules(denoiser, arguments)
    assert modules.config["heads"] == "per_exit"
    with torch.no_grad(), ExitReadout(denoiser, modules) as readout:
        found = readout(**arguments)
    maps = [modules.maps(number, state, found.timesteps) for number, state in enumerate(found.hidden)]
    labels = losses.token_labels(found.predictions, found.full, maps)
    errors = losses.error_label(found.predictions, found.full)
    for map_, label, error, state in zip(maps, labels, errors, found.hidden, strict=True):
        assert map_.shape == label.shape
        across = error.shape[-1] // state.shape[-1]
        # The last token is the lower right corner.
        torch.testing.assert_close(label[:, -1], error[..., -across:, -across:].flatten(1))
    assert modules.score(0, found.hidden[0], found.timesteps).shape == (BATCH,)


def test_a_bottleneck_with_as_many_pixels_as_the_image_has_lines() -> None:
    errors, target = torch.rand(1, 1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    (label,) = losses.token_labels(errors, target, [torch.zeros(1, 16, 16)])
    torch.testing.assert_close(label[0, 1], errors[0, 0, 0, :4, 4:8].tanh().flatten())


@pytest.mark.parametrize("heads", ["shared", "per_exit_norm"])
def test_heads_that_a_unet_cannot_have(heads: str, tmp_path: Path) -> None:
    denoiser, arguments = batch_of("UNet2DModel (DDPM)", 1)
    with pytest.raises(ConfigError, match=r"heads='per_exit' is all that there is; got 'shared'|'per_exit_norm'"):
        make_modules(denoiser, arguments, heads=heads)
    pipe = UNET_PIPELINES["DDPMPipeline"].build()
    with pytest.raises(ConfigError, match="heads='per_exit' is all"):
        train(pipe, small(heads=heads), tmp_path)


@pytest.mark.parametrize("settings", [{"objective": "heads"}, {"objective": "ase", "train_backbone": True}])
def test_exit_schedules_are_not_for_unets(settings: dict[str, Any], tmp_path: Path) -> None:
    pipe = UNET_PIPELINES["DDPMPipeline"].build()
    with pytest.raises(ConfigError, match="UNet2DModel is a UNet: objective='deediff' trains its exits"):
        train(pipe, small(**settings), tmp_path)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("model", ["UNet2DModel (FIR skip)", "UNet1DModel (audio)"])
def test_other_unets_have_no_exits(model: str) -> None:
    denoiser, arguments = batch_of(model, 1)
    with pytest.raises(ConfigError, match="has no exit before any unit; it has none"):
        make_modules(denoiser, arguments)


def test_there_is_no_exit_in_the_middle_of_a_stage() -> None:
    denoiser, arguments = batch_of("UNet2DModel (DDPM)", 1)
    with pytest.raises(ConfigError, match=r"no exit before up_blocks.1.resnets.1; it has up_blocks.0.resnets.0, "):
        make_modules(denoiser, arguments, ["up_blocks.1.resnets.1"])


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "reached"), [("uncertainty", {"modules"}), ("layerwise", {"stages", "output layers", "heads"})]
)
def test_whom_the_gradients_reach(loss: str, reached: set[str]) -> None:
    denoiser, arguments = batch_of("UNet2DConditionModel (SD)")
    modules = random_modules(denoiser, arguments)
    with ExitReadout(denoiser, modules) as readout:
        found = readout(**arguments)
    target = torch.randn_like(found.full)
    maps = [modules.maps(number, state, found.timesteps) for number, state in enumerate(found.hidden)]
    if loss == "uncertainty":
        losses.uncertainty_loss(maps, losses.token_labels(found.predictions, target, maps)).backward()
    else:
        losses.layerwise_loss(found.predictions, target, mean_uncertainty(maps)).backward()
    parts = {
        "stages": denoiser.down_blocks,
        "output layers": denoiser.conv_out,
        "heads": modules.exit_heads,
        "modules": modules.uncertainty,
    }
    assert reached == {
        name
        for name, part in parts.items()
        if any(own.grad is not None and bool(own.grad.any()) for own in part.parameters())  # type: ignore[union-attr]
    }


def test_modules_learn_which_exit_and_which_sample_is_wrong() -> None:
    denoiser, arguments = batch_of("UNet2DModel (DDPM)", 24)
    denoiser.requires_grad_(False)
    torch.manual_seed(0)
    modules = make_modules(denoiser, arguments).train()
    optimizer = torch.optim.Adam(modules.parameters(), lr=0.02)
    brightness = torch.linspace(0, 1, 24).roll(7)[:, None, None, None]
    depth = torch.arange(4)[:, None, None, None, None]

    def measured(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Brighter samples, and earlier exits, are given more that nobody can predict."""
        noise, missed = torch.randn(2, 24, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with ExitReadout(denoiser, modules) as readout:
            found = readout(**{**arguments, "sample": noise + 4 * brightness - 2})
        maps = [modules.maps(number, state, found.timesteps) for number, state in enumerate(found.hidden)]
        layerwise = losses.layerwise_loss(found.predictions, found.full, mean_uncertainty(maps))
        predictions = found.predictions + (brightness + (3 - depth) / 6) * missed
        return maps, losses.token_labels(predictions, found.full, maps), layerwise

    before = measured(1000)[2].item()
    for step in range(40):
        maps, labels, layerwise = measured(step)
        optimizer.zero_grad()
        (losses.uncertainty_loss(maps, labels) + layerwise).backward()
        optimizer.step()
    maps, labels, after = measured(1000)
    assert after.item() < 0.5 * before
    expected, true = mean_uncertainty(maps).detach().numpy(), mean_uncertainty(labels).numpy()
    assert np.mean([spearman(*pair) for pair in zip(expected.T, true.T, strict=True)]) > 0.3
    assert np.mean([spearman(*pair) for pair in zip(expected, true, strict=True)]) > 0.3


@PIPELINES
def test_a_training_for_a_pipeline(name: str, tmp_path: Path) -> None:
    tiny = UNET_PIPELINES[name]
    pipe: Any = tiny.build()
    given = {key: value for key, value in tiny.inputs(batch=3).items() if key not in DRAWN_ANEW}
    requests = {key: given.pop(key) for key in [key for key in given if "prompt" in key]}
    given.pop("batch_size", None)
    result = train(pipe, small(), tmp_path, requests=requests, arguments=given)
    denoiser = pipe.unet
    assert result["exits"] == list(view(denoiser).exits)
    assert len(result["rmse"]) == len(denoiser.up_blocks)
    assert {"layers", "samples"} <= result["rank_correlation"].keys()
    assert load_modules(tmp_path).config["backbone"] == type(denoiser).__name__
    assert np.isfinite(result["rmse"]).all()
