"""Samples that stop where a module finds the prediction good enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.cases import PIPELINES, build, denoiser_of, inputs_of, sample
from torch import nn

import fastdiff
from fastdiff import FastDiffPipeline, UncertaintyExit
from fastdiff.backbones import view
from fastdiff.cost import flop_counter
from fastdiff.engine import sampling_run
from fastdiff.errors import ConfigError, ProfileMismatchError
from fastdiff.methods import Method
from fastdiff.plan import Action
from fastdiff.spec import format_method, parse_method
from fastdiff.uem import UncertaintyModules
from tiny.models import TINY_MODELS
from tiny.stops import BATCH, check_that_stopped_samples_see_no_further_unit, depths_of, rows, run
from tiny.uncertainty import random_modules

pytestmark = pytest.mark.filterwarnings("ignore::fastdiff.errors.FastDiffNoEffectWarning")

SPREADING = 0.5
"""A threshold at which samples of the random modules stop on most pipelines."""
DIRECT = ("DiTTransformer2DModel", "UViT", "SD3Transformer2DModel", "PixArtTransformer2DModel")


def batch_of(model: str, batch: int = BATCH) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a tiny denoiser and arguments of one call."""
    tiny = TINY_MODELS[model]
    arguments = tiny.inputs(batch, 0)
    timestep = torch.full_like(arguments["timestep"], 500)
    return tiny.build(), {**arguments, "timestep": timestep}


def spread_out(denoiser: nn.Module, arguments: dict[str, Any], **settings: Any) -> UncertaintyExit:
    """Returns a method under which the samples stop at different units."""
    modules = random_modules(denoiser, **settings)
    methods = [UncertaintyExit.of(modules, threshold=float(threshold)) for threshold in np.linspace(0.3, 0.7, 21)]
    return max(methods, key=lambda method: len({*depths_of(run(denoiser, method, arguments)[1])}))


@contextmanager
def counted_rows(denoiser: nn.Module) -> Iterator[list[int]]:
    """Counts the samples that every unit runs for."""
    units = view(denoiser).units
    counts = [0] * len(units)
    handles = []
    for index, unit in enumerate(units):
        own, io = unit.module.forward, unit.io
        assert io is not None

        def forward(*args: Any, index: int = index, own: Any = own, io: Any = io, **kwargs: Any) -> Any:
            counts[index] += io.read(args, kwargs)[0].shape[0]
            return own(*args, **kwargs)

        unit.module.forward = forward  # type: ignore[method-assign]
        handles.append(unit.module)
    try:
        yield counts
    finally:
        for module in handles:
            del module.__dict__["forward"]


# -- thresholds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_threshold_of_0_is_the_untouched_pipeline(name: str) -> None:
    pipe = build(name)
    expected = sample(pipe, name)
    modules = random_modules(denoiser_of(pipe))
    asked: list[int] = []
    for module in modules.uncertainty:
        module.register_forward_hook(lambda *_: asked.append(1))
    fastdiff.enable(pipe, UncertaintyExit.of(modules, threshold=0))
    assert torch.equal(sample(pipe, name), expected)
    (record,) = pipe.fastdiff.last_run.denoisers.values()
    assert record.computed_share == 1
    assert not asked


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(("settings", "units"), [({}, 1), ({"patience": 2}, 2), ({"lookahead": 1}, 2)])
def test_a_threshold_of_1_runs_as_few_units_as_it_can(name: str, settings: dict[str, int], units: int) -> None:
    pipe = build(name)
    fastdiff.enable(pipe, UncertaintyExit.of(random_modules(denoiser_of(pipe)), threshold=1, **settings))
    sample(pipe, name)
    (record,) = pipe.fastdiff.last_run.denoisers.values()
    for call in record.calls:
        assert call.depths is not None
        assert set(call.depths.tolist()) == {units}
        assert [*call.actions[:units]] == [Action.COMPUTE] * units
        assert set(call.actions[units:]) == {Action.EXIT}


@pytest.mark.parametrize("model", DIRECT)
def test_fewer_units_run_at_a_higher_threshold(model: str) -> None:
    denoiser, arguments = batch_of(model)
    modules = random_modules(denoiser)
    seen = [
        depths_of(run(denoiser, UncertaintyExit.of(modules, threshold=threshold), arguments)[1])
        for threshold in [0.0, *np.linspace(0.4, 0.6, 21), 1.0]
    ]
    assert all((np.diff(np.array(seen), axis=0) <= 0).ravel())
    assert len({tuple(depths) for depths in seen}) > 3


def test_an_uncertainty_equal_to_the_threshold_is_not_below_it() -> None:
    denoiser, arguments = batch_of("DiTTransformer2DModel")
    modules = random_modules(denoiser)
    for module in modules.uncertainty:
        nn.init.zeros_(module.probe.weight)  # sigmoid(0) is exactly one half
    units = len(view(denoiser).units)
    at, above = (run(denoiser, UncertaintyExit.of(modules, threshold=t), arguments)[1] for t in (0.5, 0.50001))
    assert depths_of(at) == [units] * BATCH
    assert depths_of(above) == [1] * BATCH


def test_thresholds_of_bins_and_exits() -> None:
    denoiser, arguments = batch_of("DiTTransformer2DModel")
    modules = random_modules(denoiser)
    exits = len(modules.exits)
    # Early timesteps stop before the last unit, late ones before the second.
    late, early = [1.0, *[0.0] * (exits - 1)], [*[0.0] * (exits - 1), 1.0]
    method = UncertaintyExit.of(modules, bin_edges=(0, 600), thresholds=(*early, *late))
    with torch.no_grad(), sampling_run(denoiser, method, timesteps=torch.tensor([900.0, 600.0, 599.0, 10.0])) as run:
        for timestep in (900, 600, 599, 10):
            denoiser(**{**arguments, "timestep": torch.full((BATCH,), timestep)})
            run.tick()
    assert [depths_of([call])[0] for call in run.record.denoisers["denoiser"].calls] == [1, 1, exits, exits]


def test_only_the_chosen_exits_are_asked() -> None:
    denoiser, arguments = batch_of("DiTTransformer2DModel")
    method = UncertaintyExit.of(random_modules(denoiser), threshold=1, exits=("transformer_blocks.3",))
    assert depths_of(run(denoiser, method, arguments)[1]) == [3] * BATCH


# -- sample by sample --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["shared", "per_exit_norm", "per_exit"])
@pytest.mark.parametrize("model", DIRECT)
@pytest.mark.parametrize("chosen", [[5, 4, 3, 2, 1, 0], [0, 2, 5], [3], [1, 1, 4, 1]])
def test_a_sample_does_not_depend_on_the_others(model: str, heads: str, chosen: list[int]) -> None:
    denoiser, arguments = batch_of(model)
    method = spread_out(denoiser, arguments, heads=heads)
    (together,), calls = run(denoiser, method, arguments)
    (others,), other_calls = run(denoiser, method, rows(arguments, chosen))
    depths = depths_of(calls)
    assert len(set(depths)) > 1
    assert depths_of(other_calls) == [depths[index] for index in chosen]
    torch.testing.assert_close(others, together[chosen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", DIRECT)
def test_units_run_for_the_samples_that_need_them_and_for_no_others(model: str) -> None:
    denoiser, arguments = batch_of(model)
    method = spread_out(denoiser, arguments)
    with counted_rows(denoiser) as counts:
        _, calls = run(denoiser, method, arguments)
    depths = np.array(depths_of(calls))
    assert counts == [(depths > column).sum() for column in range(len(counts))]
    assert sum(counts) == depths.sum()


@pytest.mark.parametrize("model", DIRECT)
def test_a_broken_unit_matters_to_those_who_run_it(model: str) -> None:
    denoiser, arguments = batch_of(model)
    check_that_stopped_samples_see_no_further_unit(denoiser, spread_out(denoiser, arguments), arguments)


def test_what_is_added_between_blocks_is_not_lost() -> None:
    denoiser, arguments = batch_of("SD3Transformer2DModel")
    method = spread_out(denoiser, arguments)
    tokens = (arguments["hidden_states"].shape[-1] // denoiser.config.patch_size) ** 2
    width = denoiser.inner_dim
    draw = torch.Generator().manual_seed(0)
    control = [torch.randn(BATCH, tokens, width, generator=draw) for _ in range(2)]

    def controlled(chosen: list[int]) -> dict[str, Any]:
        return {**rows(arguments, chosen), "block_controlnet_hidden_states": [part[chosen] for part in control]}

    # Calls without control come first: that blocks follow each other directly there says nothing of the others.
    everyone = [*range(BATCH)]
    (_, together), calls = run(denoiser, method, arguments, controlled(everyone))
    assert len({*depths_of(calls)}) > 1
    for index in everyone:
        (_, alone), _ = run(denoiser, method, rows(arguments, [index]), controlled([index]))
        torch.testing.assert_close(alone, together[[index]], rtol=0, atol=1e-5)


def test_a_batch_that_decides_together_stops_together() -> None:
    denoiser, arguments = batch_of("DiTTransformer2DModel")
    method = spread_out(denoiser, arguments)
    alone = depths_of(run(denoiser, method, arguments)[1])
    seen = {}
    for scope in ("batch_mean", "batch_all"):
        together = UncertaintyExit.of(method.modules(), threshold=method.threshold, scope=scope)
        depths = depths_of(run(denoiser, together, arguments)[1])
        assert len(set(depths)) == 1
        seen[scope] = depths[0]
        # What a sample gets depends on who else is there.
        by_itself = [depths_of(run(denoiser, together, rows(arguments, [index]))[1])[0] for index in range(BATCH)]
        assert by_itself == alone
    assert seen["batch_all"] >= max(alone)
    assert min(alone) <= seen["batch_mean"] <= seen["batch_all"]


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_copies_of_a_sample_in_one_batch_stop_together() -> None:
    denoiser, arguments = batch_of("DiTTransformer2DModel")
    method = spread_out(denoiser, arguments)
    pair = {**arguments, "hidden_states": arguments["hidden_states"][:3].repeat(2, 1, 1, 1)}
    with counted_rows(denoiser) as counts:
        _, calls = run(denoiser, method, pair)
    depths = depths_of(calls)
    assert len(depths) == 3
    assert counts == [2 * sum(depth > column for depth in depths) for column in range(len(counts))]
    halves = [run(denoiser, method, rows(pair, [*range(start, start + 3)]))[1] for start in (0, 3)]
    # The larger uncertainty counts, so that neither would have run longer alone.
    assert all(both >= max(each) for both, *each in zip(depths, *map(depths_of, halves), strict=True))


def test_later_guidance_calls_follow_the_first() -> None:
    denoiser, arguments = batch_of("DiTTransformer2DModel")
    method = spread_out(denoiser, arguments)
    other = {**arguments, "class_labels": (arguments["class_labels"] + 1) % 5}
    _, calls = run(denoiser, method, arguments, other)
    _, alone = run(denoiser, method, other)
    assert len({call.branch for call in calls}) == 2
    assert depths_of(calls[:1]) == depths_of(calls[1:]) != depths_of(alone)


# -- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_the_macs_of_the_record_are_those_that_were_spent(name: str) -> None:
    pipe = build(name)
    denoiser = denoiser_of(pipe)
    modules = random_modules(denoiser)
    fastdiff.enable(pipe, UncertaintyExit.of(modules, threshold=SPREADING))
    asking: list[int] = []  # what the modules cost is no part of the denoiser's price
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda own, args, _: asking.append(args[0].numel() * own.out_features))
    spent: list[float] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        with flop_counter() as counter:
            output = type(denoiser).forward(denoiser, *args, **kwargs)
        spent.append(counter.get_total_flops() / 2)
        return output

    denoiser.forward = forward
    sample(pipe, name, batch=3)
    del denoiser.forward
    (record,) = pipe.fastdiff.last_run.denoisers.values()
    assert record.macs_share < 1
    assert record.macs == pytest.approx(sum(spent) - sum(asking), rel=0.01)


def test_without_effect_there_is_a_warning() -> None:
    pipe = build("DiTPipeline")
    modules = random_modules(pipe.transformer)
    fastdiff.enable(pipe, UncertaintyExit.of(modules, threshold=0.0001))
    with pytest.warns(fastdiff.FastDiffNoEffectWarning, match="no sample was certain enough to stop"):
        sample(pipe, "DiTPipeline")


def test_two_calls_agree() -> None:
    pipe = build("DiTPipeline")
    fastdiff.enable(pipe, UncertaintyExit.of(random_modules(pipe.transformer), threshold=SPREADING))
    first = sample(pipe, "DiTPipeline", batch=3)
    sample(pipe, "DiTPipeline", batch=2)
    assert torch.equal(sample(pipe, "DiTPipeline", batch=3), first)


# -- files and mistakes ------------------------------------------------------------------------------------------------


def test_modules_travel_with_the_pipeline(tmp_path: Path) -> None:
    pipe = build("DiTPipeline")
    random_modules(pipe.transformer, heads="per_exit").save_pretrained(tmp_path / "trained")
    fastdiff.enable(pipe, UncertaintyExit(weights=str(tmp_path / "trained"), threshold=SPREADING, patience=2))
    expected = sample(pipe, "DiTPipeline")
    pipe.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved/fastdiff_config.json").read_text()
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    loaded = FastDiffPipeline.from_pretrained(tmp_path / "elsewhere")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, "DiTPipeline"), expected)
    again = FastDiffPipeline.from_pretrained(tmp_path / "elsewhere", methods=[UncertaintyExit(SPREADING, patience=2)])
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again, "DiTPipeline"), expected)


def test_without_modules_the_error_says_how_to_get_some() -> None:
    pipe = fastdiff.enable(build("DiTPipeline"), UncertaintyExit())
    with pytest.raises(ConfigError, match=r"needs trained modules.*train-uem"):
        pipe(**inputs_of("DiTPipeline"))


def test_modules_of_another_denoiser_are_refused() -> None:
    pipe = build("DiTPipeline")
    modules = UncertaintyModules("DiTTransformer2DModel", 28, ["transformer_blocks.1"], 32, 16)
    fastdiff.enable(pipe, UncertaintyExit.of(modules))
    with pytest.raises(ProfileMismatchError, match=r"for DiTTransformer2DModel of 28 units, this denoiser is .* of 4"):
        pipe(**inputs_of("DiTPipeline"))


@pytest.mark.parametrize("damage", ["nothing", "config", "weights"])
def test_damaged_modules_are_a_typed_error(damage: str, tmp_path: Path) -> None:
    denoiser = build("DiTPipeline").transformer
    if damage != "nothing":
        random_modules(denoiser).save_pretrained(tmp_path)
        file = next(tmp_path.glob("*.json" if damage == "config" else "*.safetensors"))
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ConfigError, match="holds no uncertainty modules"):
        UncertaintyExit(weights=str(tmp_path)).modules()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": 1.5}, "threshold is a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold is a number"),
        ({"patience": 0}, "patience is a whole number from 1"),
        ({"lookahead": -1}, "lookahead is a whole number from 0"),
        ({"scope": "everyone"}, "scope is one of 'per_sample'"),
        ({"thresholds": (0.1,)}, "thresholds have one number for every exit in every bin"),
        ({"bin_edges": (5, 0), "thresholds": (0.1, 0.1)}, "bin_edges increase"),
        ({"bin_edges": (0,), "thresholds": (1.1,)}, r"thresholds lie in \[0, 1\]"),
    ],
)
def test_values_that_are_not_allowed(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        UncertaintyExit(**settings)


def test_exits_and_thresholds_have_to_fit_the_modules() -> None:
    denoiser, arguments = batch_of("DiTTransformer2DModel")
    modules = random_modules(denoiser)
    with pytest.raises(ConfigError, match=r"know the exits transformer_blocks.1, .*got transformer_blocks.9"):
        run(denoiser, UncertaintyExit.of(modules, exits=("transformer_blocks.9",)), arguments)
    with pytest.raises(ConfigError, match=r"each of 1 bins and \d+ exits; got 1"):
        run(denoiser, UncertaintyExit.of(modules, bin_edges=(0,), thresholds=(0.5,)), arguments)


def test_it_can_be_named_on_the_command_line() -> None:
    method = UncertaintyExit(0.1, weights="trained", scope="batch_all", patience=2, bin_edges=(0.0,), thresholds=(0.5,))
    assert parse_method(format_method(method)) == method
    assert Method.from_dict(method.to_dict()) == method
