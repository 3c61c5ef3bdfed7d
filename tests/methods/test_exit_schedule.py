"""Exit schedules: the published table, families, spaces, and what they do on real grids."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import Action, ConfigError, ExitSchedule
from fastdiff.backbones import view
from fastdiff.engine import Grid, sampling_run
from tiny.base import build
from tiny.image import DIT
from tiny.models import TINY_MODELS
from tiny.plans import E, grid_of, request_of
from tiny.sampling import accelerate, calls_at, counting, evaluate

DEMO = (28, 28, 24, 24, 20, 20, 16, 16, 12, 12)
"""Blocks of 28 in each hundred timesteps from the clean end, as published."""

DIT_MODEL = TINY_MODELS["DiTTransformer2DModel"]


def published_depth(timestep: float) -> int:
    return DEMO[min(int(timestep // 100), 9)]


def grid_from(name: str, steps: int, **config: Any) -> Grid:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    return Grid.of(scheduler)


# -- the published schedule --------------------------------------------------------------------------------------------


def test_demo_is_the_published_table() -> None:
    timesteps = np.arange(1000)
    depths = ExitSchedule("ase-demo").depth_at(timesteps, 28)
    assert depths.tolist() == [published_depth(timestep) for timestep in timesteps]
    assert depths.mean() == 20


def test_demo_takes_whatever_lies_beyond_its_table_as_its_ends() -> None:
    depths = ExitSchedule("ase-demo").depth_at(np.array([-1.0, 99.99, 199.99, 200.0, 899.5, 1000.0, 5000.0]), 28)
    assert depths.tolist() == [28, 28, 28, 24, 12, 12, 12]


def test_demo_runs_exactly_its_blocks() -> None:
    model = build(DiTTransformer2DModel, DIT | {"num_layers": 28})
    units = view(model).names
    timesteps = (999, 900, 899, 200, 199, 100, 99, 0)  # the published edges
    calls = calls_at(DIT_MODEL, timesteps)
    with counting(model, units, calls[0]) as counted:
        accelerate(model, calls, ExitSchedule("ase-demo"), timesteps)
    expected = [[int(block < published_depth(timestep)) for block in range(28)] for timestep in timesteps]
    assert counted.table(units).tolist() == expected


def test_demo_scales_to_other_models() -> None:
    centres = np.arange(50, 1000, 100)
    demo = ExitSchedule("ase-demo")
    assert demo.depth_at(centres, 14).tolist() == [14, 14, 12, 12, 10, 10, 8, 8, 6, 6]
    assert demo.depth_at(centres, 56).tolist() == [2 * depth for depth in DEMO]
    assert demo.depth_at(centres, 12).tolist() == [12, 12, 10, 10, 9, 9, 7, 7, 5, 5]
    assert demo.depth_at(centres, 1).tolist() == [1] * 10


@given(st.integers(1, 60), st.lists(st.integers(1, 28), min_size=1, max_size=6))
@settings(deadline=None)
def test_scaled_depths_keep_their_order_and_stay_in_the_model(units: int, depths: list[int]) -> None:
    schedule = ExitSchedule(bin_edges=range_of(len(depths)), depths=tuple(depths), full=28)
    scaled = schedule.depth_at(np.arange(len(depths)), units)
    assert ((scaled >= 1) & (scaled <= units)).all()
    assert (np.diff(scaled)[np.diff(depths) >= 0] >= 0).all()
    assert (np.abs(scaled - np.array(depths) * units / 28) <= 0.5).all() or (scaled == 1).any()


def range_of(number: int) -> tuple[float, ...]:
    return tuple(float(index) for index in range(number))


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "UViT"])
def test_full_is_the_plain_model(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    timesteps = (900, 500, 100)
    calls = calls_at(tiny, timesteps)
    plain = evaluate(model, calls)
    outputs, record = accelerate(model, calls, ExitSchedule("full"), timesteps)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, outputs, strict=True))
    assert record.skipped == 0
    assert ExitSchedule("full").is_neutral
    assert not ExitSchedule("ase-demo").is_neutral


# -- families ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.data())
@settings(deadline=None)
def test_linear_falls_evenly_to_its_least_depth(full: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, full))
    depths = ExitSchedule.linear(full, least).depth_at(np.arange(1000), full)
    assert depths[0] == full
    assert depths[-1] == least
    assert (np.diff(depths) <= 0).all()
    lengths = np.unique(depths, return_counts=True)[1]
    assert len(lengths) == full - least + 1
    assert lengths.max() - lengths.min() <= 1


def test_linear_counts_on_any_training_grid() -> None:
    depths = ExitSchedule.linear(4, 1, training_steps=400).depth_at(np.arange(400), 4)
    assert depths.tolist() == [4] * 100 + [3] * 100 + [2] * 100 + [1] * 100


def test_step_switches_once() -> None:
    depths = ExitSchedule.step(13, 300, 3).depth_at(np.array([0, 299.9, 300, 999]), 13)
    assert depths.tolist() == [13, 13, 3, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExitSchedule.linear(4, 5),
        lambda: ExitSchedule.linear(4, 0),
        lambda: ExitSchedule.step(4, 300, 5),
        lambda: ExitSchedule.step(4, 300, 0),
        lambda: ExitSchedule.step(4, 0, 2),
        lambda: ExitSchedule.step(4, math.nan, 2),
    ],
)
def test_family_out_of_range_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="ExitSchedule"):
        make()


# -- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "steps", "config", "saved"),
    [
        ("DDIMScheduler", 50, {}, 0.286),
        ("DPMSolverMultistepScheduler", 25, {"timestep_spacing": "linspace"}, 0.297),
        ("DPMSolverMultistepScheduler", 10, {"timestep_spacing": "linspace"}, 0.314),
        ("DPMSolverMultistepScheduler", 25, {"use_karras_sigmas": True}, 0.303),
        ("DPMSolverMultistepScheduler", 25, {"use_lu_lambdas": True}, 0.223),
        ("EulerDiscreteScheduler", 25, {"use_karras_sigmas": True}, 0.303),
        ("HeunDiscreteScheduler", 25, {}, None),
    ],
)
def test_mean_depth_is_that_of_the_timesteps(
    scheduler: str, steps: int, config: dict[str, Any], saved: float | None
) -> None:
    grid = grid_from(scheduler, steps, **config)
    plan = ExitSchedule("ase-demo").plan(request_of(28, grid)).validate()
    assert plan.depths.tolist() == [published_depth(timestep) for timestep in grid.timesteps]
    assert saved is None or 1 - plan.share == pytest.approx(saved, abs=5e-4)


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("DDIMScheduler", {}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_realised_depth_in_a_loop_is_that_of_the_timesteps(scheduler: str, config: dict[str, Any]) -> None:
    model = DIT_MODEL.build()
    inputs = DIT_MODEL.inputs(1, 0)
    loop = getattr(diffusers, scheduler)(**config)
    schedule = ExitSchedule.linear(4, 1)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sampling_run(model, schedule, scheduler=loop) as run:
        loop.set_timesteps(12)
        for timestep in loop.timesteps:
            given = loop.scale_model_input(latents, timestep)
            noise = model(given, timestep=timestep[None], class_labels=inputs["class_labels"]).sample[:, :4]
            latents = loop.step(noise, timestep, latents).prev_sample
    depths = run.record.denoisers["denoiser"].plan.depths
    assert depths.mean() == np.mean([4 - min(int(t * 4 / 1000), 3) for t in loop.timesteps.tolist()])
    assert len(set(depths.tolist())) > 2


def test_logsnr_gives_equal_noise_equal_depth_whatever_the_parametrisation() -> None:
    schedule = ExitSchedule(bin_edges=(-20.0, -6.3, -2.1, 1.7, 5.2), depths=(1, 2, 3, 4, 5), space="logsnr")
    diffusion = grid_from("DDIMScheduler", 40)
    sigmas = 1 / (1 + np.exp(diffusion.log_snr / 2))  # (1 - s) / s is the signal-to-noise amplitude ratio
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=sigmas.tolist())
    depths = [schedule.plan(request_of(6, grid)).depths for grid in (diffusion, Grid.of(flow))]
    assert set(depths[0]) == {1, 2, 3, 4, 5}
    assert (np.diff(depths[0]) >= 0).all()
    assert np.array_equal(depths[0], depths[1])


def test_edm_timesteps_are_no_training_timesteps() -> None:
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(10)
    grid = Grid.of(scheduler)
    with pytest.raises(ConfigError, match=r"EDM.*space='logsnr'"):
        ExitSchedule("ase-demo").plan(request_of(28, grid))
    by_noise = ExitSchedule(bin_edges=(-20, 0), depths=(2, 6), space="logsnr").plan(request_of(6, grid))
    assert by_noise.depths.tolist() == [2 if sigma > 1 else 6 for sigma in scheduler.sigmas[:-1]]


def test_unknown_signal_to_noise_ratio_is_refused() -> None:
    schedule = ExitSchedule(bin_edges=(0,), depths=(2,), space="logsnr")
    with pytest.raises(ConfigError, match=r"signal-to-noise ratio.*space='timestep'"):
        schedule.plan(request_of(4, grid_of((900, 100))))


def test_plan_names_its_origin_and_holds_the_rules() -> None:
    plan = ExitSchedule("ase-demo").plan(request_of(28, grid_of((950, 50)))).validate()
    assert plan.meta["methods"] == ["ExitSchedule('ase-demo')"]
    assert plan.meta["timesteps"] == [950.0, 50.0]
    assert set(plan.table.ravel().tolist()) == {Action.COMPUTE, E}


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({}, "one depth for each bin edge.*0 edges and 0 depths.*full, ase-demo"),
        ({"preset": "ase-d2"}, "no exit schedule 'ase-d2'; the presets are full, ase-demo"),
        ({"preset": {}}, "no exit schedule {}"),
        ({"preset": 3}, "no exit schedule 3"),
        ({"preset": "full", "heads": 3}, "heads is a folder; got 3"),
        ({"preset": "full", "depths": (3,), "bin_edges": (0,)}, "a preset or a table, not both"),
        ({"preset": "ase-demo", "full": 14}, "a preset or a table, not both"),
        ({"preset": "ase-demo", "space": "logsnr"}, "in timesteps"),
        ({"bin_edges": (0, 500), "depths": (4,)}, "2 edges and 1 depths"),
        ({"bin_edges": (0, math.nan), "depths": (4, 2)}, "finite.*nan"),
        ({"bin_edges": (0, math.inf), "depths": (4, 2)}, "finite.*inf"),
        ({"bin_edges": (-math.inf, 0), "depths": (4, 2)}, "finite.*inf"),
        ({"bin_edges": (math.nan,), "depths": (4,)}, "finite.*nan"),
        ({"bin_edges": (500, 0), "depths": (4, 2)}, r"ascending.*\(500, 0\)"),
        ({"bin_edges": (0, 0), "depths": (4, 2)}, "ascending"),
        ({"bin_edges": (0, "1"), "depths": (4, 2)}, "numbers"),
        ({"bin_edges": 0, "depths": (4,)}, "bin_edges is a list"),
        ({"bin_edges": (0,), "depths": 4}, "depths is a list"),
        ({"bin_edges": (0,), "depths": (0,)}, "whole numbers from 1"),
        ({"bin_edges": (0,), "depths": (2.5,)}, "whole numbers from 1"),
        ({"bin_edges": (0,), "depths": (math.nan,)}, "whole numbers from 1"),
        ({"bin_edges": (0,), "depths": (True,)}, "whole numbers from 1"),
        ({"bin_edges": (0,), "depths": (5,), "full": 4}, "from 1 to 4"),
        ({"bin_edges": (0,), "depths": (5,), "full": 0}, "full is a whole number"),
        ({"bin_edges": (0,), "depths": (5,), "full": math.nan}, "full is a whole number"),
        ({"bin_edges": (0,), "depths": (5,), "space": "sigma"}, "'timestep' or 'logsnr'.*'sigma'"),
        ({"preset": "full", "order": "input"}, "'output' or 'middle' or 'exit'.*'input'"),
        ({"preset": "full", "order": None}, "'output' or 'middle' or 'exit'.*None"),
    ],
)
def test_schedule_that_is_none_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExitSchedule(**setting)


def test_schedule_deeper_than_the_model_is_refused() -> None:
    schedule = ExitSchedule(bin_edges=(0, 500), depths=(12, 6))
    with pytest.raises(ConfigError, match=r"up to 12 blocks, but the model has 8.*full=12"):
        schedule.plan(request_of(8, 4))
    assert schedule.plan(request_of(12, 4)).depths.max() == 12
    scaled = ExitSchedule(bin_edges=(0, 500), depths=(12, 6), full=12)
    assert scaled.plan(request_of(8, 4)).depths.tolist() == [4, 4, 8, 8]
