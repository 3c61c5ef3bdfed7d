"""Entry point of the `fastdiff` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import fastdiff
from fastdiff.cli import calibrate, demo, evaluate, generate, info, plan, train_uem
from fastdiff.cli.options import FAILURE, HelpFormatter, examples
from fastdiff.errors import FastDiffError

INTERRUPTED = 130
SUBCOMMANDS = (demo, evaluate, generate, plan, info, train_uem, calibrate)


class _Parser(argparse.ArgumentParser):
    """Knows ``eval compare``, which argparse cannot tell from ``eval`` with a model of that name."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if words[:2] == ["eval", "compare"]:
            words[:2] = ["eval-compare"]
        return super().parse_known_args(words, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(
        prog="fastdiff",
        description="Makes diffusers pipelines sample faster by skipping work, and measures what that costs.",
        epilog=examples("fastdiff demo", "fastdiff info", "fastdiff generate --help"),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdiff {fastdiff.__version__}")
    parser.set_defaults(debug=False, interrupted="nothing was written")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser
    )
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    evaluate.add_compare_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line without the program's name; by default the process's.

    Returns:
        The exit status: 0, 1 for a regression that `fastdiff eval compare` found, 2 for an error that was explained in
        one line, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(words)
    options.command = ["fastdiff", *words]
    try:
        return options.run(options) or 0
    except FastDiffError as error:
        if options.debug:
            raise
        print(f"fastdiff: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print(f"fastdiff: interrupted, {options.interrupted}", file=sys.stderr)
        return INTERRUPTED
