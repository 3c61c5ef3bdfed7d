"""The pipeline of U-ViTs: guidance, schedulers, labels, files, and what its files may name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline

import fastdiff
from fastdiff import ConfigError, ExitSchedule, FastDiffPipeline, UnsupportedPipelineError
from fastdiff.models import UViTPipeline, pipeline_class
from tiny.base import HEIGHT
from tiny.pipeline_base import CLASSES, vae
from tiny.pipelines import TINY_PIPELINES
from tiny.uvit import OWN_PIPELINES, UNCONDITIONAL, UVIT, build_uvit

TINY = OWN_PIPELINES["UViTPipeline"]
LABELS = [3, 7]


def quiet(pipe: UViTPipeline) -> UViTPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(config: dict[str, Any], scheduler: Any = None) -> UViTPipeline:
    """A pipeline without a VAE, of 3 channels."""
    model = build_uvit(config | {"in_channels": 3})
    return quiet(UViTPipeline(model, scheduler or DDIMScheduler()))


def sample(pipe: Any, labels: Any = LABELS, **arguments: Any) -> torch.Tensor:
    given = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(labels, **given | arguments).images


@torch.no_grad()
def by_hand(pipe: UViTPipeline, labels: list[int], scale: float, steps: int = 4) -> torch.Tensor:
    """What the pipeline should sample: two passes for each step, joined as guidance says."""
    generator = torch.Generator().manual_seed(0)
    pipe.scheduler.set_timesteps(steps)
    latents = torch.randn(len(labels), 4, HEIGHT, HEIGHT, generator=generator) * pipe.scheduler.init_noise_sigma
    noise = {"generator": generator} if isinstance(pipe.scheduler, DDPMScheduler) else {}
    for timestep in pipe.scheduler.timesteps:
        given = pipe.scheduler.scale_model_input(latents, timestep)
        conditional, free = (
            pipe.transformer(given, timestep, class_labels=torch.tensor(classes)).sample
            for classes in (labels, [CLASSES] * len(labels))
        )
        latents = pipe.scheduler.step(free + scale * (conditional - free), timestep, latents, **noise).prev_sample
    return latents


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "HeunDiscreteScheduler",
    ],
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guided_samples_are_those_of_separate_passes(scheduler: str, scale: float) -> None:
    pipe = TINY.build()
    pipe.scheduler = getattr(diffusers, scheduler)()
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    sampled = sample(pipe, guidance_scale=scale)
    assert set(rows) == {2 if scale == 1 else 4}
    expected = by_hand(pipe, LABELS, scale)
    assert torch.allclose(sampled, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_no_labels_are_the_null_class() -> None:
    pipe = TINY.build()
    assert torch.equal(sample(pipe, None, batch_size=2), sample(pipe, [CLASSES, CLASSES]))
    assert not torch.equal(sample(pipe, None, batch_size=2), sample(pipe))


@pytest.mark.parametrize("labels", [[3], 3, (3,), torch.tensor([3]), np.array([3]), torch.tensor(3)])
def test_labels_may_be_a_number_or_a_sequence(labels: Any) -> None:
    pipe = TINY.build()
    assert torch.equal(sample(pipe, labels), sample(pipe, [3]))


def test_unconditional_pixels() -> None:
    pipe = pixels(UNCONDITIONAL)
    images = sample(pipe, None, batch_size=3, output_type="np")
    raw = sample(pipe, None, batch_size=3)
    assert images.shape == (3, HEIGHT, HEIGHT, 3)
    assert np.allclose(images, (raw / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert sample(pipe, None, output_type="pil")[0].size == (HEIGHT, HEIGHT)
    assert torch.is_tensor(pipe(num_inference_steps=2, output_type="pt", return_dict=False)[0])


def test_latents_are_decoded_as_the_vae_asks() -> None:
    pipe = TINY.build()
    pipe.vae = vae(scaling_factor=0.5, shift_factor=0.25)
    with torch.no_grad():
        expected = pipe.vae.decode(sample(pipe) / 0.5 + 0.25).sample
    assert torch.allclose(sample(pipe, output_type="pt"), (expected / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_given_latents_are_where_it_starts() -> None:
    pipe = TINY.build()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, HEIGHT, HEIGHT, generator=generator)
    before = latents.clone()
    assert torch.equal(sample(pipe, latents=latents, generator=None), sample(pipe))
    assert torch.equal(latents, before)


def test_a_generator_for_each_image() -> None:
    pipe = TINY.build()
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = sample(pipe, generator=generators)
    alone = sample(pipe, LABELS[1:], generator=torch.Generator().manual_seed(6))
    assert torch.allclose(both[1], alone[0], rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_callback_sees_and_changes_the_latents() -> None:
    pipe = TINY.build()
    seen: list[tuple[int, int]] = []

    def halt(given: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe
        seen.append((step, int(timestep)))
        return {"latents": tensors["latents"] * 0}

    zeroed = sample(pipe, callback_on_step_end=halt)
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert not zeroed.any()
    assert torch.equal(sample(pipe, callback_on_step_end=lambda *_: None), sample(pipe))


@pytest.mark.parametrize(
    ("config", "labels", "arguments", "message"),
    [
        (UVIT, [CLASSES + 1], {}, f"from 0 to {CLASSES}"),
        (UVIT, [-1], {}, f"from 0 to {CLASSES}"),
        (UVIT, [1.5], {}, "whole numbers"),
        (UVIT, [], {}, "whole numbers"),
        (UVIT | {"null_class": False}, [CLASSES], {}, f"from 0 to {CLASSES - 1}"),
        (UVIT | {"null_class": False}, None, {}, "no null class; give class_labels"),
        (UVIT | {"null_class": False}, [1], {"guidance_scale": 2.0}, "no null class to guide away from"),
        (UNCONDITIONAL, [1], {}, "unconditional"),
        (UNCONDITIONAL, None, {"guidance_scale": 2.0}, "unconditional"),
        (UNCONDITIONAL | {"context_dim": 8}, None, {}, "conditioned on text"),
        (UVIT, None, {"batch_size": 0}, "batch_size is a whole number from 1; got 0"),
        (UVIT, [1], {"callback_on_step_end_tensor_inputs": ["noise"]}, "'latents' alone.*noise"),
        (UVIT, [1], {"latents": torch.zeros(2, 3, HEIGHT, HEIGHT)}, r"\(1, 3, 8, 8\).*\(2, 3, 8, 8\)"),
    ],
)
def test_calls_that_the_model_cannot_answer_are_refused(
    config: dict[str, Any], labels: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(pixels(config), labels, **arguments)


def test_classes_have_names() -> None:
    pipe = UViTPipeline(TINY.build().transformer, DDIMScheduler(), id2label={0: "tench, fish", 3: "fox"})
    assert pipe.get_label_ids(["fox", "fish"]) == [3, 0]
    assert pipe.get_label_ids("tench") == [0]
    with pytest.raises(ConfigError, match="no class 'cat'; the classes are tench, fish, fox"):
        pipe.get_label_ids("cat")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pipe = TINY.build()
    named = UViTPipeline(**pipe.components, id2label={3: "fox"})
    named.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_pipeline_samples_the_same_and_keeps_its_names(folder: Path) -> None:
    for loaded in (UViTPipeline.from_pretrained(folder), pipeline_class(folder).from_pretrained(folder)):
        assert torch.equal(sample(quiet(loaded)), sample(TINY.build()))
        assert loaded.labels == {"fox": 3}
    assert "fastdiff.models.uvit" in (folder / "model_index.json").read_text()


def test_saved_pipeline_without_a_vae(tmp_path: Path) -> None:
    pipe = pixels(UNCONDITIONAL)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(sample(quiet(UViTPipeline.from_pretrained(tmp_path)), None), sample(pipe, None))


def test_accelerated_pipeline_is_saved_and_restored(folder: Path, tmp_path: Path) -> None:
    pipe = FastDiffPipeline.from_pretrained(folder, methods=ExitSchedule("ase-demo"))
    assert isinstance(pipe, UViTPipeline)
    quiet(pipe).save_pretrained(tmp_path / "again")
    again = quiet(FastDiffPipeline.from_pretrained(tmp_path / "again"))
    assert torch.equal(sample(again), sample(pipe))
    assert again.fastdiff.last_run.skipped > 0
    assert not torch.equal(sample(again), sample(TINY.build()))
    assert torch.equal(sample(fastdiff.disable(again)), sample(TINY.build()))


def test_other_pipelines_are_still_loaded_by_diffusers(tmp_path: Path) -> None:
    TINY_PIPELINES["DiTPipeline"].build().save_pretrained(tmp_path)
    assert pipeline_class(tmp_path) is DiffusionPipeline
    assert isinstance(FastDiffPipeline.from_pretrained(tmp_path, methods=ExitSchedule("full")), DiTPipeline)


@pytest.mark.parametrize("content", [{"_class_name": ["code", "UViTPipeline"]}, {"_class_name": None}, {}])
def test_index_that_names_no_pipeline_is_left_to_diffusers(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    assert pipeline_class(tmp_path) is DiffusionPipeline


def test_repository_in_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    revision = "0" * 40
    repository = tmp_path / "cache" / "models--someone--uvit"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    pipe = FastDiffPipeline.from_pretrained("someone/uvit", methods=ExitSchedule("full"), **where)
    assert torch.equal(sample(quiet(pipe)), sample(TINY.build()))


@pytest.mark.parametrize("library", ["intruder", "intruder.models", "os", "diffusersx"])
def test_libraries_that_the_index_names_are_not_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    (tmp_path / "intruder").mkdir()
    for file in ("__init__.py", "models.py"):
        (tmp_path / "intruder" / file).write_text("class UViT: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"transformer": [library, "UViT"]}))
    with pytest.raises(ConfigError, match=f"transformer comes from '{library}'"):
        UViTPipeline.from_pretrained(folder)
    with pytest.raises(UnsupportedPipelineError, match=f"transformer comes from '{library}'"):
        FastDiffPipeline.from_pretrained(folder)
    assert not [name for name in sys.modules if name.startswith("intruder")]
