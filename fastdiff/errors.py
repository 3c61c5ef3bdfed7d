"""Exceptions and warnings that fastdiff raises.

Every error derives from `FastDiffError` and from the builtin exception that fits it, so callers may catch either.
Messages say what was given, what was expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "FastDiffError",
    "FastDiffNoEffectWarning",
    "PlanError",
    "ProfileMismatchError",
    "StateError",
    "UnsupportedBackboneError",
    "UnsupportedPipelineError",
]


class FastDiffError(Exception):
    """Base of every error that fastdiff raises."""


class PlanError(FastDiffError, ValueError):
    """A compute plan that cannot be executed.

    Args:
        message: What was found, what was expected, and what to do.
        row: Evaluation the error is about (0 is the noisiest), or `None` when it concerns the whole plan.
        unit: Name of the unit the error is about, or `None` when it concerns no single unit.
    """

    def __init__(self, message: str, *, row: int | None = None, unit: str | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.unit = unit


class ConfigError(FastDiffError, ValueError):
    """A method configuration with a value that is out of range, of the wrong type, or unknown."""


class UnsupportedBackboneError(FastDiffError, TypeError):
    """A denoiser whose units cannot be found or driven."""


class UnsupportedPipelineError(FastDiffError, TypeError):
    """A pipeline that offers no denoiser or scheduler to work with."""


class ProfileMismatchError(FastDiffError, ValueError):
    """A saved plan or configuration made for another model or another number of steps."""


class StateError(FastDiffError, RuntimeError):
    """An operation that the current state forbids, such as enabling twice on one shared denoiser."""


class FastDiffNoEffectWarning(UserWarning):
    """An enabled method changed nothing in a sampling call."""
