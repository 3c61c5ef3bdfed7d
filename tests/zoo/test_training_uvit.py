"""The training of the zoo's U-ViTs: a few steps, the early-exit copy, what is written, and that it can be judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from fastdiff import ExitSchedule, FastDiffPipeline
from fastdiff.backbones import view
from fastdiff.models import UViT, UViTPipeline
from fastdiff.zoo import check, data, train, training, training_dit, training_uvit
from fastdiff.zoo.training_loop import LoopConfig, StepLoss, fit
from tiny.sampling import without


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


# -- the early-exit copy -----------------------------------------------------------------------------------------------

SCHEDULE = ExitSchedule(bin_edges=(0, 300, 600), depths=(5, 4, 3))
GONE = {5: [], 4: ["transformer_out_blocks.1.block"], 3: ["transformer_out_blocks.0.block"]}
"""What a depth leaves out that the depth above does not."""


@pytest.fixture
def trained() -> UViT:
    """A denoiser whose blocks are no identities, with a network for the timestep."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
    model = UViT(**sizes, num_classes=36, time_embed_mlp=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def exiting_loss(model: UViT) -> StepLoss:
    latents = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    predict = training_uvit.exiting_predictor(model, SCHEDULE)
    return training_dit.denoiser_loss(predict, latents, torch.arange(32), 8, training_uvit.NULL_CLASS)


def fine_tuned(model: UViT, folder: Path, stop_at: int | None = None, **settings: float) -> dict[str, torch.Tensor]:
    """The averaged weights after a few steps of the published recipe."""
    training_dit.freeze_timestep_embedders(model)
    config = LoopConfig(warmup_steps=1, ema_warmup=False, **settings)  # type: ignore[arg-type]
    fit(model, exiting_loss(model), config, folder, stop_at=stop_at)
    return model.state_dict()


def test_each_sample_runs_the_blocks_of_its_timestep(trained: UViT) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(6, 4, 8, 8, generator=generator)
    timesteps, classes = torch.tensor([999, 0, 299, 300, 600, 599]), torch.arange(6)
    with torch.no_grad():
        predicted = training_uvit.exiting_predictor(trained, SCHEDULE)(noisy, timesteps, classes)
        for depth, rows in ((5, [1, 2]), (4, [3, 5]), (3, [0, 4])):
            alone = without(trained, GONE[depth])(noisy[rows], timesteps[rows], classes[rows]).sample
            torch.testing.assert_close(predicted[rows], alone, rtol=1e-5, atol=1e-5)
            others = [row for row in range(6) if row not in rows]
            wrong = trained(noisy[others], timesteps[others], classes[others]).sample
            assert not torch.allclose(predicted[others], wrong, rtol=0, atol=1e-2)


def test_fine_tuning_leaves_the_timestep_embedder_alone(trained: UViT, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    after = fine_tuned(trained, tmp_path, steps=2)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert set(before) - changed == {name for name in before if name.startswith("time_embed.")} != set()


def test_average_after_a_step_is_between_the_old_weights_and_the_new(trained: UViT, tmp_path: Path) -> None:
    old = {name: value.clone() for name, value in trained.state_dict().items()}
    average = fine_tuned(trained, tmp_path, steps=1, ema_decay=0.75, learning_rate=0.1)
    checkpoint = load_file(tmp_path / "checkpoint.safetensors")
    for name, value in average.items():
        new = checkpoint[f"model.{name}"]
        torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * new, rtol=1e-6, atol=1e-6)
        assert name.startswith("time_embed.") or not torch.allclose(new, old[name], rtol=0, atol=1e-3)


def test_interrupted_fine_tuning_ends_with_the_same_weights(trained: UViT, tmp_path: Path) -> None:
    fresh = {name: value.clone() for name, value in trained.state_dict().items()}
    whole = {name: value.clone() for name, value in fine_tuned(trained, tmp_path / "whole", steps=5).items()}
    trained.load_state_dict(fresh)
    interrupted = fine_tuned(trained, tmp_path / "parts", stop_at=3, steps=5)
    assert not all(torch.equal(whole[name], value) for name, value in interrupted.items())
    trained.load_state_dict(fresh)
    resumed = fine_tuned(trained, tmp_path / "parts", steps=5)
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_shipped_schedule_keeps_the_first_half() -> None:
    backbone = view(training_uvit.build_transformer())
    depths = train.ASE_SCHEDULE.depths_for(backbone, np.arange(50, 1000, 100))
    assert depths.tolist() == [13, 13, 11, 11, 9, 9, 7, 7, 7, 7]


# -- what is written ---------------------------------------------------------------------------------------------------


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


def test_commands_train_and_export(tmp_path: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    vae.save_pretrained(work / "vae" / "model")
    images, labels = data.render_many(0, 0, 64)
    save_file({"latents": torch.randn(64, 4, 8, 8)}, work / "latents.safetensors")
    monkeypatch.setattr(train, "pool", lambda *_: (torch.from_numpy(images), torch.from_numpy(labels)))
    settings = ["--work", str(work), "--batch-size", "8"]
    with pytest.raises(SystemExit, match=r"fastdiff\.zoo\.train uvit`"):
        train.main(["uvit-ase", *settings, "--steps", "2"])
    train.main(["uvit", *settings, "--steps", "2"])
    for steps in ("1", "2"):  # the second continues the first
        train.main(["uvit-ase", *settings, "--steps", steps])
    log = (work / "uvit-ase" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    names = ["glyphs-uvit", "glyphs-uvit-ase"]
    train.main(["export", "--work", str(work), "--out", str(tmp_path / "out"), "--model", *names])
    weights = "transformer/diffusion_pytorch_model.safetensors"
    full, exiting = (load_file(tmp_path / "out" / name / weights) for name in names)
    assert {value.dtype for value in [*full.values(), *exiting.values()]} == {torch.float16}
    assert not all(torch.equal(full[name], value) for name, value in exiting.items())
