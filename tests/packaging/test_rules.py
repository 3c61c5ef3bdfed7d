"""Rules of the repository that a linter does not know."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MAX_LINES = 500


@pytest.fixture(scope="module")
def python_files(root: Path, source_folders: dict[str, Path]) -> list[Path]:
    folders = [*source_folders.values(), root / "tests", root / "benchmarks", root / "docs"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unsafe_uses(source: str) -> list[str]:
    """Uses of anything that runs code found in a file: pickle and its kin, `torch.load`, `eval`, `exec`."""
    tree = ast.parse(source)
    formats = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = [name for name in imported(tree) if name.split(".")[0] in formats]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            name in {"eval", "exec", "compile"}
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name in {"np.load", "numpy.load"} and keywords.get("allow_pickle", "False") != "False")
        ):
            found.append(name)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "np.load('x', allow_pickle=True)",
        "eval('1')",
    ],
)
def test_unsafe_uses_are_found(source: str) -> None:
    assert unsafe_uses(source)


def test_safe_uses_pass() -> None:
    assert not unsafe_uses("model.eval()\ntorch.load('x', weights_only=True)\nre.compile('x')\ntorch.compile(m)")


def test_no_file_runs_code_from_data(python_files: list[Path], root: Path) -> None:
    found = {str(path.relative_to(root)): unsafe_uses(path.read_text(encoding="utf-8")) for path in python_files}
    assert not {path: uses for path, uses in found.items() if uses}


def test_no_file_is_too_long(python_files: list[Path], root: Path) -> None:
    lengths = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_kernels_stays_a_namespace_folder(root: Path) -> None:
    assert (root / "kernels").is_dir()
    assert not (root / "kernels/__init__.py").exists()
    # Either would make a folder outside the package importable by a name that is not ours.
    assert not (root / "tests/__init__.py").exists()
    assert not (root / "tests/packaging/__init__.py").exists()


# Who may not import whom: the core knows nothing of what is built on it.
FORBIDDEN = {
    "fastdiff": {"fastdiff.pipelines", "fastdiff.eval", "fastdiff.cli"},
    "fastdiff.uem": {"fastdiff.pipelines", "fastdiff.eval", "fastdiff.cli"},
    "fastdiff.kernels": {"fastdiff.pipelines", "fastdiff.eval", "fastdiff.cli", "fastdiff.engine", "fastdiff.methods"},
    "fastdiff.pipelines": {"fastdiff.eval", "fastdiff.cli"},
    "fastdiff.eval": {"fastdiff.cli"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_never_point_backwards(package: str, root: Path, source_folders: dict[str, Path]) -> None:
    folder = source_folders[package]
    # The commands sit on top, and the package's own file exports lazily what lies above it.
    on_top = {root / "fastdiff/__init__.py", *root.glob("*/__main__.py"), *(root / "fastdiff/cli").rglob("*.py")}
    backwards = {
        f"{path.relative_to(root)}: {name}"
        for path in set(folder.rglob("*.py")) - on_top
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        for upper in FORBIDDEN[package]
        if name == upper or name.startswith(f"{upper}.")
    }
    assert not backwards


def test_configured_paths_exist(pyproject: dict[str, Any], root: Path) -> None:
    project, tool = pyproject["project"], pyproject["tool"]
    setuptools, pytest_options = tool["setuptools"], tool["pytest"]["ini_options"]
    mapping = setuptools["package-dir"]

    def folder(package: str) -> str:
        return mapping.get(package, package.replace(".", "/"))

    patterns = [
        project["readme"],
        *project["license-files"],
        *mapping.values(),
        *map(folder, setuptools["packages"]),
        *(f"{folder(package)}/{glob}" for package, globs in setuptools["package-data"].items() for glob in globs),
        *pytest_options["testpaths"],
        *pytest_options["pythonpath"],
        *tool["ruff"]["lint"]["per-file-ignores"],
    ]
    assert not [pattern for pattern in patterns if not any(root.glob(pattern))]


def test_packages_are_all_listed(pyproject: dict[str, Any], source_folders: dict[str, Path]) -> None:
    holding_code = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in source_folders.items()
        for path in folder.rglob("*.py")
    }
    assert holding_code == set(pyproject["tool"]["setuptools"]["packages"])


def test_console_script_resolves(pyproject: dict[str, Any]) -> None:
    for target in pyproject["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("page", ["README.md", "docs/development.md"])
def test_make_commands_in_the_docs_exist(page: str, root: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    # In code only: "make sure" is no command.
    text = (root / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert {"demo", "test"} <= named or page != "README.md"
    assert named <= targets
