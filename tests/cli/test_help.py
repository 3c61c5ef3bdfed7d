"""Every help page runs, teaches by example, and its examples are command lines that parse."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.cli.main import build_parser, main
from fastdiff.cli.options import EXAMPLES
from fastdiff.spec import parse_method


def pages(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and all below it."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [page for child in action.choices.values() for page in pages(child)]
    return found


PAGES = {page.prog: page for page in pages(build_parser())}


def example_commands(page: argparse.ArgumentParser) -> list[str]:
    assert page.epilog is not None
    lines = page.epilog.removeprefix(EXAMPLES).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def test_all_subcommands_have_a_page() -> None:
    assert {"fastdiff", "fastdiff demo", "fastdiff generate", "fastdiff plan show", "fastdiff plan save",
            "fastdiff info"} <= set(PAGES)  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_help_page_shows_purpose_and_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*name.split()[1:], "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert len((PAGES[name].description or "").split()) >= 8
    for command in example_commands(PAGES[name]):
        assert command.split("  ")[0] in shown


@pytest.mark.parametrize("name", PAGES)
def test_examples_parse(name: str) -> None:
    commands = example_commands(PAGES[name])
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "fastdiff"
        if "--help" in arguments:
            continue
        options = build_parser().parse_args(arguments)
        assert callable(options.run)
        for spec in getattr(options, "method", []):
            if not spec.startswith(("plan:", "saved:")):
                parse_method(spec)


@pytest.mark.parametrize("name", PAGES)
def test_every_option_is_explained(name: str) -> None:
    unexplained = {
        action.dest
        for action in PAGES[name]._actions
        if action.help is None and not isinstance(action, argparse._SubParsersAction)
    }
    assert unexplained <= {"negative_prompt"}


def test_help_is_quick_because_it_loads_no_torch() -> None:
    code = "import sys; from fastdiff.cli.main import build_parser; build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_module_and_console_script_are_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastdiff", "--version"], capture_output=True, text=True, check=True)
    import fastdiff

    assert done.stdout == f"fastdiff {fastdiff.__version__}\n"
    script = Path(sys.executable).parent / "fastdiff"
    if script.exists():
        again = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
        assert again.stdout == done.stdout


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
