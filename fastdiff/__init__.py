"""fastdiff makes diffusers pipelines sample faster by skipping work that does not change the image.

Importing this package is cheap: torch, diffusers and everything built on them load on first use of a name.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.errors import (
    ConfigError,
    FastDiffError,
    FastDiffNoEffectWarning,
    PlanError,
    ProfileMismatchError,
    StateError,
    UnsupportedBackboneError,
    UnsupportedPipelineError,
)

if TYPE_CHECKING:
    from fastdiff.engine import sampling_run
    from fastdiff.kernels.patching import optimize, restore
    from fastdiff.methods import (
        EncoderPropagation,
        ExitSchedule,
        FeatureInheritance,
        LayerSkipping,
        SkipTuning,
        UncertaintyExit,
    )
    from fastdiff.pipelines import FastDiffPipeline, disable, disabled, enable, is_enabled
    from fastdiff.plan import Action, ComputePlan

__version__ = "0.1.0"

__all__ = [
    "Action",
    "ComputePlan",
    "ConfigError",
    "EncoderPropagation",
    "ExitSchedule",
    "FastDiffError",
    "FastDiffNoEffectWarning",
    "FastDiffPipeline",
    "FeatureInheritance",
    "LayerSkipping",
    "PlanError",
    "ProfileMismatchError",
    "SkipTuning",
    "StateError",
    "UncertaintyExit",
    "UnsupportedBackboneError",
    "UnsupportedPipelineError",
    "disable",
    "disabled",
    "enable",
    "is_enabled",
    "optimize",
    "restore",
    "sampling_run",
]

_LAZY = {
    "Action": "fastdiff.plan",
    "ComputePlan": "fastdiff.plan",
    "EncoderPropagation": "fastdiff.methods",
    "ExitSchedule": "fastdiff.methods",
    "FeatureInheritance": "fastdiff.methods",
    "LayerSkipping": "fastdiff.methods",
    "SkipTuning": "fastdiff.methods",
    "UncertaintyExit": "fastdiff.methods",
    "FastDiffPipeline": "fastdiff.pipelines",
    "disable": "fastdiff.pipelines",
    "disabled": "fastdiff.pipelines",
    "enable": "fastdiff.pipelines",
    "is_enabled": "fastdiff.pipelines",
    "optimize": "fastdiff.kernels.patching",
    "restore": "fastdiff.kernels.patching",
    "sampling_run": "fastdiff.engine",
}

_MODULES = ("backbones", "eval", "methods", "models", "ops", "uem", "zoo")
"""What is used by its dotted name, as ``fastdiff.models.UViT``, with ``import fastdiff`` alone."""

# In a checkout the sub-packages `pipelines`, `uem`, `kernels` and `eval` lie beside this folder instead of inside it.
# An interpreter started in the checkout finds this folder before an installed copy, so it must find them too.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "pipelines").is_dir():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fastdiff.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    try:
        value = getattr(import_module(_LAZY[name]), name)
    except AttributeError as error:  # of which `from fastdiff import ...` would only tell that there is no such name
        raise ImportError(f"fastdiff.{name} could not be loaded: {error}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
