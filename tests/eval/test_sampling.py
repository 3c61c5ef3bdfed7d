"""The same images in different ways, and images that are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from fastdiff.errors import ConfigError, UnsupportedPipelineError
from fastdiff.eval.sampling import BadImageError, Samples, batches, sample
from fastdiff.eval.tasks import Task, make_task
from fastdiff.eval.ways import Way, parse_ways, plain
from tiny.pipelines import TINY_PIPELINES
from tiny.unet_pipelines import UNET_PIPELINES

STEPS = 4
FULL = plain(STEPS)


@pytest.fixture
def dit() -> DiffusionPipeline:
    return TINY_PIPELINES["DiTPipeline"].build()


@pytest.fixture
def task(dit: DiffusionPipeline) -> Task:
    return make_task(dit, class_labels=range(10), guidance_scale=1.5)


def levels_apart(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.mark.parametrize("spec", ["steps:4", "feature-inheritance:interval=2"])
def test_an_image_depends_on_its_seed_and_request_alone(dit: DiffusionPipeline, task: Task, spec: str) -> None:
    (way,) = parse_ways([spec], STEPS)
    together = sample(dit, way, task, range(4, 8))
    alone = sample(dit, way, task, [5])
    assert together.images.shape == (4, 64, 64, 3)
    assert together.images.dtype == np.uint8
    # Rounding differs with the batch, the image does not.
    assert levels_apart(together.images[1], alone.images[0]) <= 1
    assert levels_apart(together.images[0], alone.images[0]) > 10
    assert np.allclose(together.denoised[1], alone.denoised[0], atol=1e-4)


def test_the_same_batch_again_is_the_same_to_the_byte(dit: DiffusionPipeline, task: Task) -> None:
    (way,) = parse_ways(["feature-inheritance:interval=2"], STEPS)
    first = sample(dit, way, task, range(4))
    sample(dit, FULL, task, range(4, 6))
    again = sample(dit, way, task, range(4))
    assert first.images.tobytes() == again.images.tobytes()
    assert first.denoised.tobytes() == again.denoised.tobytes()
    assert not np.array_equal(first.images, sample(dit, FULL, task, range(4)).images)


def test_noise_that_a_scheduler_draws_by_itself_is_seeded(dit: DiffusionPipeline, task: Task) -> None:
    dit.scheduler = DDPMScheduler()  # to which this pipeline does not hand its generators
    first = sample(dit, FULL, task, range(2))
    torch.rand(1)
    before = torch.get_rng_state()
    assert np.array_equal(first.images, sample(dit, FULL, task, range(2)).images)
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(first.images, sample(dit, FULL, Task(task.requests, task.shared, 1), range(2)).images)


def test_latents_are_what_the_autoencoder_decodes() -> None:
    entry = UNET_PIPELINES["StableDiffusionPipeline"]
    pipe = entry.build()
    task = make_task(pipe, prompts=["a", "b"], guidance_scale=1.0)
    samples = sample(pipe, FULL, task, range(2))
    latents = pipe(**task.arguments(range(2)), num_inference_steps=STEPS, output_type="latent").images
    assert samples.latents is not None
    assert np.allclose(samples.latents, latents.numpy() / pipe.vae.config.scaling_factor)
    assert samples.denoised is samples.latents
    assert "decode" not in vars(pipe.vae)


def test_without_an_autoencoder_pixels_are_what_was_denoised() -> None:
    pipe = UNET_PIPELINES["DDPMPipeline"].build()
    samples = sample(pipe, FULL, make_task(pipe), range(2))
    assert samples.latents is None
    assert np.array_equal(np.rint(samples.denoised * 255), samples.images)


def test_sets_are_joined_and_cut() -> None:
    parts = [Samples(np.full((2, 1, 1, 3), i, np.uint8), np.full((2, 4), i, np.float32)) for i in range(2)]
    joined = Samples.joined(parts).first(3)
    assert joined.images[:, 0, 0, 0].tolist() == [0, 0, 1]
    assert joined.denoised[:, 0].tolist() == [0, 0, 1]


def test_more_images_change_no_batch() -> None:
    assert batches(10, 4) == [range(0, 4), range(4, 8), range(8, 12)]
    assert batches(13, 4)[:3] == batches(10, 4)
    for count, size in ((0, 4), (4, 0)):
        with pytest.raises(ConfigError, match="At least one image"):
            batches(count, size)


# -- images that are none ----------------------------------------------------------------------------------------------


class Returning:
    """A pipeline that returns what it is given."""

    def __init__(self, images: Any) -> None:
        self._images = images

    def __call__(self, **_: Any) -> Any:
        return SimpleNamespace(images=self._images) if isinstance(self._images, np.ndarray) else self._images


def grey(count: int = 3, channels: int = 3) -> np.ndarray:
    return np.full((count, 2, 2, channels), 0.5, np.float32)


@pytest.mark.parametrize(
    ("value", "fault"), [(np.nan, "not finite"), (np.inf, "not finite"), (1.2, "outside"), (-0.2, "outside")]
)
def test_a_bad_pixel_is_a_typed_error_that_names_way_and_seed(value: float, fault: str) -> None:
    images = grey()
    images[1, 0, 0, 0] = value
    with pytest.raises(BadImageError, match=rf"seed 106.*steps-4.*{fault}") as raised:
        sample(Returning(images), FULL, Task(seed=100), range(5, 8))  # type: ignore[arg-type]
    assert (raised.value.way, raised.value.seed) == ("steps-4", 106)


def test_a_black_image_is_a_typed_error() -> None:
    images = grey()
    images[2] = 0
    with pytest.raises(BadImageError, match=r"seed 2.*black"):
        sample(Returning(images), FULL, Task(), range(3))  # type: ignore[arg-type]


def test_a_model_that_overflows_is_a_typed_error(dit: DiffusionPipeline, task: Task) -> None:
    with torch.no_grad():
        dit.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(BadImageError, match="not finite"):
        sample(dit, FULL, task, range(2))


def test_rounding_a_little_outside_is_none() -> None:
    images = grey()
    images[0, 0, 0] = 1.001
    assert sample(Returning(images), FULL, Task(), range(3)).images.max() == 255  # type: ignore[arg-type]


def test_grey_images_become_rgb() -> None:
    pipe: Any = Returning(grey(channels=1))
    assert sample(pipe, FULL, Task(), range(3)).images.shape == (3, 2, 2, 3)


@pytest.mark.parametrize("output", [grey(2), grey()[0], SimpleNamespace(frames=grey()), grey(channels=4)])
def test_what_are_no_images_is_a_typed_error(output: Any) -> None:
    pipe: Any = Returning(output)
    with pytest.raises(UnsupportedPipelineError, match="Returning"):
        sample(pipe, FULL, Task(), range(3))


def test_refused_arguments_are_a_typed_error(dit: DiffusionPipeline) -> None:
    with pytest.raises(ConfigError, match="does not sample this way"):
        sample(dit, Way(STEPS), Task(), [0])
