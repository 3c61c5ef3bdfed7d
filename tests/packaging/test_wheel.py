"""The wheel holds the whole package and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def wheel(
    root: Path, pyproject: dict[str, Any], source_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> zipfile.ZipFile:
    """A wheel built from a copy, so that neither the checkout nor an old build folder takes part."""
    copy = tmp_path_factory.mktemp("source")
    project = pyproject["project"]
    for name in ("pyproject.toml", project["readme"], *project["license-files"]):
        shutil.copy(root / name, copy)
    for folder in source_folders.values():
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    target = copy / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def members(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_modules_equal_the_tree(wheel: zipfile.ZipFile, source_folders: dict[str, Path]) -> None:
    tree = {
        f"{name.replace('.', '/')}/{file.relative_to(folder).as_posix()}"
        for name, folder in source_folders.items()
        for file in folder.rglob("*.py")
    }
    assert {name for name in members(wheel) if name.endswith(".py")} == tree


def test_data_files_equal_the_tree(wheel: zipfile.ZipFile, root: Path) -> None:
    weights = (path for path in (root / "fastdiff/zoo/weights").rglob("*") if path.is_file())
    tree = {"fastdiff/py.typed", *(path.relative_to(root).as_posix() for path in weights)}
    assert {name for name in members(wheel) if not name.endswith(".py")} == tree


def test_only_fastdiff_is_at_the_top(wheel: zipfile.ZipFile) -> None:
    (top_level,) = (name for name in wheel.namelist() if name.endswith(".dist-info/top_level.txt"))
    assert wheel.read(top_level).decode().split() == ["fastdiff"]
    assert {name.split("/")[0] for name in members(wheel)} == {"fastdiff"}


IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import itertools, fastdiff, fastdiff.kernels
# Walking passes over a folder without __init__.py.
kernels = pkgutil.walk_packages(fastdiff.kernels.__path__, "fastdiff.kernels.")
for module in itertools.chain(pkgutil.walk_packages(fastdiff.__path__, "fastdiff."), kernels):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*sorted(getattr(sys.modules[n], "__file__", None) or "" for n in sys.modules if n.split(".")[0] == "fastdiff"))
"""


def test_every_module_of_the_wheel_imports(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    installed = [path for path in sys.path if path.endswith("site-packages")]
    # -S: the editable install of this environment would answer for modules that the wheel lacks.
    command = [sys.executable, "-S", "-c", IMPORT_ALL, str(tmp_path / "site"), *installed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = {Path(name) for name in done.stdout.split()}
    code = {name for name in members(wheel) if name.endswith(".py") and not name.endswith("__main__.py")}
    assert files == {tmp_path / "site" / name for name in code}
