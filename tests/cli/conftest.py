from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from fastdiff.cli.main import main
from fastdiff.zoo.data import CHARACTERS
from fastdiff.zoo.reader import GlyphReader


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
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=32,
    ).eval()
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
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
