"""Writes trained models as plain diffusers folders with float16 weights; the models given stay as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from . import training_dit, training_unet
from .captions import load_tokenizer, write_tokenizer
from .data import CHARACTERS

_TEXT_PREFIX = "text_model."


def half_copy(model: ModelMixin) -> ModelMixin:
    """The model in float16, with a configuration that does not say which folder it was loaded from."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    half = type(model).from_config(config).half()
    half.load_state_dict(model.state_dict())
    return half


def _half_text_encoder(model: CLIPTextModel) -> CLIPTextModel:
    config = CLIPTextConfig(**{name: value for name, value in model.config.to_dict().items() if name[0] != "_"})
    half = CLIPTextModel(config).half()
    half.load_state_dict(model.state_dict())
    return half


def _save(pipe: DiffusionPipeline, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)


def export_dit(transformer: DiTTransformer2DModel, vae: AutoencoderKL, folder: Path) -> None:
    """Writes a `DiTPipeline`.

    Args:
        transformer: the denoiser.
        vae: the autoencoder.
        folder: replaced if it exists.
    """
    id2label = dict(enumerate(CHARACTERS))
    pipe = DiTPipeline(
        transformer=half_copy(transformer),
        vae=half_copy(vae),
        scheduler=training_dit.build_scheduler(),
        id2label=id2label,
    )
    pipe.register_to_config(id2label={str(index): character for index, character in id2label.items()})
    _save(pipe, folder)


def export_text_to_image(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL, folder: Path
) -> None:
    """Writes a `StableDiffusionPipeline` without a safety checker.

    Args:
        unet: the denoiser.
        text_encoder: reads the captions' tokens.
        vae: the autoencoder.
        folder: replaced if it exists.
    """
    write_tokenizer(folder / "tokenizer")
    pipe = StableDiffusionPipeline(
        vae=half_copy(vae),
        text_encoder=_half_text_encoder(text_encoder),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        unet=half_copy(unet),
        scheduler=training_unet.build_scheduler(pixels=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipe, folder)
    _keep_to_old_formats(folder)


def _keep_to_old_formats(folder: Path) -> None:
    """Lets every supported version of transformers load what the installed one has saved."""
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {_TEXT_PREFIX + name.removeprefix(_TEXT_PREFIX): value for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    config = weights.with_name("config.json")
    # transformers 5 takes its dtype from here, whereas diffusers loads the other models as float32.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def export_unconditional(unet: UNet2DModel, folder: Path) -> None:
    """Writes a `DDPMPipeline`.

    Args:
        unet: the denoiser.
        folder: replaced if it exists.
    """
    _save(DDPMPipeline(unet=half_copy(unet), scheduler=training_unet.build_scheduler(pixels=True)), folder)
