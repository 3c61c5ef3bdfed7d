"""The engine: a step clock, an executor for each denoiser, and the record of what happened."""

from __future__ import annotations

from fastdiff.engine.clock import Grid, StepClock
from fastdiff.engine.record import DenoiserRecord, RunRecord
from fastdiff.engine.run import SamplingRun, sampling_run

__all__ = ["DenoiserRecord", "Grid", "RunRecord", "SamplingRun", "StepClock", "sampling_run"]
