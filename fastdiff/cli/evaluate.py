"""``fastdiff eval``: any pipeline sampled in many ways, timed, judged and compared; and two evaluations compared."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import DTYPES, FAILURE, choose_device, new_parser, parse_arguments
from fastdiff.errors import ConfigError

if TYPE_CHECKING:
    from fastdiff.eval.evaluation import Evaluation
    from fastdiff.eval.results import Results

PURPOSE = """\
Compare ways of sampling with one pipeline: how much faster each is, how much worse, and whether another package or just
fewer steps would have done better. Every way samples the same seeds; times are taken in turns. Everything that is
finished is on disk: the same command goes on where a killed one stopped, and `accelerate launch -m fastdiff.eval ...`
shares the work between processes. The folder gets report.html, results.json, .csv and .md, summary.md
with what decides, and plots."""

EXAMPLES = (
    "fastdiff eval zoo:glyphs-dit --method preset:balanced --baseline deepcache --num-samples 100 --out report",
    "fastdiff eval zoo:glyphs-sd --method 'feature-inheritance:interval={2,3,5}' --baseline peers",
    "fastdiff eval zoo:glyphs-dit --method exit-schedule:d-min=4..12,full=14 --baseline steps:10",
    "fastdiff eval my/model --prompts prompts.txt --reference coco-images --features clean-inception --clip",
    "fastdiff eval --config sweep.yaml --num-samples 5000 --seeds 0 10000 20000",
)


PAIRS = ("copies", "arguments", "feature_weights")
"""What is given as NAME=VALUE; a file may have a mapping there."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(subparsers, "eval", PURPOSE, EXAMPLES)
    add_options(parser)
    parser.set_defaults(
        run=lambda options: run(options, parser),
        interrupted="what is finished is kept: the same command goes on",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options. They have no defaults: those of `Evaluation` hold where neither command line nor file says."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("model", nargs="?", help="pipeline: a folder, a hub name or zoo:NAME")
    parser.add_argument(
        "--config", metavar="YAML", help="read options from a file, by their long names; the command line goes first"
    )
    parser.add_argument("--out", metavar="FOLDER", help="for the results (default: evaluation)")
    ways = parser.add_argument_group("what is compared")
    ways.add_argument(
        "--method",
        dest="methods",
        action="append",
        metavar="SPEC",
        help="a way of fastdiff's: NAME:field=value,..., several joined by +, preset:NAME, plan:FILE, kernels alone or "
        "with these. Ranges such as d-min=4..12 and lists such as interval={2,3,5} make several ways; COPY@SPEC "
        "samples with a copy",
    )
    ways.add_argument(
        "--baseline",
        dest="baselines",
        action="append",
        metavar="SPEC",
        help="what it is compared with: steps:N, peers for all other packages, a package's name for the settings of it "
        "that are worth a comparison, or NAME:field=value,...; about a half, a third and a quarter of the steps, and "
        "as many steps as take the same time, are always compared",
    )
    ways.add_argument(
        "--copy",
        dest="copies",
        action="append",
        metavar="NAME=MODEL",
        help="other weights of the pipeline, for NAME@SPEC",
    )
    images = parser.add_argument_group("the images")
    images.add_argument("--num-inference-steps", type=int, metavar="N", help="of full sampling (default: 50)")
    images.add_argument(
        "--num-samples", type=int, metavar="N", help="images of each way and set of seeds (default: 500)"
    )
    images.add_argument(
        "--seeds", type=int, nargs="+", metavar="S", help="first seed of each set of seeds (default: 0)"
    )
    images.add_argument("--batch-size", type=int, metavar="N", help="images in one call (default: 16)")
    images.add_argument("--prompts", metavar="FILE", help="one prompt in each line, for one image after the other")
    images.add_argument("--class-labels", type=int, nargs="+", metavar="N", help="for a pipeline that samples by class")
    images.add_argument("--guidance-scale", type=float, metavar="G", help="(default: the pipeline's own)")
    images.add_argument("--scheduler", metavar="CLASS", help="of diffusers, e.g. DPMSolverMultistepScheduler")
    images.add_argument(
        "--arg",
        dest="arguments",
        action="append",
        metavar="NAME=VALUE",
        help="any other argument of the pipeline's call",
    )
    judging = parser.add_argument_group("how they are judged")
    judging.add_argument(
        "--reference",
        metavar="SET",
        help="an image folder, .npz statistics, datasets:NAME[:SPLIT[:COLUMN]] or zoo:glyphs; a zoo model has its own",
    )
    judging.add_argument("--renders", type=int, metavar="N", help="images of a zoo reference (default: 5000)")
    judging.add_argument(
        "--features",
        metavar="NET",
        help="inception[:64|192|768|2048], clean-inception, zoo, or module:attr, which is imported (default: "
        "inception; zoo for a zoo model)",
    )
    judging.add_argument(
        "--feature-weights",
        action="append",
        metavar="[NAME=]PATH",
        help="weights instead of a download, for features, lpips=PATH or clip=PATH",
    )
    judging.add_argument("--lpips", action="store_true", help="add LPIPS to full sampling")
    judging.add_argument("--clip", action="store_true", help="add the CLIP score of prompts")
    judging.add_argument(
        "--reader", metavar="MODEL", help="reads glyphs (default: zoo:glyphs-cnn for a zoo model; none to leave it out)"
    )
    running = parser.add_argument_group("timing and running")
    running.add_argument("--rounds", type=int, metavar="N", help="timed turns; 0 for none (default: 7)")
    running.add_argument(
        "--timing-batch", type=int, metavar="N", help="images timed at a time (default: as many as saturate the device)"
    )
    running.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    running.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32)")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Evaluate and print the table; returns the exit status."""
    from diffusers.utils.logging import disable_progress_bar

    from fastdiff.eval.processes import OtherProcessError

    evaluation = build(options, parser)
    disable_progress_bar()  # diffusers' own, for every model it loads
    try:
        results = evaluation.run(options.command)
    except OtherProcessError:
        return FAILURE  # which that process explains
    if results is not None:
        show(results, evaluation.out)
    return 0


def show(results: Results, out: str) -> None:
    """Print the table, what it amounts to, and where there is more."""
    from fastdiff.eval.report.headline import headline
    from fastdiff.eval.report.tables import as_markdown

    print(as_markdown(results, brief=True))
    print(headline(results))
    print(f"Open {Path(out) / 'report.html'}")


def build(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Evaluation:
    """The evaluation that options and their file ask for.

    Raises:
        ConfigError: for what cannot be read.
    """
    from fastdiff.eval.evaluation import Evaluation, default_reader

    given = vars(options)
    if "config" in given:
        given = read_config(parser, given["config"]) | given
    if "model" not in given:
        raise ConfigError("Name the pipeline to evaluate: fastdiff eval MODEL ..., or model: in the file of --config.")
    reader = given.get("reader", default_reader(given["model"]))
    given |= {
        "copies": _pairs("--copy", given.get("copies", [])),
        "arguments": parse_arguments(given.get("arguments", [])),
        "feature_weights": _weights(given.get("feature_weights", [])),
        "device": choose_device(given.get("device")),
        "reader": None if reader == "none" else reader,
        "trusted": "features" in vars(options),  # a file is not to choose what is imported
    }
    names = {field.name for field in fields(Evaluation)}
    return Evaluation(**{name: value for name, value in given.items() if name in names})


def _pairs(flag: str, given: list[str]) -> dict[str, str]:
    pairs = {name: value for name, _, value in (item.partition("=") for item in given)}
    if not all(pairs) or not all(pairs.values()):
        raise ConfigError(f"{flag} takes NAME=VALUE; got {', '.join(map(repr, given))}.")
    return pairs


def _weights(given: list[str]) -> dict[str, str]:
    return _pairs("--feature-weights", [item if "=" in item else f"features={item}" for item in given])


# -- options from a file -----------------------------------------------------------------------------------------------


def read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Options from a YAML file, by their long names, as the parser keeps them.

    Raises:
        ConfigError: if it cannot be read, holds an option that does not exist, or one that only the command line takes.
    """
    import yaml

    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config names a YAML file of options; {path} is none: {error}") from error
    if not isinstance(read, Mapping):
        raise ConfigError(f"{path} holds a {type(read).__name__}; expected options by their long names.")
    fixed = ("help", "config", "debug")
    actions = {name: action for action in parser._actions if action.dest not in fixed for name in _names(action)}
    given: dict[str, Any] = {}
    for name, value in read.items():
        action = actions.get(str(name).replace("_", "-"))
        if action is None:
            raise ConfigError(f"{path}: there is no option {name!r}; there are {', '.join(sorted(actions))}.")
        given[action.dest] = _value(action, str(name), value, path)
    features = given.get("features", "")
    if ":" in features and not features.startswith("inception:"):
        raise ConfigError(
            f"{path}: features {features!r} would import code; only the command line may ask for that (--features)."
        )
    return given


def _names(action: argparse.Action) -> list[str]:
    return [option.removeprefix("--") for option in action.option_strings if option.startswith("--")] or [action.dest]


def _value(action: argparse.Action, name: str, value: Any, path: str) -> Any:
    """A value from a file as the parser would have made it."""
    many = isinstance(action, argparse._AppendAction) or action.nargs == "+"
    values = value if isinstance(value, list) else [value]
    if isinstance(value, Mapping) and action.dest in PAIRS:
        written = json.dumps if action.dest == "arguments" else str
        values = [f"{key}={written(item)}" for key, item in value.items()]
    kind: Any = bool if action.nargs == 0 else action.type or str
    allowed = {float: (int, float), str: (str, int, float)}.get(kind, (kind,))
    for item in values:
        if not isinstance(item, allowed) or (isinstance(item, bool) and kind is not bool):
            raise ConfigError(f"{path}: {name} takes {getattr(kind, '__name__', kind)}, got {item!r}.")
        if action.choices is not None and item not in action.choices:
            raise ConfigError(f"{path}: {name} is one of {', '.join(action.choices)}; got {item!r}.")
    if not many and len(values) != 1:
        raise ConfigError(f"{path}: {name} takes one value, got {value!r}.")
    made = [item if kind is bool else kind(item) for item in values]
    return made if many else made[0]


# -- comparing two -----------------------------------------------------------------------------------------------------

COMPARE_PURPOSE = """\
Say what got better or worse from one evaluation to another, beyond noise: every criterion and the speed of every way
that both hold. Ends with status 1 if something got worse by more than the tolerance, for use in continuous
integration."""

COMPARE_EXAMPLES = ("fastdiff eval compare before/results.json after/results.json --tolerance 0.02",)


def add_compare_parser(subparsers: Any) -> None:
    """Add ``fastdiff eval compare``."""
    parser = new_parser(subparsers, "eval-compare", COMPARE_PURPOSE, COMPARE_EXAMPLES)
    parser.prog = "fastdiff eval compare"
    parser.add_argument("before", help="results.json, or the folder of a report")
    parser.add_argument("after", help="the same, later")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="of the earlier value by which something may get worse (default: %(default)s)",
    )
    parser.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """Compare and print; returns the exit status."""
    from fastdiff.eval.compare import compare, told
    from fastdiff.eval.results import load_results

    if not options.tolerance >= 0:
        raise ConfigError(f"--tolerance is a share of at least 0; got {options.tolerance}.")
    comparison = compare(load_results(options.before), load_results(options.after), options.tolerance)
    print(told(comparison))
    return 1 if comparison.regressions else 0


def main() -> int:
    """``python -m fastdiff.eval``: the same command for a launcher of processes."""
    from fastdiff.cli.main import main as whole

    return whole(["eval", *sys.argv[1:]])
