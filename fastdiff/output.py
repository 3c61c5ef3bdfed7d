"""Writing results so that an interrupted command leaves no half-written file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdiff.errors import FastDiffError


class OutputError(FastDiffError, OSError):
    """A place that results cannot be written to."""


@contextmanager
def staged_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``out`` whose files move there when the block ends well, and vanish when it does not.

    Files of the same names are replaced; whatever else lies in ``out`` stays.

    Args:
        out: the folder to fill; made if it does not exist.

    Raises:
        OutputError: if it cannot be written, before the block runs.
    """
    out = Path(out)
    try:
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"{out} is a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise OutputError(f"Results cannot be written to {out}: {error}. Name another folder with --out.") from error
    try:
        yield staged
        for file in sorted(path for path in staged.rglob("*") if path.is_file()):
            target = out / file.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
