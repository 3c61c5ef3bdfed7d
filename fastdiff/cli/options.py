"""What several subcommands share: options, examples in the help, and loading a pipeline from them."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

from fastdiff.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.methods import Method

EXAMPLES = "examples:"
FAILURE = 2
"""Exit status of an error that was explained in one line."""
DTYPES = ("float32", "float16", "bfloat16")

METHOD_HELP = (
    "NAME or NAME:field=value,field=value; give it several times to combine methods. "
    "`fastdiff info` lists methods and fields; plan:FILE uses a saved plan, saved:FILE a method saved by "
    "`fastdiff calibrate`"
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the purpose to the terminal's width and leaves the examples as they are, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(EXAMPLES):
            return text
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)


def examples(*commands: str) -> str:
    """Text for the end of a help page."""
    return "\n  ".join([EXAMPLES, *commands])


def new_parser(subparsers: Any, name: str, purpose: str, commands: tuple[str, ...]) -> argparse.ArgumentParser:
    """A subcommand's parser, with its purpose in one paragraph and complete command lines as examples."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=purpose.partition(". ")[0].rstrip("."),
        description=purpose,
        epilog=examples(*commands),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return parser


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """``--method`` and ``--preset``."""
    parser.add_argument("--method", action="append", default=[], metavar="SPEC", help=METHOD_HELP)
    parser.add_argument("--preset", help="quality, balanced, fast or off, in place of methods")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """``--kernels`` and ``--cuda-graphs``."""
    parser.add_argument(
        "--kernels",
        choices=("auto", "off"),
        default="off",
        help="auto: fused kernels where the device has them (default: off)",
    )
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="replay evaluations that repeat as one launch, on NVIDIA GPUs"
    )


def chosen_methods(options: argparse.Namespace) -> tuple[Method, ...] | None:
    """The methods named by ``--method``, or None if there is none.

    Raises:
        ConfigError: for a specification that cannot be read.
    """
    from fastdiff.spec import parse_method

    return tuple(map(parse_method, options.method)) or None


def choose_device(name: str | None) -> str:
    """The device to work on.

    Raises:
        ConfigError: if there is no such device here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise ConfigError(f"The device {name!r} cannot be used here: {error}") from error
    return name


def load_pipeline(options: argparse.Namespace, model: str, **kwargs: Any) -> DiffusionPipeline:
    """Load a pipeline with the methods, device and dtype that the options name.

    Args:
        options: of the command.
        model: as in `FastDiffPipeline.from_pretrained`.
        **kwargs: further arguments of that.

    Raises:
        FastDiffError: as `FastDiffPipeline.from_pretrained` does.
    """
    from fastdiff.pipelines.calling import load

    methods = chosen_methods(options)
    device = choose_device(options.device)
    return load(model, device, options.dtype, methods=methods, preset=options.preset, **kwargs)


def parse_value(text: str) -> Any:
    """A value from the command line: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_arguments(given: list[str]) -> dict[str, Any]:
    """The arguments given as ``--arg name=value``.

    Raises:
        ConfigError: for one without an equals sign.
    """
    arguments = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--arg takes name=value, for example --arg height=512; got {item!r}.")
        arguments[name.strip().replace("-", "_")] = parse_value(value)
    return arguments


def call(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> Any:
    """Call a pipeline.

    Raises:
        ConfigError: if it refuses the arguments.
    """
    from fastdiff.pipelines.calling import refusals_explained

    with refusals_explained(f"{type(pipe).__name__} refuses these arguments"):
        return pipe(**arguments)
