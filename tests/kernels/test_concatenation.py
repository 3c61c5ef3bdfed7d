"""Long skips that are not put together with the decoder's features: who reads the parts, and that none else notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import UpBlock2D
from kernel_checks.formula import assert_model_close
from kernel_checks.patched import build, call, cast, inputs
from torch import nn

import fastdiff
from fastdiff import EncoderPropagation, SkipTuning
from fastdiff.kernels import concatenation, steps
from fastdiff.kernels.concatenation import Concatenated, Skip, may_defer
from fastdiff.kernels.dispatch import obstacle
from tiny.base import build as build_model
from tiny.sampling import accelerate
from tiny.unet_pipelines import UNET_PIPELINES

APART = {"SD UNet": 6, "UNet with scale and shift": 7, "DDPM UNet": 5}
"""UNets, and how many of their concatenations are left out: all, but for those after attention in the DDPM's stages,
which hands on features with channels last while skips have them first."""
UNETS = pytest.mark.parametrize("name", APART)
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
FACTORS = pytest.mark.parametrize("factor", [None, 0.5, torch.tensor(0.5), torch.tensor([0.5, 2.0])])
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")


class Counts:
    """How often skips were put together with features, and multiplied, in one pass over memory each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noted = self.joined = self.multiplied = 0
        self._count(monkeypatch, Concatenated, "__init__", "noted")
        self._count(monkeypatch, Concatenated, "compute", "joined")
        self._count(monkeypatch, concatenation, "times", "multiplied")
        self._count(monkeypatch, steps, "times", "multiplied")

    def _count(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, counter: str) -> None:
        function = getattr(owner, name)

        def counting(*args: Any) -> Any:
            vars(self)[counter] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counting)

    def clear(self) -> None:
        self.noted = self.joined = self.multiplied = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def images(layout: torch.memory_format = torch.contiguous_format) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(4, width, 6, 5, generator=random).contiguous(memory_format=layout) for width in (8, 4))


# -- the tensor --------------------------------------------------------------------------------------------------------


def test_concatenation_of_features_and_a_skip_is_noted() -> None:
    x, features = images()
    beside = torch.cat([x, Skip(features, 0.5)], dim=1)
    assert isinstance(beside, Concatenated)
    assert beside.parts[0] is x
    assert beside.parts[1] is features
    assert beside.parts[2] == 0.5
    assert torch.cat([x, Skip(features)], dim=1).parts[2] == 1


@LAYOUTS
@FACTORS
@pytest.mark.parametrize(
    "read",
    [
        torch.clone,
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: F.group_norm(x, 4),
        lambda x: F.conv2d(x, torch.ones(3, 12, 1, 1)),
        lambda x: x.index_select(0, torch.tensor([2, 0])),
        lambda x: x.flatten(2).mT,
        lambda x: torch.cat([x, x], dim=1),
        lambda x: torch.cat([x, Skip(x, 2.0)], dim=1),
        lambda x: x[:, 3:7].chunk(2, dim=1)[1],
        lambda x: x.to(torch.float64),
        lambda x: torch.stack([x.mean((2, 3)), x.amax((2, 3))]),
        lambda x: x.mul_(3),
    ],
)
def test_whoever_reads_it_finds_the_tensor(
    read: Callable[[Any], Any], factor: Any, layout: torch.memory_format
) -> None:
    x, features = images(layout)
    each = factor.repeat_interleave(2).view(-1, 1, 1, 1) if isinstance(factor, torch.Tensor) and factor.ndim else factor
    expected = torch.cat([x, features if factor is None else features * each], dim=1)
    beside = torch.cat([x, Skip(features, factor)], dim=1)
    assert isinstance(beside, Concatenated)
    assert (beside.shape, beside.stride(), beside.dtype, beside.device) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
        expected.device,
    )
    assert repr(beside) == f"Concatenated({expected!r})"
    result, wanted = read(beside), read(expected)
    assert torch.equal(result + 0, wanted)
    assert result.stride() == wanted.stride()


def test_it_is_put_together_once(counts: Counts) -> None:
    x, features = images()
    beside = torch.cat([x, Skip(features, 0.5)], dim=1)
    assert (counts.noted, counts.joined, counts.multiplied) == (1, 0, 0)
    assert torch.equal(beside + beside, 2 * beside)
    assert (counts.noted, counts.joined, counts.multiplied) == (1, 1, 1)


@pytest.mark.parametrize("how", ["order", "dimension", "three", "dtype", "layout", "tokens"])
def test_other_concatenations_are_made(how: str) -> None:
    x, features = images()
    skip, dim = Skip(features, 0.5), 1
    given: list[torch.Tensor] = [x, skip]
    if how == "order":
        given = [skip, x]
    elif how == "dimension":
        given, dim = [features, skip], 0
    elif how == "three":
        given = [x, skip, skip]
    elif how == "dtype":
        given = [x.double(), skip]
    elif how == "layout":
        given = [x.contiguous(memory_format=torch.channels_last), skip]
    else:
        given = [x.flatten(2), Skip(features.flatten(2), 0.5)]
    result = torch.cat(given, dim=dim)
    assert type(result) is torch.Tensor
    assert torch.equal(result, torch.cat([each + 0 for each in given], dim=dim))


def test_sizes_that_do_not_fit_are_torchs_error() -> None:
    x, features = images()
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([x, Skip(features[:, :, 1:])], dim=1)


@pytest.mark.usefixtures("forced")
def test_no_kernel_is_handed_a_tensor_of_another_class(device: torch.device) -> None:
    x, features = (image.to(device) for image in images())
    assert obstacle(x, nn.Parameter(features)) == ""
    assert "Skip, which may hold its numbers in another way" in obstacle(x, Skip(features))


# -- in a UNet ---------------------------------------------------------------------------------------------------------


@UNETS
@pytest.mark.usefixtures("reference")
def test_nothing_is_put_together_in_half_precision(name: str, counts: Counts) -> None:
    model, arguments = build(name, torch.float16), inputs(name, torch.float16)
    fastdiff.optimize(model)
    call(model, arguments)
    assert counts.noted == APART[name]
    assert counts.joined == 0


@UNETS
@pytest.mark.usefixtures("reference")
def test_shortcuts_of_float32_stay_convolutions(name: str, counts: Counts) -> None:
    model = build(name)
    fastdiff.optimize(model)
    call(model, inputs(name))
    assert counts.joined == counts.noted > 0


@UNETS
def test_without_a_kernel_that_can_run_nothing_is_noted(name: str, counts: Counts) -> None:
    model, arguments = build(name), inputs(name)
    fastdiff.optimize(model)
    call(model, arguments)
    assert counts.noted == 0


def up_stage(
    dtype: torch.dtype, layout: torch.memory_format, factor: float | None
) -> tuple[UpBlock2D, Callable[[], torch.Tensor]]:
    """Returns a decoder's stage, and a call of it whose groups lie across the border between features and skip."""
    sizes = {"in_channels": 8, "prev_output_channel": 20, "out_channels": 12}
    stage = build_model(
        UpBlock2D, sizes | {"temb_channels": 16, "num_layers": 2, "resnet_groups": 4, "add_upsample": False}
    )
    random = torch.Generator().manual_seed(1)
    images = [torch.randn(2, width, 5, 7, generator=random).to(dtype) for width in (20, 12, 8)]
    temb = torch.randn(2, 16, generator=random).to(dtype)

    def forward() -> torch.Tensor:
        place = next(stage.parameters())
        x, *skips = (image.to(place.device, place.dtype, memory_format=layout) for image in images)
        return stage(x, tuple(Skip(skip, factor) for skip in reversed(skips)), temb.to(place.device, place.dtype))

    return stage.to(dtype, memory_format=layout), forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@LAYOUTS
@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.usefixtures("forced")
def test_kernels_read_the_parts(
    dtype: torch.dtype, layout: torch.memory_format, factor: float | None, counts: Counts, device: torch.device
) -> None:
    stage, forward = up_stage(dtype, layout, factor)
    stage.to(device)
    eager = forward()
    assert fastdiff.optimize(stage).replaced[""] == "UpBlock2D: skips read where they lie, with their factor"
    counts.clear()
    result = forward()
    assert counts.noted == 2
    assert counts.joined == (2 if dtype == torch.float32 else 0)
    fastdiff.restore(stage)
    stage.double()
    exact = forward()
    if dtype == torch.bfloat16 and device.type == "cpu":  # the interpreter cuts off what a GPU rounds
        assert (result - exact).norm() < 2 * (eager - exact).norm()
    else:
        assert_model_close(result, exact, eager)


@pytest.mark.usefixtures("reference")
def test_strangers_between_stage_and_block_see_one_tensor(counts: Counts) -> None:
    model, arguments = build("SD UNet"), inputs("SD UNet")
    resnet = model.up_blocks[1].resnets[0]
    resnet.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    plain = call(model, arguments)
    fastdiff.optimize(model)
    torch.testing.assert_close(call(model, arguments), plain)
    assert counts.joined == counts.noted > 0


@pytest.mark.parametrize("part", ["norm1", "conv_shortcut"])
@pytest.mark.usefixtures("reference")
def test_hooked_layers_are_called(part: str, counts: Counts) -> None:
    model, arguments = build("SD UNet", torch.float16), inputs("SD UNet", torch.float16)
    seen: list[Any] = []
    layer = getattr(model.up_blocks[1].resnets[0], part)
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0] + 0))
    plain = call(model, arguments)
    fastdiff.optimize(model)
    torch.testing.assert_close(call(model, arguments), plain, rtol=2e-2, atol=2e-2)
    assert counts.joined == 1
    torch.testing.assert_close(*seen, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("reference")
def test_freeu_changes_the_skips_first() -> None:
    model, arguments = build("SD UNet"), inputs("SD UNet")
    without = call(model, arguments)
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    plain = call(model, arguments)
    assert not torch.equal(plain, without)
    fastdiff.optimize(model)
    torch.testing.assert_close(call(model, arguments), plain)


@pytest.mark.usefixtures("reference")
def test_stage_with_a_compiled_block_stands_back(counts: Counts) -> None:
    model, arguments = build("SD UNet"), inputs("SD UNet")
    plain = call(model, arguments)
    fastdiff.optimize(model)
    model.up_blocks[0].resnets[0].compile(backend="eager")
    torch.testing.assert_close(call(model, arguments), plain)
    assert counts.noted == sum(len(stage.resnets) for stage in list(model.up_blocks)[1:])


@pytest.mark.usefixtures("reference")
def test_gradients_make_it_stand_back() -> None:
    x, _ = images()
    assert may_defer(x)
    with torch.enable_grad():
        assert not may_defer(x)


# -- with skip-tuning --------------------------------------------------------------------------------------------------

RISING = SkipTuning(rho_bottom=0.4, rho_top=0.9, time="increasing")


@pytest.mark.parametrize("tune", [SkipTuning(rho=0.5), RISING], ids=["constant", "rising"])
@pytest.mark.usefixtures("reference")
def test_factors_cost_no_pass_over_the_skips(tune: SkipTuning, counts: Counts) -> None:
    model, arguments = build("SD UNet", torch.float16), inputs("SD UNet", torch.float16, batch=16)
    timesteps = [900.0, 600.0, 300.0]
    calls = [arguments | {"timestep": torch.full_like(arguments["timestep"], timestep)} for timestep in timesteps]
    plain = [call(model, each) for each in calls]
    eager, _ = accelerate(model, calls, tune, timesteps)
    assert counts.multiplied > 0
    fastdiff.optimize(model)
    counts.clear()
    outputs, record = accelerate(model, calls, tune, timesteps)
    assert (counts.joined, counts.multiplied) == (0, 0)
    (tuned,) = record.denoisers.values()
    assert tuned.skip_scales.keys() >= {1, 2}
    fastdiff.restore(model)
    exact, _ = accelerate(model.double(), cast(calls, torch.float64), tune, timesteps)
    for (result,), (own,), (truth,), without in zip(outputs, eager, exact, plain, strict=True):
        untouched = tune is RISING and without is plain[0]
        assert torch.equal(own, without) == untouched
        assert_model_close(result, truth, own)


@pytest.mark.usefixtures("reference")
def test_factors_of_evaluations_that_run_as_one_batch(counts: Counts) -> None:
    def latents(dtype: torch.dtype, optimized: bool) -> torch.Tensor:
        name = "StableDiffusionPipeline"
        pipe = UNET_PIPELINES[name].build()
        for model in (pipe.unet, pipe.text_encoder):
            model.to(dtype)
        fastdiff.enable(pipe, [EncoderPropagation((0, 1, 4), parallel=True, prior_noise=0), RISING])
        if optimized:
            fastdiff.optimize(pipe)
        counts.clear()
        result = UNET_PIPELINES[name].sample(pipe, steps=7, batch=2)
        assert sum(pipe.fastdiff.last_run.denoisers["unet"].batches) == 6
        return result.double()

    exact, eager = latents(torch.float32, False), latents(torch.float16, False)
    assert counts.multiplied > 0
    torch.testing.assert_close(latents(torch.float32, True), exact)
    result = latents(torch.float16, True)
    assert counts.noted > counts.multiplied == 0
    assert 0 < (result - exact).norm() < 1.5 * (eager - exact).norm()


@pytest.mark.usefixtures("reference")
def test_what_controlnets_add_keeps_its_own_factor(counts: Counts) -> None:
    name = "StableDiffusionControlNetPipeline"
    images = []
    for optimized in (False, True):
        pipe = UNET_PIPELINES[name].build()
        fastdiff.enable(pipe, SkipTuning(rho=0.5, exclude_control=True))
        if optimized:
            fastdiff.optimize(pipe)
        counts.clear()
        images.append(UNET_PIPELINES[name].sample(pipe, steps=4, batch=1))
    assert counts.noted > 0
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)
    fastdiff.enable(pipe, SkipTuning(rho=0.5))
    assert (UNET_PIPELINES[name].sample(pipe, steps=4, batch=1) - images[0]).abs().max() > 1e-3
