"""``fastdiff train-uem``: train uncertainty modules, exit heads, or a denoiser that exits early."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import new_parser, parse_arguments

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.uem.config import TrainConfig

MODEL = "zoo:glyphs-dit"

PURPOSE = """\
Train what `uncertainty-exit` decides by: for each exit of a transformer or UNet a small module that tells how far
the prediction would be off there, and a small head that brings it closer. The model itself stays as it is unless
--train-backbone is given. No data set is needed: by default it learns from the calls that the pipeline makes of its
denoiser. With the defaults, zoo:glyphs-dit takes three minutes on one CPU core. The same command goes on where an
interrupted one stopped; `accelerate launch -m fastdiff.uem.train ...` shares the work between processes. The folder
gets the weights, validation.json and .png, log.jsonl, the checkpoint, and TensorBoard's files where that is there."""

EXAMPLES = (
    "fastdiff train-uem --out uem",
    "fastdiff train-uem --model ./my-pipeline --prompts prompts.txt --mixed-precision bf16 --out uem",
    "fastdiff train-uem --model ./my-pipeline --data ./images --target truth --out uem",
    "fastdiff train-uem --data zoo --objective ase --train-backbone --steps 500 --out ase",
    "fastdiff train-uem --objective heads --distillation 0.1 --out heads",
)

_Option = tuple[str, Any, str]

DATA: dict[str, _Option] = {
    "--samples": ("N", int, "images to sample, or at most to use (default: 288 sampled, 2880 glyphs, or all)"),
    "--record-batch": ("N", int, "images in one call of the pipeline (default: 24)"),
    "--evaluations": ("N", int, "evaluations kept of each image sampled (default: 16)"),
    "--num-inference-steps": ("N", int, "of the pipeline's calls (default: 50)"),
    "--guidance-scale": ("G", float, "of the pipeline's calls (default: the pipeline's own)"),
    "--unconditional": ("X", float, "share of rows of the unconditional branch (default: half, as guidance has it)"),
}
LEARNED: dict[str, _Option] = {
    "--rank": ("N", int, "channels of each head's correction (default: 32)"),
    "--uncertainty-weight": ("X", float, "of the uncertainty loss (default: 1)"),
    "--layerwise-weight": ("X", float, "of the exits' own errors (default: 1)"),
    "--largest-threshold": ("U", float, "that is to be used after --ual stopping (default: 0.25)"),
    "--snr-gamma": ("G", float, "cap of min-SNR weights of the noise levels, with --data; 5 is usual (default: none)"),
    "--distillation": ("X", float, "weight of the exits' distance from the last hidden state (default: 0)"),
    "--distillation-stop": ("STEP", int, "no such loss from this step on (default: never)"),
    "--schedule": ("SPEC", str, "exit schedule of --objective ase (default: exit-schedule:preset=ase-demo)"),
}
OPTIMISER: dict[str, _Option] = {
    "--steps": ("N", int, "of the optimiser (default: 700)"),
    "--batch-size": ("N", int, "rows of a step, of all processes together (default: 64)"),
    "--learning-rate": ("X", float, "of modules and heads (default: 0.002)"),
    "--backbone-learning-rate": ("X", float, "of the denoiser (default: 1e-05)"),
    "--warmup-steps": ("N", int, "of linear warm-up (default: 50)"),
    "--weight-decay": ("X", float, "of AdamW, on matrices (default: 0)"),
    "--gradient-clip": ("X", float, "largest gradient norm; 0 for no limit (default: 1)"),
    "--ema-decay": ("X", float, "of the averaged weights, which are saved; 0 for no average (default: 0.99)"),
    "--gradient-accumulation": ("N", int, "parts that a step's rows are worked through in (default: 1)"),
    "--seed": ("S", int, "of all randomness (default: 0)"),
}
RUNNING: dict[str, _Option] = {
    "--checkpoint-every": ("N", int, "steps between checkpoints (default: 100)"),
    "--validate-every": ("N", int, "steps between validations (default: 350)"),
    "--validation-rows": ("N", int, "held-out rows in each (default: 768)"),
}
CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "--objective": (
        ("deediff", "ase", "heads"),
        "modules and heads; the denoiser under an exit schedule; or heads alone (default: deediff)",
    ),
    "--target": (
        ("full", "truth"),
        "what exits are held against: the model's own prediction, or what images and noise say (default: full)",
    ),
    "--heads": (
        ("shared", "per_exit_norm", "per_exit"),
        "who reads an exit: the model's own output layers, after a norm or a correction of its own (default: per_exit)",
    ),
    "--ual": (("detached", "paper", "official", "stopping"), "weights of the exits' own errors (default: detached)"),
    "--mixed-precision": (("no", "bf16", "fp16"), "of the computation (default: no)"),
}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(subparsers, "train-uem", PURPOSE, EXAMPLES)
    parser.argument_default = argparse.SUPPRESS  # the defaults are those of TrainConfig
    parser.add_argument(
        "--model", default=MODEL, help="pipeline: a folder, repository or zoo:NAME (default: %(default)s)"
    )
    parser.add_argument("--out", default="uem", metavar="FOLDER", help="for the results (default: %(default)s)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="DATA",
        help="self, zoo, a folder of images or datasets:NAME[:SPLIT[:COLUMN]]. A folder may have metadata.jsonl with "
        "file_name and label or text (default: self)",
    )
    data.add_argument("--prompts", metavar="FILE", help="one prompt in each line, for one image after the other")
    data.add_argument("--class-labels", type=int, nargs="+", metavar="N", help="(default: all classes)")
    data.add_argument("--cache", metavar="FOLDER", help="for the prepared data (default: data in --out)")
    data.add_argument(
        "--arg",
        dest="arguments",
        action="append",
        metavar="NAME=VALUE",
        help="any other argument of the pipeline's call",
    )
    _add(data, DATA)
    learned = parser.add_argument_group("what is learned")
    for flag in ("--objective", "--target", "--heads", "--ual"):
        learned.add_argument(flag, choices=CHOICES[flag][0], help=CHOICES[flag][1])
    learned.add_argument("--train-backbone", action="store_true", help="fine-tune the denoiser too")
    learned.add_argument(
        "--no-timestep", dest="timestep_aware", action="store_false", help="modules do not know the timestep"
    )
    _add(learned, LEARNED)
    _add(parser.add_argument_group("optimiser"), OPTIMISER)
    running = parser.add_argument_group("running")
    running.add_argument(
        "--mixed-precision", choices=CHOICES["--mixed-precision"][0], help=CHOICES["--mixed-precision"][1]
    )
    running.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep none")
    running.add_argument("--device", help="cpu or cuda (default: what accelerate chooses)")
    _add(running, RUNNING)
    parser.set_defaults(run=run, interrupted="the last checkpoint is kept: the same command goes on")


def _add(group: Any, options: dict[str, _Option]) -> None:
    for flag, (metavar, kind, what) in options.items():
        group.add_argument(flag, metavar=metavar, type=kind, help=what)


def run(options: argparse.Namespace) -> None:
    """Train, and say how to use the result."""
    from accelerate import PartialState  # type: ignore[import-untyped]
    from diffusers.utils.logging import disable_progress_bar

    import fastdiff
    from fastdiff.pipelines.calling import load
    from fastdiff.uem.config import TrainConfig
    from fastdiff.uem.train import train

    given = vars(options)
    config = TrainConfig(**{field.name: given[field.name] for field in fields(TrainConfig) if field.name in given})
    disable_progress_bar()
    pipe = fastdiff.disable(load(options.model, "cpu", "float32", preset="off"))
    result = train(
        pipe,
        config,
        options.out,
        requests=_requests(given, pipe, config),
        arguments=parse_arguments(given.get("arguments", [])),
        cache=given.get("cache"),
    )
    if PartialState().is_main_process:
        for line in report(pipe, config, options, result):
            print(line)
    PartialState().destroy_process_group()


def _requests(given: dict[str, Any], pipe: DiffusionPipeline, config: TrainConfig) -> dict[str, Any] | None:
    """What the pipeline is asked for; a shipped model that reads prompts, for all that it can be."""
    from fastdiff.eval.tasks import read_prompts
    from fastdiff.uem.recording import call_parameters

    if "prompts" in given:
        return {"prompt": read_prompts(given["prompts"])}
    if given["model"].startswith("zoo:") and config.data == "self" and "prompt" in call_parameters(pipe):
        from fastdiff.uem.sources import SELF_SAMPLES
        from fastdiff.zoo.captions import caption_sequence

        return {"prompt": list(caption_sequence(config.samples or SELF_SAMPLES, config.seed)[0])}
    return {"class_labels": given["class_labels"]} if "class_labels" in given else None


def report(
    pipe: DiffusionPipeline, config: TrainConfig, options: argparse.Namespace, result: dict[str, Any]
) -> list[str]:
    """Lines that tell what came out, and how to use it."""
    from fastdiff.spec import parse_method

    rmse = result["rmse"]
    exits = "as scheduled" if config.objective == "ase" else f"at the first exit to {rmse[-1]:.4f} at the last"
    lines = [f"RMSE on held-out rows: {rmse[0]:.4f} {exits}"]
    if "rank_correlation" in result:
        found = {name: "unknown" if x is None else f"{x:.2f}" for name, x in result["rank_correlation"].items()}
        lines.append(
            f"Rank correlation of expected and true error: {found['layers']} across exits, {found['samples']} across "
            "samples at one timestep"
        )
    lines.append(f"Look at {Path(options.out) / 'validation.png'}")
    methods = {
        "deediff": f"fastdiff.UncertaintyExit(weights={options.out!r})",
        "heads": f'fastdiff.ExitSchedule("ase-demo", heads={options.out!r})',
        "ase": f"fastdiff.{parse_method(config.schedule)}",
    }
    lines.append("Use it:")
    lines.append(f"  pipe = fastdiff.FastDiffPipeline.from_pretrained({options.model!r}, preset='off')")
    if config.train_backbone:
        from fastdiff.uem.recording import denoiser_of

        name, denoiser = denoiser_of(pipe)
        module = "fastdiff.models" if type(denoiser).__module__.startswith("fastdiff") else "diffusers"
        folder = str(Path(options.out) / name)
        lines.append(f"  pipe.{name} = {module}.{type(denoiser).__name__}.from_pretrained({folder!r})")
    lines.append(f"  fastdiff.enable(pipe, {methods[config.objective]})")
    return lines
