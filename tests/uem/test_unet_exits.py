"""Samples that stop between the up stages of a UNet: who goes on, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import SkipTuning, UncertaintyExit
from fastdiff.backbones import view
from fastdiff.cost import flop_counter
from fastdiff.engine import sampling_run
from fastdiff.errors import ConfigError, ProfileMismatchError
from fastdiff.eval.tasks import make_task
from fastdiff.plan import Action
from fastdiff.uem import ExitReadout, UncertaintyModules, load_modules
from fastdiff.uem.calibration import calibrate
from tiny.stops import BATCH, check_that_stopped_samples_see_no_further_unit, depths_of, rows, run
from tiny.unet_exits import EVERY_MODEL, PIPELINES, batch_of, ending_at, random_modules
from tiny.unet_pipelines import UNET_PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore::fastdiff.errors.FastDiffNoEffectWarning")


def spread_out(denoiser: nn.Module, arguments: dict[str, Any]) -> UncertaintyExit:
    """Returns a method under which a third of the samples would stop at each exit."""
    modules = random_modules(denoiser, arguments)
    found: dict[int, list[float]] = {}
    watching = UncertaintyExit.of(modules).watched(lambda _, column, seen: found.update({column: seen.tolist()}))
    run(denoiser, watching, arguments)
    levels = [sorted(found[column]) for column in sorted(found)]
    thresholds = tuple((level[len(level) // 3 - 1] + level[len(level) // 3]) / 2 for level in levels)
    return UncertaintyExit.of(modules, threshold=0.5, bin_edges=(0,), thresholds=thresholds)


@contextmanager
def counted_rows(denoiser: nn.Module) -> Iterator[list[int]]:
    """Counts the samples that every unit runs for."""
    units = view(denoiser).units
    counts = [0] * len(units)
    handles = []
    for index, unit in enumerate(units):

        def count(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            counts[index] += (args[0] if args else kwargs["hidden_states"]).shape[0]

        handles.append(unit.module.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# -- samples that stop -------------------------------------------------------------------------------------------------


def sample(pipe: Any, name: str, batch: int = 2) -> torch.Tensor:
    """Returns the images of a call."""
    images = pipe(**UNET_PIPELINES[name].inputs(batch=batch)).images
    return torch.as_tensor(np.asarray(images))


def pipeline(name: str) -> tuple[Any, UncertaintyModules]:
    """Returns a tiny pipeline and modules for its UNet."""
    pipe: Any = UNET_PIPELINES[name].build()
    pipe.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}),
        with_kwargs=True,
    )
    sample(pipe, name)
    handle.remove()
    call = {key: value for key, value in calls[0].items() if key != "return_dict"}
    return pipe, random_modules(pipe.unet, call)


@PIPELINES
def test_a_threshold_of_0_is_the_untouched_pipeline(name: str) -> None:
    pipe, modules = pipeline(name)
    expected = sample(pipe, name)
    asked: list[int] = []
    for module in (*modules.uncertainty, *modules.exit_heads):
        module.register_forward_hook(lambda *_: asked.append(1))
    fastdiff.enable(pipe, UncertaintyExit.of(modules, threshold=0))
    assert torch.equal(sample(pipe, name), expected)
    assert pipe.fastdiff.last_run.denoisers["unet"].computed_share == 1
    assert not asked


@EVERY_MODEL
@pytest.mark.parametrize("first", [0, 1])
def test_a_threshold_of_1_runs_nothing_behind_the_first_exit(model: str, first: int) -> None:
    denoiser, arguments = batch_of(model)
    modules = random_modules(denoiser, arguments)
    method = UncertaintyExit.of(modules, threshold=1, exits=tuple(modules.exits[first:]))
    with counted_rows(denoiser) as counts:
        (prediction,), calls = run(denoiser, method, arguments)
    backbone = view(denoiser)
    stop = backbone.names.index(modules.exits[first])
    outputs = len(backbone.outputs)
    assert depths_of(calls) == [stop] * BATCH
    assert counts == [BATCH] * stop + [0] * (len(counts) - stop - outputs) + [BATCH] * outputs
    assert [action == Action.COMPUTE for action in calls[0].actions] == [count > 0 for count in counts]
    expected = ending_at(denoiser, first, modules.exit_heads[first], arguments)
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)


@EVERY_MODEL
def test_fewer_stages_run_at_a_higher_threshold(model: str) -> None:
    denoiser, arguments = batch_of(model)
    modules = spread_out(denoiser, arguments).modules()
    seen = [
        depths_of(run(denoiser, UncertaintyExit.of(modules, threshold=threshold), arguments)[1])
        for threshold in [0.0, *np.linspace(0.3, 0.7, 15), 1.0]
    ]
    assert all((np.diff(np.array(seen), axis=0) <= 0).ravel())
    assert len({tuple(depths) for depths in seen}) > 3


@EVERY_MODEL
def test_a_sample_does_not_depend_on_the_others(model: str) -> None:
    denoiser, arguments = batch_of(model)
    method = spread_out(denoiser, arguments)
    (together,), calls = run(denoiser, method, arguments)
    depths = depths_of(calls)
    assert len(set(depths)) > 2
    for chosen in ([5, 4, 3, 2, 1, 0], [0, 2, 5], [3], [1, 1, 4, 1]):
        (others,), other_calls = run(denoiser, method, rows(arguments, chosen))
        assert depths_of(other_calls) == [depths[index] for index in chosen]
        torch.testing.assert_close(others, together[chosen], rtol=0, atol=1e-5)
    units = view(denoiser).names
    for index, depth in enumerate(depths):  # and is what its exit makes of it
        alone = rows(arguments, [index])
        with torch.no_grad():
            if depth == len(units):
                expected = denoiser(**alone, return_dict=False)[0]
            else:
                stage = method.modules().exits.index(units[depth])
                expected = ending_at(denoiser, stage, method.modules().exit_heads[stage], alone)
        torch.testing.assert_close(together[[index]], expected, rtol=0, atol=1e-5)


@EVERY_MODEL
def test_stages_run_for_the_samples_that_need_them_and_for_no_others(model: str) -> None:
    denoiser, arguments = batch_of(model)
    method = spread_out(denoiser, arguments)
    with counted_rows(denoiser) as counts:
        _, calls = run(denoiser, method, arguments)
    depths, outputs = np.array(depths_of(calls)), view(denoiser).outputs
    assert counts[: outputs.start] == [(depths > column).sum() for column in range(outputs.start)]
    assert counts[outputs.start :] == [BATCH] * len(outputs)
    assert np.array_equal(calls[0].shares, np.array(counts) / BATCH)


def test_a_broken_stage_matters_to_those_who_run_it() -> None:
    denoiser, arguments = batch_of("UNet2DConditionModel (SD)")
    check_that_stopped_samples_see_no_further_unit(denoiser, spread_out(denoiser, arguments), arguments)


def test_decisions_that_come_late_take_effect_at_the_next_stage() -> None:
    denoiser, arguments = batch_of("UNet2DModel (DDPM)")
    modules = random_modules(denoiser, arguments)
    names = view(denoiser).names
    for settings in ({"lookahead": 1}, {"patience": 2}):
        _, calls = run(denoiser, UncertaintyExit.of(modules, threshold=1, **settings), arguments)
        assert depths_of(calls) == [names.index(modules.exits[1])] * BATCH


def controlled(denoiser: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with what a ControlNet would add."""
    skips: list[torch.Tensor] = []
    middle: list[torch.Tensor] = []
    handles = [denoiser.mid_block.register_forward_hook(lambda _, __, output: middle.append(output))]
    for stage in denoiser.up_blocks:

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            skips[:0] = kwargs["res_hidden_states_tuple"]

        handles.append(stage.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        denoiser(**arguments)
    for handle in handles:
        handle.remove()
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(part.shape, generator=draw) for part in (*skips, *middle)]
    names = ("down_block_additional_residuals", "mid_block_additional_residual")
    return {**arguments, **dict(zip(names, (drawn[:-1], drawn[-1]), strict=True))}


def test_what_a_controlnet_adds_is_cut_with_its_samples() -> None:
    denoiser, plain = batch_of("UNet2DConditionModel (SD)")
    arguments = controlled(denoiser, plain)
    method = spread_out(denoiser, arguments)
    (together,), calls = run(denoiser, method, arguments)
    assert len(set(depths_of(calls))) > 2
    for index in range(BATCH):
        alone = rows(arguments, [index])
        alone["down_block_additional_residuals"] = [
            part[[index]] for part in arguments["down_block_additional_residuals"]
        ]
        (expected,), _ = run(denoiser, method, alone)
        torch.testing.assert_close(together[[index]], expected, rtol=0, atol=1e-5)


def test_samples_go_on_where_that_cannot_be_cut() -> None:
    denoiser, plain = batch_of("UNet2DConditionModel (SD)")
    arguments = controlled(denoiser, plain)
    method, tune = spread_out(denoiser, arguments), SkipTuning(rho=0.5, exclude_control=True)
    (expected,), _ = run(denoiser, tune, arguments)
    with torch.no_grad(), sampling_run(denoiser, [tune, method], timesteps=torch.tensor([500.0])) as running:
        found = denoiser(**arguments, return_dict=False)[0]
        running.tick()
    record = running.record.denoisers["denoiser"]
    assert torch.equal(found, expected)
    assert any("ControlNets" in reason for reason in record.fallbacks)


@pytest.mark.parametrize("scope", ["batch_mean", "batch_all"])
def test_a_batch_that_decides_together_stops_together(scope: str) -> None:
    denoiser, arguments = batch_of("UNet2DModel (DDPM)")
    method = spread_out(denoiser, arguments)
    together = method.changed(scope=scope)
    (prediction,), calls = run(denoiser, together, arguments)
    assert len(set(depths_of(calls))) == 1
    assert prediction.shape == arguments["sample"].shape


def test_copies_of_a_sample_in_one_batch_stop_together() -> None:
    denoiser, arguments = batch_of("UNet2DConditionModel (SD)")
    method = spread_out(denoiser, arguments)
    pair = {**arguments, "sample": arguments["sample"][:3].repeat(2, 1, 1, 1)}
    with counted_rows(denoiser) as counts:
        _, calls = run(denoiser, method, pair)
    depths, outputs = depths_of(calls), view(denoiser).outputs
    assert len(depths) == 3
    assert counts[: outputs.start] == [2 * sum(depth > c for depth in depths) for c in range(outputs.start)]
    halves = [run(denoiser, method, rows(pair, [*range(start, start + 3)]))[1] for start in (0, 3)]
    assert all(both >= max(each) for both, *each in zip(depths, *map(depths_of, halves), strict=True))


def test_later_guidance_calls_follow_the_first() -> None:
    denoiser, arguments = batch_of("UNet2DConditionModel (SD)")
    method = spread_out(denoiser, arguments)
    other = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].flip(0) * 3}
    _, calls = run(denoiser, method, arguments, other)
    assert len({call.branch for call in calls}) == 2
    assert depths_of(calls[:1]) == depths_of(calls[1:])


@PIPELINES
def test_the_macs_of_the_record_are_those_that_were_spent(name: str) -> None:
    pipe, modules = pipeline(name)
    fastdiff.enable(pipe, UncertaintyExit.of(modules, threshold=0.5))
    asking: list[float] = []  # what modules and heads cost is no part of the denoiser's price
    for module in (*modules.uncertainty, *modules.exit_heads):
        own = module.forward

        def forward(*args: Any, own: Any = own) -> Any:
            with flop_counter() as counter:
                output = own(*args)
            asking.append(counter.get_total_flops() / 2)
            return output

        module.forward = forward  # type: ignore[method-assign]
    spent: list[float] = []

    def whole(*args: Any, **kwargs: Any) -> Any:
        with flop_counter() as counter:
            output = type(pipe.unet).forward(pipe.unet, *args, **kwargs)
        spent.append(counter.get_total_flops() / 2)
        return output

    pipe.unet.forward = whole
    sample(pipe, name, batch=3)
    del pipe.unet.forward
    record = pipe.fastdiff.last_run.denoisers["unet"]
    assert record.macs_share < 1
    assert record.macs == pytest.approx(sum(spent) - sum(asking), rel=0.01)


def test_two_calls_agree_and_nothing_is_left() -> None:
    pipe, modules = pipeline("StableDiffusionPipeline")
    plain = sample(pipe, "StableDiffusionPipeline", batch=3)
    fastdiff.enable(pipe, UncertaintyExit.of(modules, threshold=0.5))
    first = sample(pipe, "StableDiffusionPipeline", batch=3)
    sample(pipe, "StableDiffusionPipeline", batch=2)
    assert torch.equal(sample(pipe, "StableDiffusionPipeline", batch=3), first)
    assert not torch.equal(first, plain)
    fastdiff.disable(pipe)
    assert torch.equal(sample(pipe, "StableDiffusionPipeline", batch=3), plain)


@pytest.mark.parametrize("budget", [0.7, 1.0])
def test_calibration_meets_a_budget(budget: float) -> None:
    pipe, modules = pipeline("DDPMPipeline")
    method = UncertaintyExit.of(modules)
    settings: dict[str, Any] = {"num_samples": 6, "batch_size": 3, "num_inference_steps": 6, "bins": 2}
    task = make_task(pipe)
    found = calibrate(pipe, method, budget, task=task, **settings, tolerance=0.04, progress=False)
    assert found.share == pytest.approx(budget, abs=0.04)
    assert found.watched.errors.shape == (6, len(modules.exits), 6)
    fastdiff.enable(pipe, found.method)
    shares = []
    for start in (0, 3):
        pipe(**task.arguments(range(start, start + 3)), num_inference_steps=6)
        shares.append(pipe.fastdiff.last_run.denoisers["unet"].macs_share)
    assert np.mean(shares) == pytest.approx(found.share, abs=1e-6)


def test_exits_of_a_unet_are_not_frozen() -> None:
    pipe, modules = pipeline("DDPMPipeline")
    with pytest.raises(ConfigError, match="cannot stop between the stages of a UNet2DModel"):
        calibrate(pipe, UncertaintyExit.of(modules), 0.8, task=make_task(pipe), frozen=True, progress=False)


# -- files -------------------------------------------------------------------------------------------------------------


def test_modules_are_saved_and_belong_to_their_unet(tmp_path: Path) -> None:
    denoiser, arguments = batch_of("UNet2DModel (DDPM)")
    modules = random_modules(denoiser, arguments)
    modules.save_pretrained(tmp_path)
    loaded = load_modules(tmp_path)
    (expected,), _ = run(denoiser, UncertaintyExit.of(modules, threshold=0.5), arguments)
    (again,), _ = run(denoiser, UncertaintyExit(weights=str(tmp_path), threshold=0.5), arguments)
    assert torch.equal(again, expected)
    other, inputs = batch_of("UNet2DModel (resnet sampling)")
    with pytest.raises(ProfileMismatchError, match=r"for UNet2DModel of \d+ units, this denoiser is UNet2DModel of"):
        ExitReadout(other, loaded)
    with pytest.raises(ProfileMismatchError):
        run(other, UncertaintyExit.of(loaded, threshold=0.5), inputs)
