"""Trains, exports and checks the models of the zoo: ``python -m fastdiff.zoo.train --help``."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from fastdiff import zoo
from fastdiff.errors import FastDiffError
from fastdiff.methods import ExitSchedule
from fastdiff.methods.uncertainty_exit import WEIGHTS
from fastdiff.models import UViT, UViTPipeline, pipeline_class
from fastdiff.uem.modules import load_modules

from . import check, export, training, training_dit, training_unet, training_uvit
from .captions import load_tokenizer, write_tokenizer
from .data import BOLD_DIGITS, pool
from .reader import GlyphReader
from .training_loop import LoopConfig, fit

DESCRIPTION = """\
Makes the zoo's models from nothing: glyph images, the reader that judges them, the autoencoder and the denoisers. Run
the commands in this order; each says what it needs:

  data      render the training images once (a minute)
  vae       train the autoencoder                             needs data
  reader    train the reader                                  needs data
  dit       train the transformer on the VAE's latents        needs data, vae
  ase       fine-tune it to exit early                        needs dit
  uvit      train a U-ViT on the VAE's latents                needs data, vae
  uvit-ase  fine-tune it to exit early                        needs uvit
  sd        train UNet and text encoder on the VAE's latents  needs data, vae
  ddpm      train the unconditional UNet on pixels, digits    needs data
  export    write plain diffusers folders in float16          needs what it writes
  exits     add what `fastdiff train-uem` trained for them    needs a written transformer
  check     count how many samples the reader can read

Training writes a checkpoint every few hundred steps; the same command continues after an interruption and ends with
the weights that an uninterrupted run would have."""

Command = Callable[[argparse.Namespace], None]

ASE_SCHEDULE = ExitSchedule("ase-demo")


class MissingStageError(FastDiffError, FileNotFoundError):
    """A training stage that needs the result of another one."""


def _needed(folder: Path, stage: str) -> Path:
    if not folder.exists():
        raise MissingStageError(
            f"{folder} is missing. Run `python -m fastdiff.zoo.train {stage}` first, with the same --work."
        )
    return folder


def _images(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    return pool(args.work / "pool.safetensors", args.data_seed, args.images)


def _data(args: argparse.Namespace) -> None:
    images, _ = _images(args)
    print(f"{len(images)} images in {args.work / 'pool.safetensors'}")


def _vae(args: argparse.Namespace) -> None:
    images, _ = _images(args)
    torch.manual_seed(args.seed)
    vae = training.build_vae()
    config = LoopConfig(
        args.steps, seed=args.seed, learning_rate=2e-3, warmup_steps=100, checkpoint_every=200, ema_decay=0.995
    )
    fit(vae, training.vae_loss(vae, images, args.batch_size), config, args.work / "vae")
    training.normalize_latents(vae, images[:8000])
    vae = vae.half().float()  # as it ships, so that the denoiser trains on the latents that it will be decoded with
    vae.save_pretrained(args.work / "vae" / "model")


def _reader(args: argparse.Namespace) -> None:
    images, labels = _images(args)
    torch.manual_seed(args.seed)
    reader = GlyphReader()
    config = LoopConfig(
        args.steps, seed=args.seed, learning_rate=3e-3, warmup_steps=100, checkpoint_every=250, ema_decay=0.998
    )
    fit(reader, training.reader_loss(reader, images, labels, args.batch_size), config, args.work / "reader")
    reader.save_pretrained(args.work / "reader" / "model")


def _latents(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The training latents, encoded once, and all labels of their images."""
    images, labels = _images(args)
    path = args.work / "latents.safetensors"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(_needed(args.work / "vae" / "model", "vae")).eval()
        print("encoding the images ...")
        save_file({"latents": training.encode(vae, images)}, path)
    return load_file(path)["latents"], labels


def _dit(args: argparse.Namespace) -> None:
    latents, labels = _latents(args)
    torch.manual_seed(args.seed)
    transformer = training_dit.build_transformer()
    predict = training_dit.denoiser_predictor(transformer, None, args.compile)
    config = LoopConfig(args.steps, seed=args.seed, learning_rate=1e-3, warmup_steps=300, ema_decay=0.9995)
    loss = training_dit.denoiser_loss(predict, latents, labels[:, 0], args.batch_size)
    fit(transformer, loss, config, args.work / "dit")
    transformer.save_pretrained(args.work / "dit" / "model")


def _ase(args: argparse.Namespace) -> None:
    latents, labels = _latents(args)
    transformer = DiTTransformer2DModel.from_pretrained(_needed(args.work / "dit" / "model", "dit"))
    training_dit.disable_label_dropout(transformer)
    training_dit.freeze_timestep_embedders(transformer)
    predict = training_dit.denoiser_predictor(transformer, ASE_SCHEDULE, args.compile)
    loss = training_dit.denoiser_loss(predict, latents, labels[:, 0], args.batch_size)
    fit(transformer, loss, _fine_tuning(args), args.work / "ase")
    transformer.save_pretrained(args.work / "ase" / "model")


def _fine_tuning(args: argparse.Namespace) -> LoopConfig:
    return LoopConfig(
        args.steps, seed=args.seed, learning_rate=3e-4, warmup_steps=100, ema_decay=0.999, ema_warmup=False
    )


def _uvit(args: argparse.Namespace) -> None:
    latents, labels = _latents(args)
    torch.manual_seed(args.seed)
    transformer = training_uvit.build_transformer()
    predict = training_uvit.denoiser_predictor(transformer, args.compile)
    config = LoopConfig(args.steps, seed=args.seed, learning_rate=2e-3, warmup_steps=300, ema_decay=0.9995)
    loss = training_dit.denoiser_loss(predict, latents, labels[:, 0], args.batch_size, training_uvit.NULL_CLASS)
    fit(transformer, loss, config, args.work / "uvit")
    transformer.save_pretrained(args.work / "uvit" / "model")


def _uvit_ase(args: argparse.Namespace) -> None:
    latents, labels = _latents(args)
    transformer = UViT.from_pretrained(_needed(args.work / "uvit" / "model", "uvit"))
    training_dit.freeze_timestep_embedders(transformer)
    predict = training_uvit.exiting_predictor(transformer, ASE_SCHEDULE)
    loss = training_dit.denoiser_loss(predict, latents, labels[:, 0], args.batch_size, training_uvit.NULL_CLASS)
    fit(transformer, loss, _fine_tuning(args), args.work / "uvit-ase")
    transformer.save_pretrained(args.work / "uvit-ase" / "model")


def _sd(args: argparse.Namespace) -> None:
    latents, labels = _latents(args)
    write_tokenizer(args.work / "tokenizer")
    tokenizer = load_tokenizer(args.work / "tokenizer")
    torch.manual_seed(args.seed)
    text_encoder = training_unet.build_text_encoder(tokenizer)
    unet = training_unet.build_text_unet()
    loss = training_unet.text_loss(unet, text_encoder, tokenizer, latents, labels, args.batch_size)
    config = LoopConfig(args.steps, seed=args.seed, learning_rate=1e-3, warmup_steps=300, ema_decay=0.9995)
    fit(nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}), loss, config, args.work / "sd")
    text_encoder.save_pretrained(args.work / "sd" / "model" / "text_encoder")
    unet.save_pretrained(args.work / "sd" / "model" / "unet")


def _ddpm(args: argparse.Namespace) -> None:
    images, labels = _images(args)
    known = [BOLD_DIGITS.has(character, font) for character, font, *_ in labels.tolist()]
    images = images[torch.tensor(known)]
    torch.manual_seed(args.seed)
    unet = training_unet.build_pixel_unet()
    config = LoopConfig(args.steps, seed=args.seed, learning_rate=8e-4, warmup_steps=300, ema_decay=0.9995)
    fit(unet, training_unet.pixel_loss(unet, images, args.batch_size), config, args.work / "ddpm")
    unet.save_pretrained(args.work / "ddpm" / "model")


def _export_dit(args: argparse.Namespace, name: str, trained: Path) -> None:
    export.export_dit(DiTTransformer2DModel.from_pretrained(trained), _vae_for_export(args), args.out / name)


def _export_uvit(args: argparse.Namespace, name: str, trained: Path) -> None:
    training_uvit.export(UViT.from_pretrained(trained), _vae_for_export(args), args.out / name)


def _export_sd(args: argparse.Namespace, name: str, trained: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(trained / "unet")
    text_encoder = CLIPTextModel.from_pretrained(trained / "text_encoder")
    export.export_text_to_image(unet, text_encoder, _vae_for_export(args), args.out / name)


def _export_ddpm(args: argparse.Namespace, name: str, trained: Path) -> None:
    export.export_unconditional(UNet2DModel.from_pretrained(trained), args.out / name)


def _export_reader(args: argparse.Namespace, name: str, trained: Path) -> None:
    shutil.rmtree(args.out / name, ignore_errors=True)
    export.half_copy(GlyphReader.from_pretrained(trained)).save_pretrained(args.out / name)


def _vae_for_export(args: argparse.Namespace) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(_needed(args.work / "vae" / "model", "vae"))


_STAGES = {
    "glyphs-dit": ("dit", _export_dit),
    "glyphs-dit-ase": ("ase", _export_dit),
    "glyphs-sd": ("sd", _export_sd),
    "glyphs-ddpm": ("ddpm", _export_ddpm),
    "glyphs-cnn": ("reader", _export_reader),
    "glyphs-uvit": ("uvit", _export_uvit),
    "glyphs-uvit-ase": ("uvit-ase", _export_uvit),
}
"""The stage that trains a model, and how the model is written."""


def _export(args: argparse.Namespace) -> None:
    for name in args.model or _STAGES:
        stage, write = _STAGES[name]
        write(args, name, _needed(args.work / stage / "model", stage))
        _tell_size(args.out / name)


def _exits(args: argparse.Namespace) -> None:
    """Trained exits go into the folder of their model; a denoiser that learned with them, into one of its own."""
    modules, tuned, model = load_modules(args.trained), args.trained / "transformer", args.out / args.model
    if tuned.exists():
        pipe = pipeline_class(model).from_pretrained(model)
        write = training_uvit.export if isinstance(pipe, UViTPipeline) else export.export_dit
        model = model.with_name(f"{args.model}-uem")
        write(type(pipe.transformer).from_pretrained(tuned), pipe.vae, model)
    export.half_copy(modules).save_pretrained(model / WEIGHTS)
    _tell_size(model)


def _tell_size(folder: Path) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


def _check(args: argparse.Namespace) -> None:
    reader = GlyphReader.from_pretrained(zoo.path("glyphs-cnn")).eval()
    accuracy = check.reader_accuracy(reader, args.held_out)
    print(f"reader on {args.held_out} held-out renders: " + ", ".join(f"{k} {v:.2%}" for k, v in accuracy.items()))
    pipe = pipeline_class(zoo.path(args.model)).from_pretrained(zoo.path(args.model))
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "vae"):
        kept = check.reconstruction(pipe.vae, reader, args.held_out)
        print(f"autoencoder on the same renders: PSNR {kept['psnr']:.1f} dB, {kept['share_read']:.2%} still read")
    count, steps, guidance = 36 * args.per_class, args.num_inference_steps, args.guidance_scale
    images, asked = check.sample_as_asked(
        pipe, count, num_inference_steps=steps, guidance_scale=guidance, seed=args.seed
    )
    share = check.share_read(reader, images, asked)
    print(f"{args.model}, {steps} steps, guidance {guidance}: {share:.2%} of {count} samples read as asked")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff.zoo.train",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--work", type=Path, default=Path("runs/zoo"), help="folder of data and checkpoints")
    shared.add_argument("--seed", type=int, default=0, help="seed of initial weights, batches and noise")
    shared.add_argument("--threads", type=int, help="CPU threads; one is fastest where other programs run")
    shared.add_argument("--data-seed", type=int, default=1, help="stream of training images")
    shared.add_argument("--images", type=int, default=150_000, help="number of training images")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str, steps: int = 0, batch_size: int = 128) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, parents=[shared], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(run=run)
        if steps:
            command.add_argument("--steps", type=int, default=steps, help="optimiser steps")
            command.add_argument("--batch-size", type=int, default=batch_size, help="samples per step")
        return command

    add("data", _data, "render the training images")
    add("vae", _vae, "train the autoencoder", 3000, 64)
    add("reader", _reader, "train the reader of characters, fonts and colours", 2000)
    dit = add("dit", _dit, "train the denoiser", 16_000)
    ase = add("ase", _ase, "fine-tune the denoiser to exit early under the schedule ase-demo", 5000)
    uvit = add("uvit", _uvit, "train the denoiser with long skips", 16_000)
    add("uvit-ase", _uvit_ase, "fine-tune the denoiser with long skips under the schedule ase-demo", 3000)
    add("sd", _sd, "train the text-to-image UNet with its text encoder", 10_500, 64)
    add("ddpm", _ddpm, "train the unconditional UNet", 30_000, 32)
    for command in (dit, ase, uvit):
        command.add_argument("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    exported = add("export", _export, "write plain diffusers folders in float16")
    exits = add(
        "exits", _exits, "add what `fastdiff train-uem` trained to a model; or make a copy if the model learned too"
    )
    exits.add_argument("--trained", type=Path, required=True, help="what `fastdiff train-uem --out` was given")
    exits.add_argument(
        "--model", default="glyphs-dit", help="what it was trained for; its fine-tuned copy is MODEL-uem"
    )
    for command in (exported, exits):
        command.add_argument("--out", type=Path, default=zoo.path("glyphs-dit").parent, help="folder for the models")
    exported.add_argument("--model", nargs="*", choices=_STAGES, help="models to write, instead of all")
    checked = add("check", _check, "count how many samples the reader can read")
    checked.add_argument("--model", default="glyphs-dit", help="a pipeline of the zoo")
    checked.add_argument("--per-class", type=int, default=20, help="samples of each of the 36 characters")
    checked.add_argument("--num-inference-steps", type=int, default=50, help="solver steps")
    checked.add_argument("--guidance-scale", type=float, default=4.0, help="classifier-free guidance")
    checked.add_argument(
        "--held-out", type=int, default=3600, help="held-out renders for the reader and the autoencoder"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs one command of the zoo's training."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.run(args)
    except FastDiffError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
