"""Prompts that ``fastdiff generate`` reads from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Command


def test_prompts_come_from_a_file(tiny_sd: Path, tmp_path: Path, command: Command) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red digit 1 on a white background\na letter K\n")
    words = ["--num-inference-steps", 1, "--preset", "off"]
    assert command("generate", tiny_sd, "--prompt-file", prompts, *words, "--out", tmp_path / "file")[0] == 0
    given = prompts.read_text().splitlines()
    assert command("generate", tiny_sd, "--prompt", *given, *words, "--out", tmp_path / "words")[0] == 0
    for name in ("00000.png", "00001.png"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "words" / name).read_bytes()


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused(
    content: str | bytes | None, tiny_sd: Path, tmp_path: Path, command: Command
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, complaint = command("generate", tiny_sd, "--prompt-file", prompts, "--out", tmp_path / "out")
    assert status == 2
    assert "--prompt-file" in complaint
    assert not (tmp_path / "out").exists()


def test_prompts_are_given_in_one_way(tiny_sd: Path, tmp_path: Path, command: Command) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a letter K\n")
    words = ["--prompt", "a letter K", "--prompt-file", prompts, "--out", tmp_path / "out"]
    status, _, complaint = command("generate", tiny_sd, *words)
    assert status == 2
    assert "one of --class-labels, --prompt and --prompt-file" in complaint
