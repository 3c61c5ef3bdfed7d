"""What every method must keep on every backbone: the same images in full, the work planned, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from engine.cases import (
    EVERY_CASE,
    EVERY_KIND,
    EVERY_READING_CASE,
    EVERY_SINGLE_CASE,
    NEUTRAL,
    PIPELINES,
    STEPS,
    UNET_METHODS,
    accelerated,
    build,
    counting_blocks,
    denoiser_calls,
    denoiser_of,
    inputs_of,
    methods_for,
    planned_runs,
    record_of,
    sample,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff import ComputePlan, EncoderPropagation, ExitSchedule, FeatureInheritance, LayerSkipping
from fastdiff.backbones import view
from fastdiff.engine import DenoiserRecord, sampling_run
from fastdiff.engine.kept import transformed
from fastdiff.plan import READS_CACHE

BATCH_TOLERANCE = 1e-4
"""Share of the largest value: float32 sums over a batch may be grouped in another way."""
READ_OUTSIDE_THEIR_BLOCK = {
    "DiTTransformer2DModel": "transformer_blocks.0.norm1.emb",
    "UNet2DConditionModel": ".conv_shortcut",  # carries the fresh input past a residual that is reused
}
"""Parts of blocks, by a part of their weights' names, that are used where the block does not run."""

# -- a full plan is the plain pipeline ---------------------------------------------------------------------------------

SETTINGS_THAT_SKIP_NOTHING: list[Callable[[Sequence[str]], Any]] = [
    lambda units: ExitSchedule("full"),
    lambda units: LayerSkipping(speedup=1),
    lambda units: ComputePlan.full(STEPS, units),
    lambda units: [ExitSchedule("full"), FeatureInheritance(interval=1, order=2)],
]
SETTINGS_FOR_UNETS: list[Callable[[Sequence[str]], Any]] = [
    lambda units: EncoderPropagation(keys=1, prior_noise=0),
    lambda units: ComputePlan.full(STEPS, units),
    lambda units: FeatureInheritance(interval=1, level="branch", keep_up=1),
    lambda units: [EncoderPropagation(keys="uniform-1", prior_noise=0), FeatureInheritance(interval=1, order=2)],
]


@EVERY_KIND
@pytest.mark.parametrize("arguments", [{}, {"guidance": False}, {"batch": 2}], ids=str)
def test_full_plan_is_bitwise_the_plain_pipeline(name: str, arguments: dict[str, Any]) -> None:
    pipe = build(name)
    plain = sample(pipe, name, **arguments)
    for make in SETTINGS_THAT_SKIP_NOTHING if name in PIPELINES else SETTINGS_FOR_UNETS:
        fastdiff.enable(pipe, make(view(denoiser_of(pipe)).names))
        assert torch.equal(sample(pipe, name, **arguments), plain)
        assert len(record_of(pipe).calls) >= STEPS
        assert record_of(pipe).skipped == 0


# -- what runs is what was planned -------------------------------------------------------------------------------------


@EVERY_SINGLE_CASE
def test_blocks_run_exactly_where_the_plan_computes_them(name: str, method: str) -> None:
    pipe = build(name)
    plain = sample(pipe, name)
    methods = methods_for(pipe, method)
    with counting_blocks(pipe, name, methods) as counted:
        fastdiff.enable(pipe, methods)
        sampled = sample(pipe, name)
    assert torch.equal(sampled, plain) == (method in NEUTRAL)
    record = record_of(pipe)
    planned = planned_runs(record)

    assert np.array_equal(counted.table(record.units), planned)
    assert planned.all() == (method in NEUTRAL)
    assert record.skipped == planned.size - planned.sum()
    assert not record.fallbacks
    evaluations = [call.evaluation for call in record.calls]
    assert evaluations == sorted(evaluations)
    assert set(evaluations) == set(range(STEPS))
    assert all(sum(call.branch == branch for call in record.calls) == STEPS for branch in record.branches)


def test_counts_of_a_schedule_worked_out_by_hand() -> None:
    """DDIM's timesteps with 4 steps are 750, 500, 250, 0; 28 blocks of the table are 4 here."""
    pipe = build("DiTPipeline")
    pipe.scheduler.register_to_config(steps_offset=0)
    with counting_blocks(pipe, "DiTPipeline") as counted:
        fastdiff.enable(pipe, ExitSchedule("ase-demo"))
        sample(pipe, "DiTPipeline", steps=4)
    assert pipe.scheduler.timesteps.tolist() == [750, 500, 250, 0]
    assert counted.table(record_of(pipe).units).sum(axis=1).tolist() == [2, 3, 3, 4]  # of 16, 20, 24, 28 blocks


# -- weights matter exactly where their unit runs ----------------------------------------------------------------------


class Enough(Exception):
    """Ends a call whose rest would show nothing."""


@contextmanager
def poisoned(pipe: DiffusionPipeline, units: Callable[[int], Sequence[str]]) -> Iterator[list[torch.Tensor]]:
    """Makes the weights of ``units(call)`` NaN in each call of the denoiser; yields its predictions."""
    predictions: list[torch.Tensor] = []
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    elsewhere = READ_OUTSIDE_THEIR_BLOCK.get(type(denoiser_of(pipe)).__name__, "none")

    def poison(module: nn.Module, *_: Any) -> None:
        for unit in units(len(predictions)):
            weights = module.get_submodule(unit).named_parameters(prefix=unit)
            kept.extend((weight, weight.detach().clone()) for key, weight in weights if elsewhere not in key)
        with torch.no_grad():
            for weight, _ in kept:
                weight.fill_(torch.nan)

    def heal(module: nn.Module, inputs: Any, output: Any) -> None:
        with torch.no_grad():
            while kept:
                weight, value = kept.pop()
                weight.copy_(value)
        predictions.append(output[0] if isinstance(output, tuple) else output.sample)

    handles = [
        denoiser_of(pipe).register_forward_pre_hook(poison),
        denoiser_of(pipe).register_forward_hook(heal),
    ]
    try:
        yield predictions
    finally:
        for handle in handles:
            handle.remove()


@EVERY_SINGLE_CASE
def test_weights_of_units_that_do_not_run_do_not_matter(name: str, method: str) -> None:
    pipe = accelerated(name, method)
    clean = sample(pipe, name)
    units, runs = record_of(pipe).units, planned_runs(record_of(pipe))

    with poisoned(pipe, lambda call: [unit for unit, ran in zip(units, runs[call], strict=True) if not ran]):
        assert torch.equal(sample(pipe, name), clean)
    assert torch.isfinite(clean).all()
    assert torch.equal(sample(pipe, name), clean)


@EVERY_SINGLE_CASE
def test_weights_of_units_that_run_matter(name: str, method: str) -> None:
    """All cells of the mixed plan on DiT; elsewhere one evaluation for each unit, later ones for later units.

    Of UNets, which have many, a dozen units.
    """
    pipe = accelerated(name, method)
    sample(pipe, name)
    units, runs = record_of(pipe).units, planned_runs(record_of(pipe))
    cells = [(unit, np.flatnonzero(runs[:, column])) for column, unit in enumerate(units)]
    if method in UNET_METHODS:
        cells = cells[:: len(cells) // 12]
    if (name, method) != ("DiTPipeline", "saved-plan"):
        cells = [(unit, calls[[column % len(calls)]]) for column, (unit, calls) in enumerate(cells) if len(calls)]

    for unit, calls in cells:
        for poisoned_call in calls:
            seen = 0

            def stop(module: nn.Module, inputs: Any, output: Any, last: int = poisoned_call) -> None:
                nonlocal seen
                seen += 1
                if seen > last:
                    raise Enough

            with poisoned(pipe, lambda call, at=poisoned_call, unit=unit: [unit] if call == at else []) as predictions:
                handle = denoiser_of(pipe).register_forward_hook(stop)
                with pytest.raises(Enough):
                    sample(pipe, name)
                handle.remove()
            finite = [bool(torch.isfinite(prediction).all()) for prediction in predictions]
            assert finite == [True] * poisoned_call + [False], f"{unit} in call {poisoned_call}"


# -- kept residuals matter exactly where the plan reuses them ----------------------------------------------------------


class Replay:
    """Evaluations with inputs taken from a plain call, so that they depend on each other by what is kept alone."""

    def __init__(self, name: str, method: str) -> None:
        pipe = build(name)
        calls = denoiser_calls(pipe, name)
        branches = len(calls) // STEPS
        self.evaluations = [calls[row * branches : (row + 1) * branches] for row in range(STEPS)]
        self.denoiser = denoiser_of(pipe)
        self.timesteps = pipe.scheduler.timesteps
        self.methods = methods_for(pipe, method)

    @torch.no_grad()
    def run(self, after: Callable[[int, Any], None]) -> tuple[list[list[torch.Tensor]], DenoiserRecord]:
        """Returns each evaluation's predictions by branch; ``after(row, branches)`` sees what is kept."""
        predictions = []
        with sampling_run(self.denoiser, self.methods, timesteps=self.timesteps) as run:
            for row, calls in enumerate(self.evaluations):
                predictions.append([self.denoiser(**call, return_dict=False)[0] for call in calls])
                after(row, run._executors["denoiser"]._branches)
                run.tick()
        return predictions, run.record.denoisers["denoiser"]


def each_residual(row: int, branches: Any) -> Iterator[tuple[Any, Any]]:
    """Yields a name of each residual that this row wrote, and the residual."""
    for number, state in enumerate(branches.values()):
        for key, residual in state.kept.items():
            if key.row == row:
                yield (number, key), residual


@EVERY_READING_CASE
def test_kept_residuals_matter_exactly_where_the_plan_reads_them(name: str, method: str) -> None:
    """All of them on DiT, every third elsewhere."""
    replay = Replay(name, method)
    clean: dict[Any, Any] = {}
    _, record = replay.run(lambda row, kept: clean.update({k: r.value for k, r in each_residual(row, kept)}))
    (plan,) = record.plans
    readers: dict[tuple[int, int], set[int]] = {}
    for row, column in np.argwhere(np.isin(plan.table, READS_CACHE)):
        for source in plan.sources(row, column):
            readers.setdefault((source, int(column)), set()).add(int(row))
    assert readers
    assert {key.row for _, key in clean} == {source for source, _ in readers}

    cells = list(readers.items())
    for (source, column), rows in cells if name == "DiTPipeline" else cells[::3]:

        def poison(row: int, kept: Any, source: int = source, column: int = column) -> None:
            for (branch, key), residual in each_residual(row, kept):
                is_it = branch == 0 and row == source and key.run.first <= column <= key.run.last
                value = clean[branch, key]
                residual.value = transformed(lambda tensor: tensor * torch.nan, value) if is_it else value

        predictions, _ = replay.run(poison)
        changed = {
            (row, branch)
            for row, by_branch in enumerate(predictions)
            for branch, prediction in enumerate(by_branch)
            if not torch.isfinite(prediction).all()
        }
        assert changed == {(row, 0) for row in rows}, f"unit {column} as row {source} computed it"


# -- the price is the counted price ------------------------------------------------------------------------------------


def denoiser_flops(pipe: DiffusionPipeline, name: str) -> int:
    """Counts a call's FLOPs inside the denoiser, with attention made of matrix products that torch can count."""
    counter = FlopCounterMode(display=False)
    readings: list[int] = []
    inside: list[bool] = []  # a call that makes several evaluations at once is a call within a call

    def enter(*_: Any) -> None:
        inside.append(True)
        if len(inside) == 1:
            readings.append(-counter.get_total_flops())

    def leave(*_: Any) -> None:
        inside.pop()
        if not inside:
            readings.append(counter.get_total_flops())

    handles = [denoiser_of(pipe).register_forward_pre_hook(enter), denoiser_of(pipe).register_forward_hook(leave)]
    with counter, sdpa_kernel(SDPBackend.MATH):
        sample(pipe, name)
    for handle in handles:
        handle.remove()
    return sum(readings)


@functools.cache
def plain_flops(name: str) -> int:
    return denoiser_flops(build(name), name)


@EVERY_CASE
def test_price_is_what_is_counted(name: str, method: str) -> None:
    pipe = accelerated(name, method)
    share = denoiser_flops(pipe, name) / plain_flops(name)
    record = record_of(pipe)
    costs = record.measure()

    assert share == pytest.approx(record.macs_share, rel=0.01)
    assert share == pytest.approx(record.plans[0].cost(costs).macs_share, rel=0.01)
    assert plain_flops(name) / 2 == pytest.approx(costs.total_macs * len(record.calls), rel=0.01)
    assert (share < 0.99) == (method not in NEUTRAL)


# -- a batch is its items ----------------------------------------------------------------------------------------------


def item(arguments: dict[str, Any], index: int) -> dict[str, Any]:
    """Returns the arguments of one item of a batch."""

    def cut(value: Any) -> Any:
        is_batch = isinstance(value, (torch.Tensor, list)) and len(value) == 2
        return value[index : index + 1] if is_batch else value

    return {key: cut(value) if key != "batch_size" else 1 for key, value in arguments.items()}


@EVERY_CASE
def test_batch_is_its_items_one_by_one(name: str, method: str) -> None:
    pipe = accelerated(name, method)

    def arguments() -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        return inputs_of(name, batch=2, generator=generators)

    both = torch.as_tensor(np.asarray(pipe(**arguments(), return_dict=False)[0]))
    alone = [pipe(**item(arguments(), index), return_dict=False)[0] for index in (0, 1)]
    one_by_one = torch.cat([torch.as_tensor(np.asarray(sampled)) for sampled in alone])
    assert not torch.allclose(both[0], both[1], rtol=0, atol=0.01 * float(both.abs().max()))
    assert torch.allclose(both, one_by_one, rtol=0, atol=BATCH_TOLERANCE * float(both.abs().max()))
