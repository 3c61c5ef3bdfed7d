"""The UNets' training: what captions say and omit, which parts learn, resumed runs, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from fastdiff.zoo import captions, data, export, training, training_unet
from fastdiff.zoo.denoising import denoising_loss
from fastdiff.zoo.training_loop import LoopConfig, fit


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    captions.write_tokenizer(folder)
    return captions.load_tokenizer(folder)


def _text_models(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    torch.manual_seed(0)
    text_encoder = training_unet.build_text_encoder(tokenizer, hidden_size=16, layers=1)
    return text_encoder, training_unet.build_text_unet((16, 16, 32), cross_attention_dim=16)


def _pixel_model() -> UNet2DModel:
    torch.manual_seed(0)
    return training_unet.build_pixel_unet((8, 32))


@pytest.fixture(scope="module")
def rendered() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = data.render_many(0, 0, 16)
    return torch.from_numpy(images), torch.from_numpy(labels)


class TestCaptions:
    def test_say_what_the_image_shows_half_of_them_in_the_standard_phrase(
        self, tokenizer: CLIPTokenizer, rendered: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        _, labels = rendered
        chosen = torch.arange(16).repeat(250)
        tokens = training_unet.caption_condition(tokenizer, labels)(chosen, torch.Generator().manual_seed(0))
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        seen = [0] * len(captions.PHRASES)
        empty = 0
        for text, (character, _, fore, back) in zip(texts, labels[chosen].tolist(), strict=True):
            allowed = [captions.caption(character, fore, back, phrase).lower() for phrase in range(len(seen))]
            if text.strip():
                seen[allowed.index(text.strip())] += 1
            else:
                empty += 1
        assert abs(empty / 4000 - training_unet.CAPTION_DROPOUT) < 0.024  # 5 standard errors
        standard = 0.9 * (0.5 + 0.5 / len(seen))
        assert abs(seen[0] / 4000 - standard) < 0.04
        assert min(seen) > 250

    def test_empty_caption_is_what_the_pipeline_guides_with(self, tokenizer: CLIPTokenizer) -> None:
        (empty,) = training_unet.tokenize(tokenizer, [""]).tolist()
        assert empty == [tokenizer.bos_token_id, *[tokenizer.eos_token_id] * (captions.MAX_TOKENS - 1)]


def test_denoiser_and_text_encoder_learn_together(
    tokenizer: CLIPTokenizer, rendered: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    text_encoder, unet = _text_models(tokenizer)
    both = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    before = {name: value.clone() for name, value in both.state_dict().items()}
    loss = training_unet.text_loss(unet, text_encoder, tokenizer, torch.randn(16, 4, 8, 8), rendered[1], 8)
    fit(both, loss, LoopConfig(steps=3, warmup_steps=1), tmp_path)
    changed = {name for name, value in both.state_dict().items() if not torch.equal(value, before[name])}
    assert any("token_embedding" in name for name in changed)
    assert any("attn2.to_k" in name for name in changed)
    assert any("resnets" in name for name in changed)


@pytest.mark.parametrize("kind", ["text", "pixel"])
def test_resumed_run_ends_with_the_same_weights(
    kind: str, tokenizer: CLIPTokenizer, rendered: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    images, labels = rendered
    latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1)).half()

    def train(folder: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        if kind == "text":
            text_encoder, unet = _text_models(tokenizer)
            model: nn.Module = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
            loss = training_unet.text_loss(unet, text_encoder, tokenizer, latents, labels, 4)
        else:
            model = unet = _pixel_model()
            loss = training_unet.pixel_loss(unet, images, 4)
        fit(model, loss, LoopConfig(steps=5, warmup_steps=1, checkpoint_every=2), folder, stop_at=stop_at)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    interrupted = train(tmp_path / "parts", stop_at=3)
    resumed = train(tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], interrupted[name]) for name in whole)


def test_loss_of_a_batch_falls_when_the_pixel_model_trains(rendered: tuple[torch.Tensor, torch.Tensor]) -> None:
    unet = _pixel_model()
    loss = training_unet.pixel_loss(unet, rendered[0], 8)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        value = loss(torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("pixels", [False, True])
def test_loss_of_perfect_predictions_is_zero_and_of_none_the_weighted_target(pixels: bool) -> None:
    scheduler = training_unet.build_scheduler(pixels=pixels)
    clean = torch.full((1, 3, 4, 4), 0.5)
    seen = {}

    def loss_of(share: float) -> float:
        def predict(noisy: torch.Tensor, timesteps: torch.Tensor, nothing: None) -> torch.Tensor:
            alphas = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            noise = (noisy.float() - alphas.sqrt() * clean) / (1 - alphas).sqrt()
            target = clean if pixels else noise
            seen[share] = timesteps
            return share * target

        step = denoising_loss(
            predict,
            lambda chosen: clean.expand(len(chosen), -1, -1, -1),
            lambda chosen, generator: None,
            count=1,
            batch_size=512,
            scheduler=scheduler,
            shaping_timestep=500,
        )
        return step(torch.Generator().manual_seed(0)).item()

    assert loss_of(1.0) < 1e-6
    alphas = scheduler.alphas_cumprod[seen[1.0]].double()
    snr = alphas / (1 - alphas)
    expected = 0.25 * (snr + 1).clamp(max=5) if pixels else (5 / snr).clamp(max=1)
    assert loss_of(0.0) == pytest.approx(expected.mean().item(), rel=0.03)


class TestExport:
    @pytest.fixture(scope="class")
    @staticmethod
    def vae() -> AutoencoderKL:
        torch.manual_seed(0)
        return training.build_vae().eval()

    def test_text_to_image_folder_holds_the_models_in_half_precision(
        self, tokenizer: CLIPTokenizer, vae: AutoencoderKL, tmp_path: Path
    ) -> None:
        text_encoder, unet = _text_models(tokenizer)
        folder = tmp_path / "model"
        export.export_text_to_image(unet, text_encoder, vae, folder)
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        for loaded, given in ((pipe.unet, unet), (pipe.text_encoder, text_encoder), (pipe.vae, vae)):
            assert next(given.parameters()).dtype == torch.float32
            for name, value in loaded.state_dict().items():
                assert torch.equal(value, given.state_dict()[name].half().float()), name
        export.export_text_to_image(pipe.unet, pipe.text_encoder, pipe.vae, tmp_path / "again")
        for file in (path for path in folder.rglob("*") if path.is_file()):  # they know where they came from
            assert str(tmp_path).encode() not in file.read_bytes()
            assert (tmp_path / "again" / file.relative_to(folder)).read_bytes() == file.read_bytes()

    def test_text_encoder_is_named_as_in_all_versions_of_transformers(
        self, tokenizer: CLIPTokenizer, vae: AutoencoderKL, tmp_path: Path
    ) -> None:
        text_encoder, unet = _text_models(tokenizer)
        export.export_text_to_image(unet, text_encoder, vae, tmp_path)
        assert all(name.startswith("text_model.") for name in load_file(tmp_path / "text_encoder/model.safetensors"))
        assert {"vocab.json", "merges.txt"} <= {file.name for file in (tmp_path / "tokenizer").iterdir()}
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["safety_checker"] == index["feature_extractor"] == [None, None]
        assert index["requires_safety_checker"] is False

    def test_unconditional_folder_samples(self, tmp_path: Path) -> None:
        unet = _pixel_model()
        export.export_unconditional(unet, tmp_path)
        pipe = DDPMPipeline.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        for name, value in pipe.unet.state_dict().items():
            assert torch.equal(value, unet.state_dict()[name].half().float()), name
        assert pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 32, 32, 3)
