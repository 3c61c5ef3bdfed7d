"""What an import brings in, each in an interpreter of its own."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff

ROOT_FOLDERS = {"benchmarks", "docs", "eval", "kernels", "pipelines", "tests", "uem"}


def run(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def modules_after(code: str, cwd: Path) -> dict[str, str]:
    """Modules loaded after `code` ran in `cwd`, with the file each came from, or the first folder of a namespace."""
    report = (
        "import json, sys\n"
        "place = lambda m: getattr(m, '__file__', None) or str(*list(getattr(m, '__path__', []))[:1])\n"
        "print(json.dumps({name: place(module) for name, module in sys.modules.items()}))"
    )
    return json.loads(run(f"{code}\n{report}", cwd))


def in_root_folders(place: str, root: Path) -> bool:
    return any(Path(place).is_relative_to(root / folder) for folder in ROOT_FOLDERS)


def test_root_folders_are_not_imported_by_other_libraries(root: Path) -> None:
    loaded = modules_after("import transformers, diffusers", cwd=root)
    assert {"transformers", "diffusers"} <= set(loaded)
    assert not {name: place for name, place in loaded.items() if in_root_folders(place, root)}


def test_no_code_of_ours_runs_when_other_libraries_probe_for_kernels(root: Path, tmp_path: Path) -> None:
    # Loading a class makes transformers look for the package `kernels`. In the checkout it finds our folder as an
    # empty namespace, which it must reject: the answer has to be the one that it gives anywhere else.
    probe = "from transformers import CLIPTextModel; from diffusers import DiTPipeline, FluxPipeline"
    loaded = modules_after(probe, cwd=root)
    ours = {name: place for name, place in loaded.items() if in_root_folders(place, root)}
    assert set(ours.values()) <= {str(root / "kernels")}

    available = f"{probe}; from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run(available, cwd=root) == run(available, cwd=tmp_path)


def test_import_is_light(tmp_path: Path) -> None:
    heavy = {"torch", "diffusers", "transformers", "accelerate", "numpy", "matplotlib", "PIL", "triton", "torchmetrics"}
    assert not heavy & set(modules_after("import fastdiff", cwd=tmp_path))


def test_sampling_interface_needs_no_extra(tmp_path: Path) -> None:
    loaded = modules_after("import fastdiff; fastdiff.FastDiffPipeline; fastdiff.ExitSchedule", cwd=tmp_path)
    # torch itself loads Triton where it is installed, so only what nobody else would load can be told here.
    assert not {"matplotlib", "torchmetrics", "fastdiff.eval", "fastdiff.cli"} & set(loaded)


BASE_ONLY = """
import importlib.metadata as metadata, re, sys

def needed(name, found):
    key = re.sub("[-_.]+", "-", name).lower()
    if key in found:
        return found
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return found
    found.add(key)
    for requirement in requirements:
        if "extra ==" not in requirement:
            needed(re.match("[A-Za-z0-9._-]+", requirement)[0], found)
    return found

base = needed("fastdiff", set())
owners = metadata.packages_distributions()
others = {
    module for module, names in owners.items() if not base & {re.sub("[-_.]+", "-", name).lower() for name in names}
}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in others else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

assert "pytest" in others and "torchmetrics" not in others
sys.meta_path[:] = map(Hiding, sys.meta_path)
found = metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if re.sub("[-_.]+", "-", name).lower() not in base:
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)

metadata.Distribution.from_name = classmethod(from_name)
"""
"""Hides every package that a plain installation does not bring."""


def test_the_demo_needs_no_extra(tmp_path: Path) -> None:
    words = ["demo", "--num-samples", "2", "--batch-size", "2", "--num-inference-steps", "3", "--out", "out"]
    said = run(f"{BASE_ONLY}\nfrom fastdiff.cli.main import main\nassert main({words!r}) == 0", cwd=tmp_path)
    assert "report.html" in said
    assert (tmp_path / "out/report.html").is_file()


def test_checkout_finds_its_mapped_folders_without_an_editable_install(root: Path) -> None:
    # -S: no import hook of an editable install helps.
    paths = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import sys; sys.path += {paths!r}; import fastdiff.pipelines as found; print(found.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == root / "pipelines/__init__.py"


@pytest.mark.parametrize("name", fastdiff.__all__)
def test_every_export_resolves(name: str) -> None:
    assert getattr(fastdiff, name).__name__ == name
    assert name in dir(fastdiff)


def test_modules_are_found_by_their_dotted_names(tmp_path: Path) -> None:
    code = "import fastdiff; print(*(getattr(fastdiff, name).__name__ for name in fastdiff._MODULES))"
    assert run(code, cwd=tmp_path).split() == [f"fastdiff.{name}" for name in fastdiff._MODULES]
    assert set(fastdiff._MODULES) < set(dir(fastdiff))


def test_unknown_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        fastdiff.no_such_name  # noqa: B018 - reading the attribute is the test


def test_what_is_wrong_with_a_dependency_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastdiff._LAZY, "Broken", "fastdiff.plan")  # as when diffusers needs a newer torch
    with pytest.raises(ImportError, match=r"fastdiff.Broken could not be loaded: module 'fastdiff.plan' has no"):
        from fastdiff import Broken  # noqa: F401


def test_type_checkers_see_the_same_exports(root: Path) -> None:
    tree = ast.parse((root / "fastdiff/__init__.py").read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == fastdiff._LAZY
    assert set(typed) <= set(fastdiff.__all__)
