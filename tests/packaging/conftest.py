from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def source_folders(root: Path, pyproject: dict[str, Any]) -> dict[str, Path]:
    """Where each part of the package lies: import name to folder, for `fastdiff` and every mapped folder."""
    mapping = pyproject["tool"]["setuptools"]["package-dir"]
    return {"fastdiff": root / "fastdiff", **{name: root / folder for name, folder in mapping.items()}}
