"""``fastdiff calibrate``: thresholds of uncertainty exits that meet a budget."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import add_device_options, choose_device, new_parser

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.eval.tasks import Task

PURPOSE = """\
Find the thresholds of uncertainty exits with which a pipeline costs a share of full sampling. Samples in full once and
looks at every exit, then tries thresholds with real exits until the share is right, and reports what samples of other
seeds cost. The folder gets the method with its modules (uncertainty_exit.json, uem), calibration.json, calibration.md
and plots; with --freeze also a static plan of the same cost, and how much worse it is."""

EXAMPLES = (
    "fastdiff calibrate zoo:glyphs-dit --weights trained --budget 0.6 --guidance-scale 1.5 --out calibrated",
    "fastdiff calibrate ./my-pipeline --weights trained --budget 0.8 --prompts prompts.txt --freeze",
    "fastdiff generate zoo:glyphs-dit --method saved:calibrated/uncertainty_exit.json --class-labels F A S T",
    "fastdiff generate zoo:glyphs-dit --method plan:calibrated/frozen_plan.json \\",
    "    --method uncertainty-exit:threshold=0,weights=calibrated/uem --class-labels F A S T",
)

RULES = ("exit-rate", "even")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(subparsers, "calibrate", PURPOSE, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="folder, repository or zoo:NAME")
    parser.add_argument("--weights", metavar="FOLDER", help="trained modules (default: those of the pipeline's folder)")
    parser.add_argument(
        "--budget",
        type=float,
        required=True,
        metavar="SHARE",
        help="of the denoiser's multiply-accumulates in full sampling, above 0 and at most 1",
    )
    parser.add_argument("--out", default="calibration", metavar="FOLDER", help="for the results (default: %(default)s)")
    parser.add_argument("--freeze", action="store_true", help="also make a static plan of the same cost")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="by which the calibration samples may miss the budget (default: %(default)s)",
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        default=RULES[0],
        help="exit-rate lets the same share of samples stop at every exit of every bin; even has one threshold "
        "everywhere (default: %(default)s)",
    )
    parser.add_argument(
        "--bins",
        type=int,
        default=10,
        metavar="N",
        help="of timesteps, each with its thresholds (default: %(default)s)",
    )
    images = parser.add_argument_group("the samples")
    images.add_argument(
        "--num-samples", type=int, default=48, metavar="N", help="to calibrate, and held out (default: %(default)s)"
    )
    images.add_argument("--batch-size", type=int, default=16, metavar="N", help="in one call (default: %(default)s)")
    images.add_argument("--num-inference-steps", type=int, default=50, metavar="N", help="(default: %(default)s)")
    images.add_argument("--seed", type=int, default=0, metavar="S", help="of the first sample (default: %(default)s)")
    images.add_argument("--prompts", metavar="FILE", help="one prompt in each line, for one sample after the other")
    images.add_argument(
        "--class-labels",
        type=int,
        nargs="+",
        metavar="N",
        help="for a pipeline that samples by class (default for a zoo model: all)",
    )
    images.add_argument("--guidance-scale", type=float, metavar="G", help="default: the pipeline's own")
    images.add_argument("--scheduler", metavar="CLASS", help="of diffusers, e.g. DPMSolverMultistepScheduler")
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Calibrate and write the folder."""
    from fastdiff.eval.evaluation import scheduler_class
    from fastdiff.methods.uncertainty_exit import UncertaintyExit
    from fastdiff.output import staged_folder
    from fastdiff.pipelines.calling import load
    from fastdiff.uem.calibration import calibrate
    from fastdiff.uem.calibration_report import TEXT, save

    method = UncertaintyExit(weights=options.weights)
    if options.weights is not None:
        method.modules()  # before anything else is loaded
    with staged_folder(options.out) as folder:
        pipe = load(options.model, choose_device(options.device), options.dtype, preset="off")
        if options.scheduler is not None:
            pipe.scheduler = scheduler_class(options.scheduler).from_config(pipe.scheduler.config)
        calibration = calibrate(
            pipe,
            method,
            options.budget,
            task=_task(pipe, options),
            num_samples=options.num_samples,
            batch_size=options.batch_size,
            num_inference_steps=options.num_inference_steps,
            bins=options.bins,
            rule=options.rule,
            tolerance=options.tolerance,
            frozen=options.freeze,
        )
        save(calibration, folder, shlex.join(options.command))
        text = (folder / TEXT).read_text(encoding="utf-8")
    print(text)
    print(f"Use it: --method saved:{Path(options.out) / 'uncertainty_exit.json'}")


def _task(pipe: DiffusionPipeline, options: argparse.Namespace) -> Task:
    """What is sampled; a shipped model that was asked for nothing samples all that it can."""
    from fastdiff.eval.glyphs import glyph_task
    from fastdiff.eval.tasks import make_task, read_prompts

    if options.model.startswith("zoo:") and not (options.prompts or options.class_labels):
        count = 2 * max(options.num_samples, 1)
        return glyph_task(pipe, count, seed=options.seed, guidance_scale=options.guidance_scale).task
    return make_task(
        pipe,
        prompts=read_prompts(options.prompts) if options.prompts else None,
        class_labels=options.class_labels,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
    )
