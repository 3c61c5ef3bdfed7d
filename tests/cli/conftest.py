from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from fastdiff.cli.main import main
from fastdiff.zoo import export, training_unet
from fastdiff.zoo.captions import load_tokenizer, write_tokenizer
from fastdiff.zoo.data import CHARACTERS
from fastdiff.zoo.reader import GlyphReader


def tiny_vae() -> AutoencoderKL:
    """A random decoder from 8x8 latents to 32x32 images."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=32,
    ).eval()


def save_tiny_dit(folder: Path, seed: int) -> Path:
    """A random pipeline that samples 32x32 images by class label, as plain diffusers saves it."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    pipe = DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False))
    pipe.register_to_config(id2label={str(index): character for index, character in enumerate(CHARACTERS)})
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_dit(tmp_path_factory.mktemp("models") / "dit", seed=0)


@pytest.fixture(scope="session")
def tiny_finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_dit(tmp_path_factory.mktemp("models") / "finetuned", seed=1)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline that samples 32x32 images by prompt."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    write_tokenizer(folder / "tokenizer")
    text_encoder = training_unet.build_text_encoder(load_tokenizer(folder / "tokenizer"), hidden_size=16, layers=1)
    unet = training_unet.build_text_unet((8, 8, 8), cross_attention_dim=16)
    export.export_text_to_image(unet, text_encoder, tiny_vae(), folder / "sd")
    return folder / "sd"


@pytest.fixture(scope="session")
def tiny_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline that samples 32x32 images of nothing in particular."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "ddpm"
    export.export_unconditional(training_unet.build_pixel_unet((8, 16, 32)), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "reader"
    GlyphReader(channels=(8, 8, 8), feature_dim=8).save_pretrained(folder)
    return folder


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command and returns exit status, output and error output."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run
