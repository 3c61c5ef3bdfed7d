"""The uncertainty modules and exit heads that ship with the zoo's transformers, on renders that nothing saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff import FastDiffPipeline, zoo
from fastdiff.methods import UncertaintyExit
from fastdiff.models import pipeline_class
from fastdiff.uem.modules import load_modules
from fastdiff.uem.readout import ExitReadout
from fastdiff.uem.validation import spearman
from fastdiff.zoo import check, data
from fastdiff.zoo.training import encode

MODELS = {"glyphs-dit": "glyphs-dit-uem", "glyphs-uvit": "glyphs-uvit-uem"}
"""Models as they are, and their copies that were fine-tuned with exits."""
EVERY_MODEL = pytest.mark.parametrize("name", [*MODELS, *MODELS.values()])
TIMESTEPS = (150, 450, 750)
IMAGES = 36


class Seen:
    """What the exits of a model see in noisy renders, one timestep after another."""

    def __init__(self, name: str) -> None:
        pipe = _load(name)
        modules = load_modules(zoo.path(name) / "uem")
        images, labels = data.render_many(check.HELD_OUT_SEED, 500, IMAGES)
        clean = encode(pipe.vae, torch.from_numpy(images)).float()
        self.noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        found = []
        with torch.no_grad(), ExitReadout(pipe.transformer, modules) as readout:
            for timestep in TIMESTEPS:
                timesteps = torch.full((IMAGES,), timestep)
                noisy = pipe.scheduler.add_noise(clean, self.noise, timesteps)
                seen = readout(hidden_states=noisy, timestep=timesteps, class_labels=torch.from_numpy(labels[:, 0]))
                scores = [modules.score(exit, state, timesteps) for exit, state in enumerate(seen.hidden)]
                found.append((seen.predictions, seen.full, torch.stack(scores)))
        self.exits, self.full, self.scores = (torch.stack(part) for part in zip(*found, strict=True))

    def errors(self, truth: torch.Tensor) -> torch.Tensor:
        """Mean absolute error of every exit, shape ``(timesteps, exits, images)``."""
        return (self.exits - truth).abs().flatten(3).mean(3)


def _load(name: str, **settings: Any) -> Any:
    loader = FastDiffPipeline if settings else pipeline_class(zoo.path(name))
    pipe = loader.from_pretrained(f"zoo:{name}" if settings else zoo.path(name), **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(name: str) -> Seen:
    return Seen(name)


@pytest.fixture(scope="module")
def tuned(name: str) -> Seen:
    return Seen(MODELS[name])


def _sample(pipe: Any, steps: int = 6) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipe([10, 30], generator=generator, num_inference_steps=steps, guidance_scale=1.5, output_type="pt").images


@EVERY_MODEL
def test_exits_of_a_shipped_model_need_no_weights(name: str) -> None:
    untouched = _sample(_load(name))
    pipe = _load(name, methods=[UncertaintyExit(threshold=0)])
    assert torch.equal(_sample(pipe), untouched)
    fastdiff.enable(pipe, UncertaintyExit(threshold=1))
    _sample(pipe)
    assert pipe.fastdiff.last_run.skipped > 0.8 * 6 * 13


def test_modules_rank_exits_and_samples_by_their_errors(plain: Seen) -> None:
    errors = plain.errors(plain.full[:, None])
    across_exits = [
        spearman(plain.scores[time, :, image].numpy(), errors[time, :, image].numpy())
        for time in range(len(TIMESTEPS))
        for image in range(IMAGES)
    ]
    assert sum(across_exits) / len(across_exits) > 0.9
    across_samples = [
        spearman(plain.scores[time, exit].numpy(), errors[time, exit].numpy())
        for time in range(len(TIMESTEPS))
        for exit in range(plain.scores.shape[1])
    ]
    # Modules that know only exit and timestep would score 0.
    assert sum(across_samples) / len(across_samples) > 0.4


def test_exits_that_the_denoiser_learned_with_are_nearer_to_the_truth(plain: Seen, tuned: Seen) -> None:
    untaught, taught = (seen.errors(seen.noise) for seen in (plain, tuned))
    half = untaught.shape[1] // 2
    assert (taught[:, :half].mean((1, 2)) < untaught[:, :half].mean((1, 2))).all()
    full = (tuned.full - tuned.noise).abs().mean()
    assert taught[:, half].mean() < 1.5 * full < untaught[:, half].mean()


def test_the_full_depth_lost_little_by_it(plain: Seen, tuned: Seen) -> None:
    before, after = ((seen.full - seen.noise).square().mean() for seen in (plain, tuned))
    assert after < 1.15 * before
