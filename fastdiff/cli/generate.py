"""``fastdiff generate``: sample any pipeline and keep a record of what ran."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import (
    add_device_options,
    add_method_options,
    add_speed_options,
    call,
    load_pipeline,
    new_parser,
    parse_arguments,
)
from fastdiff.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.engine.record import RunRecord

PURPOSE = """\
Sample images or videos with any diffusers pipeline. MODEL is a folder, a Hugging Face repository or zoo:NAME. Without
--method or --preset the pipeline does what its own fastdiff_config.json says, else the preset "balanced". Image i is
made from seed + i, whatever the batch size. The folder gets the images, the executed plan and record.json, which says
what ran, what it saved, and how to run it again."""

EXAMPLES = (
    "fastdiff generate zoo:glyphs-dit --class-labels F A S T --out fast",
    "fastdiff generate zoo:glyphs-dit --class-labels 7 --samples 16 --preset off --out plain",
    "fastdiff generate zoo:glyphs-dit-ase --class-labels Q --method exit-schedule:preset=ase-demo --out ase",
    "fastdiff generate ./my-pipeline --prompt 'a fox' --method feature-inheritance:interval=3,order=1 \\",
    "    --num-inference-steps 30 --guidance-scale 5 --arg height=768 --arg width=768 --out foxes",
    "fastdiff generate ./my-pipeline --prompt 'a fox' --method plan:foxes/plan-transformer.json --out again",
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(subparsers, "generate", PURPOSE, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="folder, repository or zoo:NAME")
    parser.add_argument("--out", default="out", help="folder for the results (default: out)")
    add_method_options(parser)
    conditions = parser.add_argument_group("what to sample")
    conditions.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    conditions.add_argument("--prompt-file", metavar="FILE", help="prompts, one to a line, in place of --prompt")
    conditions.add_argument("--negative-prompt", metavar="TEXT")
    conditions.add_argument("--class-labels", nargs="+", metavar="LABEL", help="numbers, or names the pipeline knows")
    conditions.add_argument("--samples", type=int, metavar="N", help="images in all; prompts or labels take turns")
    conditions.add_argument("--batch", type=int, default=8, metavar="N", help="images in one call (default: 8)")
    conditions.add_argument("--seed", type=int, default=0, help="of the first image (default: 0)")
    conditions.add_argument("--num-inference-steps", type=int, metavar="N", help="default: the pipeline's own")
    conditions.add_argument("--guidance-scale", type=float, metavar="G", help="default: the pipeline's own")
    conditions.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="any other argument of the pipeline's call"
    )
    add_device_options(parser)
    add_speed_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Sample and write the folder."""
    from fastdiff.output import staged_folder

    with staged_folder(options.out) as folder:
        pipe = load_pipeline(options, options.model, kernels=options.kernels, cuda_graphs=options.cuda_graphs)
        conditions = _conditions(pipe, options)
        shared = _shared_arguments(pipe, options)
        files: list[str] = []
        batches: list[Batch] = []
        for start in range(0, len(conditions), options.batch):
            seeds = range(options.seed + start, options.seed + min(start + options.batch, len(conditions)))
            batches.append(_sample(pipe, conditions[start : start + options.batch], seeds, shared))
            files += _write_output(batches[-1].output, folder, start)
        _write_record(options, pipe, batches, files, folder)
    for batch in batches[-1:]:
        print(batch.record.summary() if batch.record else f"no method: {batch.seconds:.2f} s")
    print(f"{len(files)} file(s) and record.json in {options.out}")


@dataclass(frozen=True)
class Batch:
    """One call of the pipeline: its seeds, its output, how long it took, and what ran (None if nothing is enabled)."""

    seeds: list[int]
    output: Any
    seconds: float
    record: RunRecord | None


# -- arguments ---------------------------------------------------------------------------------------------------------


def _conditions(pipe: DiffusionPipeline, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each image is to show, as arguments of the call."""
    from fastdiff.pipelines.calling import call_parameters

    parameters = call_parameters(pipe)
    if options.batch < 1 or (options.samples is not None and options.samples < 1):
        raise ConfigError(f"--batch and --samples are at least 1; got {options.batch} and {options.samples}.")
    prompts = _read_prompts(options.prompt_file) if options.prompt_file else options.prompt
    for name, given in (("class_labels", options.class_labels), ("prompt", prompts)):
        if given and name not in parameters:
            raise ConfigError(f"{type(pipe).__name__} takes no {name}; it takes {', '.join(parameters)}.")
    if len(list(filter(None, (options.class_labels, options.prompt, options.prompt_file)))) > 1:
        raise ConfigError("Give one of --class-labels, --prompt and --prompt-file.")
    if "class_labels" in parameters and not options.class_labels:
        raise ConfigError(f"{type(pipe).__name__} needs --class-labels: which classes to sample.")
    choices: list[dict[str, Any]] = [{}]
    if options.class_labels:
        choices = [{"class_labels": _label(pipe, text)} for text in options.class_labels]
    elif prompts:
        negative = {} if options.negative_prompt is None else {"negative_prompt": options.negative_prompt}
        choices = [{"prompt": text, **negative} for text in prompts]
    count = options.samples or len(choices)
    return [choices[index % len(choices)] for index in range(count)]


def _read_prompts(name: str) -> list[str]:
    try:
        prompts = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompt-file names a text file with one prompt to a line; {name!r} is none: {error}"
        ) from error
    if not prompts:
        raise ConfigError(f"--prompt-file {name!r} holds no prompt.")
    return prompts


def _label(pipe: DiffusionPipeline, text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    labels: dict[str, int] = getattr(pipe, "labels", None) or {}
    if text not in labels:
        known = ", ".join(list(labels)[:40]) or "none"
        raise ConfigError(f"The pipeline knows no label {text!r}; give a number, or one of its names: {known}.")
    return labels[text]


def _shared_arguments(pipe: DiffusionPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that all calls have in common."""
    arguments = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
    }
    given = {name: value for name, value in arguments.items() if value is not None} | parse_arguments(options.arg)
    from fastdiff.pipelines.calling import call_parameters

    parameters = call_parameters(pipe)
    if unknown := [name for name in given if name not in parameters]:
        raise ConfigError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(parameters)}.")
    return given


def _sample(pipe: DiffusionPipeline, conditions: list[dict[str, Any]], seeds: range, shared: dict[str, Any]) -> Batch:
    import torch

    from fastdiff.pipelines.calling import call_parameters

    parameters = call_parameters(pipe)
    arguments = {name: [condition[name] for condition in conditions] for name in conditions[0]} | shared
    if not conditions[0] and "batch_size" in parameters:
        arguments["batch_size"] = len(conditions)
    if "generator" in parameters:
        # On the CPU, so that a seed gives the same noise on every device.
        arguments["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    start = time.perf_counter()
    output = call(pipe, arguments)
    seconds = time.perf_counter() - start
    return Batch(list(seeds), output, seconds, pipe.fastdiff.last_run)


# -- files -------------------------------------------------------------------------------------------------------------


def _write_output(output: Any, folder: Path, start: int) -> list[str]:
    """Save what a call returned: images as PNG, frames as GIF, anything else as arrays; returns the file names."""
    import numpy as np

    if hasattr(output, "images"):
        for index, image in enumerate(output.images, start):
            image.save(folder / f"{index:05d}.png")
        return [f"{start + index:05d}.png" for index in range(len(output.images))]
    if hasattr(output, "frames"):
        from diffusers.utils import export_to_gif

        frames = [_as_pictures(video) for video in output.frames]
        for index, pictures in enumerate(frames, start):
            export_to_gif(pictures, str(folder / f"{index:05d}.gif"))
        return [f"{start + index:05d}.gif" for index in range(len(frames))]
    names = []
    for name, value in dict(output).items():
        np.save(folder / f"{start:05d}-{name}.npy", np.asarray(value), allow_pickle=False)
        names.append(f"{start:05d}-{name}.npy")
    return names


def _as_pictures(video: Any) -> list[Any]:
    """A video's frames as PIL images; diffusers returns them so, or as floats in [0, 1]."""
    import numpy as np
    from PIL import Image

    if isinstance(video[0], Image.Image):
        return list(video)
    return [Image.fromarray(np.rint(np.asarray(frame) * 255).astype(np.uint8)) for frame in video]


def _write_record(
    options: argparse.Namespace, pipe: DiffusionPipeline, batches: list[Batch], files: list[str], folder: Path
) -> None:
    from fastdiff.eval import describe_environment
    from fastdiff.plan import write_json

    record = {
        "schema_version": 1,
        "model": options.model,
        "pipeline": type(pipe).__name__,
        "methods": [method.to_dict() for method in pipe.fastdiff.methods],
        "arguments": {
            name: getattr(options, name)
            for name in (
                "prompt",
                "prompt_file",
                "negative_prompt",
                "class_labels",
                "num_inference_steps",
                "guidance_scale",
                "arg",
            )
        },
        "dtype": options.dtype,
        "kernels": options.kernels,
        "cuda_graphs": options.cuda_graphs,
        "environment": describe_environment(pipe.device),
        "files": files,
        "calls": [
            {"seeds": batch.seeds, "seconds": batch.seconds, "denoisers": describe_run(batch.record)}
            for batch in batches
        ],
    }
    first = batches[0].record
    for name, denoiser in first.denoisers.items() if first else ():
        if denoiser.calls:
            denoiser.plan.save(folder / f"plan-{name}.json")
    write_json(folder / "record.json", json.loads(json.dumps(record)))


def describe_run(record: RunRecord | None) -> dict[str, Any]:
    """What ran in one call, by denoiser, JSON-compatible."""
    return {
        name: {
            "class": denoiser.class_name,
            "calls": len(denoiser.calls),
            "cells": denoiser.cells(),
            "computed_share": denoiser.computed_share,
            "macs_share": denoiser.macs_share,
            "peak_bytes": denoiser.peak_bytes,
            "fallbacks": dict(denoiser.fallbacks),
            "graphs": {
                "recorded": denoiser.graphs,
                "replayed": denoiser.replays,
                "computed": dict(denoiser.computed),
            },
        }
        for name, denoiser in (record.denoisers.items() if record else ())
    }
