"""``fastdiff demo``: an evaluation of a shipped model with everything chosen."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from fastdiff.cli.options import add_device_options, choose_device, new_parser

MODEL, TUNED, READER = "zoo:glyphs-dit", "zoo:glyphs-dit-ase", "zoo:glyphs-cnn"

PRESETS = "preset:{quality,balanced,fast}"
TRANSFORMER_WAYS = (
    PRESETS,
    "feature-inheritance:interval=3",
    "layer-skipping",
    "exit-schedule:preset=ase-demo",
)
UNET_WAYS = (
    PRESETS,
    "feature-inheritance:interval=3,branch=0",
    "encoder-propagation:parallel={false,true}",
    "encoder-propagation:keys=3",
)
TUNED_WAY = "tuned@exit-schedule:preset=ase-demo"

PURPOSE = """\
Sample a shipped model in full and with every method, from the same seeds, and measure what each gains and costs. Needs
no download and no accelerator; it takes three to four minutes on two CPU cores. Simply taking fewer steps is measured
too, so that you see whether a method beats it, and rows that lose stay in. The folder gets report.html, pictures, the
plans that ran, and the numbers as JSON, CSV and Markdown. `fastdiff eval` does the same for any model, with everything
of your choice, and adds other packages."""

EXAMPLES = (
    "fastdiff demo",
    "fastdiff demo --model zoo:glyphs-sd --out demo-sd",
    "fastdiff demo --num-samples 720 --batch-size 36 --out thorough",
    "fastdiff demo --device cuda --num-samples 3600 --batch-size 180",
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(subparsers, "demo", PURPOSE, EXAMPLES)
    parser.add_argument("--out", default="demo", metavar="FOLDER", help="for the results (default: %(default)s)")
    parser.add_argument("--model", default=MODEL, help="pipeline that samples glyphs (default: %(default)s)")
    numbers: dict[str, tuple[str, type, float, str]] = {
        "--num-samples": ("N", int, 72, "images of each row"),
        "--batch-size": ("N", int, 12, "images in one call"),
        "--num-inference-steps": ("N", int, 50, "steps of full sampling"),
        "--guidance-scale": ("G", float, 4.0, "where the model is guided"),
        "--seed": ("S", int, 0, "of the first image"),
    }
    for flag, (metavar, kind, default, what) in numbers.items():
        parser.add_argument(flag, metavar=metavar, type=kind, default=default, help=f"{what} (default: %(default)s)")
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure and write the report."""
    from diffusers.utils.logging import disable_progress_bar

    from fastdiff.cli.evaluate import show
    from fastdiff.eval.evaluation import SWEEPS, Evaluation
    from fastdiff.output import staged_folder

    tuned = options.model == MODEL
    names = ("model", "num_samples", "batch_size", "num_inference_steps", "guidance_scale", "dtype")
    disable_progress_bar()  # diffusers' own, for every model it loads
    with staged_folder(options.out) as folder:
        evaluation = Evaluation(
            **{name: getattr(options, name) for name in names},
            methods=(*(UNET_WAYS if _has_unet(options.model) else TRANSFORMER_WAYS), *([TUNED_WAY] if tuned else [])),
            copies={"tuned": TUNED} if tuned else {},
            seeds=(options.seed,),
            rounds=5,
            timing_batch=max(1, options.batch_size // 2),
            reader=READER,
            renders=2000,
            device=choose_device(options.device),
            out=str(folder),
        )
        results = evaluation.run(options.command)
        # A demo measures what is there today: nothing is kept that a later one could go on from.
        shutil.rmtree(folder / SWEEPS)
    if results is not None:
        show(results, options.out)


def _has_unet(model: str) -> bool:
    """Whether a pipeline's denoiser is a UNet, as its index says."""
    from diffusers import DiffusionPipeline

    from fastdiff import zoo

    try:
        index = DiffusionPipeline.load_config(zoo.path(model) if model.startswith("zoo:") else model)
    except OSError:
        return False  # loading it will say what is wrong
    return "unet" in index
