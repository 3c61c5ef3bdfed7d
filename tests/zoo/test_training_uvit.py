"""The training of the zoo's U-ViT: a few steps, what is written, and that the result can be judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from fastdiff import ExitSchedule, FastDiffPipeline
from fastdiff.backbones import view
from fastdiff.models import UViT, UViTPipeline
from fastdiff.zoo import check, data, train, training, training_dit, training_uvit
from fastdiff.zoo.training_loop import LoopConfig, fit


@pytest.fixture
def transformer() -> UViT:
    torch.manual_seed(0)
    return training_uvit.build_transformer(num_layers=4, num_attention_heads=2, attention_head_dim=8)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return training.build_vae().eval()


def test_shipped_size() -> None:
    model = training_uvit.build_transformer()
    assert model.null_label == training_uvit.NULL_CLASS == 36
    assert len(model.transformer_in_blocks) == len(model.transformer_out_blocks) == 6
    assert 2e6 < model.num_parameters() < 3e6


def test_every_block_starts_as_the_identity(transformer: UViT) -> None:
    tokens = torch.randn(2, 18, 16)
    for unit in view(transformer).units:
        assert unit.merges_skip or torch.equal(unit.module(tokens), tokens), unit.name


def test_few_steps_lower_the_loss(transformer: UViT, tmp_path: Path) -> None:
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1)).sign() / 2
    predict = training_uvit.denoiser_predictor(transformer, compiled=False)
    loss = training_dit.denoiser_loss(predict, latents, torch.arange(64) % 36, 32, training_uvit.NULL_CLASS)
    held_out = torch.Generator().manual_seed(99)
    state = held_out.get_state()
    with torch.no_grad():
        before = float(loss(held_out))
    fit(transformer, loss, LoopConfig(steps=30, warmup_steps=5, learning_rate=3e-3, ema_decay=0.5), tmp_path)
    held_out.set_state(state)
    with torch.no_grad():
        assert float(loss(held_out)) < 0.95 * before


def test_dropped_labels_are_the_models_own_null_class() -> None:
    condition = training_dit.class_condition(torch.zeros(64, dtype=torch.long), null_class=36)
    classes = condition(torch.zeros(1000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert set(classes.tolist()) == {0, 36}


def test_export_is_a_half_precision_folder_that_samples(transformer: UViT, vae: AutoencoderKL, tmp_path: Path) -> None:
    training_uvit.export(transformer, vae, tmp_path / "model")
    pipe = UViTPipeline.from_pretrained(tmp_path / "model")
    assert pipe.labels == {character: index for index, character in enumerate(data.CHARACTERS)}
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, transformer.state_dict()[name].half().float()), name
    training_uvit.export(pipe.transformer, pipe.vae, tmp_path / "again")  # models that know where they came from
    assert not [file for file in (tmp_path / "again").rglob("*.json") if str(tmp_path) in file.read_text()]

    accelerated = FastDiffPipeline.from_pretrained(tmp_path / "model", methods=ExitSchedule("ase-demo"))
    accelerated.set_progress_bar_config(disable=True)
    images, asked = check.sample_as_asked(accelerated, 3, num_inference_steps=4, guidance_scale=4.0)
    assert images.shape == (3, 3, 32, 32)
    assert asked == [0, 1, 2]
    assert accelerated.fastdiff.last_run.skipped > 0


@pytest.mark.slow
def test_commands_train_and_export(tmp_path: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    vae.save_pretrained(work / "vae" / "model")
    images, labels = data.render_many(0, 0, 64)
    save_file({"latents": torch.randn(64, 4, 8, 8)}, work / "latents.safetensors")
    monkeypatch.setattr(train, "pool", lambda *_: (torch.from_numpy(images), torch.from_numpy(labels)))
    train.main(["uvit", "--work", str(work), "--steps", "2", "--batch-size", "8"])
    train.main(["export", "--work", str(work), "--out", str(tmp_path / "out"), "--model", "glyphs-uvit"])
    saved = load_file(tmp_path / "out" / "glyphs-uvit" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}
