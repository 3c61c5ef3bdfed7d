"""The published methods, one file each: a frozen configuration that turns into a compute plan."""

from __future__ import annotations

from fastdiff.methods.base import Method, PlanRequest, SavedPlan, as_methods
from fastdiff.methods.encoder_propagation import EncoderPropagation
from fastdiff.methods.exit_schedule import ExitSchedule
from fastdiff.methods.feature_inheritance import FeatureInheritance
from fastdiff.methods.layer_skipping import LayerSkipping
from fastdiff.methods.skip_tuning import SkipTuning
from fastdiff.methods.uncertainty_exit import UncertaintyExit

__all__ = [
    "EncoderPropagation",
    "ExitSchedule",
    "FeatureInheritance",
    "LayerSkipping",
    "Method",
    "PlanRequest",
    "SavedPlan",
    "SkipTuning",
    "UncertaintyExit",
    "as_methods",
]
