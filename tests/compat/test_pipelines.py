"""Every tiny diffusers pipeline: full is plain, reuse runs what it should, calls share nothing, `disable` restores."""

from __future__ import annotations

import pytest
from compat.suite import PIPELINES, ROUNDING, VIDEOS, examine, sample
from compat.table import PAGE, listed, row, same_versions

import fastdiff
from fastdiff import ExitSchedule

EVERY_PIPELINE = pytest.mark.parametrize("name", PIPELINES)

REFUSED = {
    "StableDiffusionSAGPipeline": "reads what CrossAttnStoreProcessor sees",
    "StableDiffusionAttendAndExcitePipeline": "reads what AttendExciteAttnProcessor sees",
    "ScoreSdeVePipeline": "ScoreSdeVeScheduler has no step",
    "WuerstchenPriorPipeline": "nothing kept to reuse for this branch and shape",
    "WuerstchenDecoderPipeline": "WuerstchenDiffNeXt has stages, but not in a layout that fastdiff knows",
}
"""Pipelines in which nothing can be left out, with what the user is told."""

PAG = "PAGCFGIdentitySelfAttnProcessor2_0 may mix the samples of a batch"
MOVED = "the denoiser is not given the scheduler's own timesteps"
BEYOND = ["more evaluations than the scheduler's grid has", "nothing kept to reuse for this branch and shape"]
CROSS_FRAME = "CrossFrameAttnProcessor2_0 may mix the samples of a batch"
REASONS: dict[str, list[str]] = {
    **{name: [PAG] for name in PIPELINES if "PAG" in name},
    # Their denoisers see some function of the scheduler's timesteps, or its timesteps in another order.
    "StableDiffusionLatentUpscalePipeline": [MOVED],
    "RePaintPipeline": [MOVED, "another timestep than the prediction was made for"],
    # They evaluate some timesteps twice, once for a single frame and once for all.
    "TextToVideoZeroPipeline": [*BEYOND, CROSS_FRAME],
    "TextToVideoZeroSDXLPipeline": [*BEYOND, CROSS_FRAME],
}
"""Why some calls of a pipeline compute more than planned, or are not decoded as one batch, where there is a reason."""


@EVERY_PIPELINE
def test_pipeline(name: str) -> None:
    outcome = examine(name)
    assert outcome.restored
    assert outcome.full_is_plain or not outcome.denoisers
    assert REFUSED.get(name, "") in outcome.refusal
    assert bool(outcome.refusal) == (name in REFUSED), outcome.refusal
    if not outcome.refusal:
        assert outcome.changed
        assert all(reuse.cells > 0 for reuse in outcome.reuse.values())
        assert all(reuse.runs_as_planned is not False for reuse in outcome.reuse.values())
        assert all(reuse.independent for reuse in outcome.reuse.values())
        assert (outcome.parallel_difference or 0) <= (ROUNDING if name in VIDEOS else 0)
        assert {reason for reuse in outcome.reuse.values() for reason in reuse.reasons} == {*REASONS.get(name, [])}
    if same_versions():
        assert row(name, outcome) in PAGE.read_text(encoding="utf-8"), "run the command at the top of the page again"


def test_page_lists_the_pipelines_of_this_suite() -> None:
    assert [name for name in listed() if name in PIPELINES or same_versions()] == list(PIPELINES)


def test_every_evaluation_of_every_pipeline_is_seen() -> None:
    """The clock's rows are the scheduler's evaluations, whatever the pipeline does around them."""
    for name in ("PixArtSigmaPipeline", "CogVideoXPipeline", "StableDiffusion3Img2ImgPipeline"):
        pipe = PIPELINES[name].build()
        fastdiff.enable(pipe, ExitSchedule("full"))
        sample(pipe, name, steps=8)
        first = 4 if "Img2Img" in name else 0
        seen = [call.evaluation for call in pipe.fastdiff.last_run.denoisers["transformer"].calls]
        assert sorted(set(seen)) == list(range(first, 8))
