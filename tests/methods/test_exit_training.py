"""The forward that exit schedules are trained with, and trained exit heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff import ConfigError, ExitSchedule, UnsupportedBackboneError
from fastdiff.backbones import view
from fastdiff.engine.heads import ExitHeads
from fastdiff.methods.exit_schedule import exit_at_depths
from tiny.models import TINY_MODELS
from tiny.sampling import accelerate, calls_at, counting, evaluate, traces, without

NAMES = [
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "LuminaNextDiT2DModel",
    "PixArtTransformer2DModel",
    "UViT",
    "SD3Transformer2DModel",
]
MODELS = pytest.mark.parametrize("name", NAMES)
TIMESTEPS = (900, 500, 100, 700)
SCHEDULE = ExitSchedule(bin_edges=(0, 300, 600, 800), depths=(4, 3, 2, 1), full=4)


def left_out(model: nn.Module, depth: int) -> list[str]:
    """The units that do not run at a depth: in a U-ViT, none that merges a long skip."""
    return [unit.name for unit in view(model).units if not unit.merges_skip][depth:]


def mixed_batch(name: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Four samples at four timesteps, and each one's depth."""
    tiny = TINY_MODELS[name]
    inputs = tiny.inputs(4, 0)
    unit = 1000 if inputs[tiny.timestep].max() <= 1 else 1
    inputs[tiny.timestep] = torch.tensor(TIMESTEPS, dtype=torch.float32) / unit
    return inputs, torch.tensor(SCHEDULE.depths_for(view(tiny.build()), np.array(TIMESTEPS)))


def sample_of(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        return value[index : index + 1] if isinstance(value, torch.Tensor) and len(value) == 4 else value

    return {name: cut(value) for name, value in inputs.items()}


# -- per-sample depths -------------------------------------------------------------------------------------------------


@MODELS
def test_training_forward_is_the_sampling_forward_of_each_sample(name: str) -> None:
    model = TINY_MODELS[name].build()
    inputs, depths = mixed_batch(name)
    with torch.no_grad(), exit_at_depths(model, depths):
        trained = model(**inputs, return_dict=False)[0]
    descending = sorted(TIMESTEPS, reverse=True)
    for index, timestep in enumerate(TIMESTEPS):
        sample = sample_of(inputs, index)
        kind = TINY_MODELS[name].timestep
        unit = timestep / sample[kind]
        calls = [sample | {kind: other / unit} for other in descending]
        outputs, record = accelerate(model, calls, SCHEDULE, descending)
        row = descending.index(timestep)
        units = len(view(model).units)
        assert record.denoisers["denoiser"].plan.depths[row] == units - len(left_out(model, depths[index]))
        assert torch.allclose(trained[index], outputs[row][0][0], rtol=0, atol=2e-6)
        full = evaluate(model, [sample])[0][0][0]
        assert torch.allclose(trained[index], full, atol=1e-3) == (timestep < 300)


@pytest.mark.parametrize("name", NAMES[:-1])  # whose last block is of another kind
def test_gradients_are_those_of_the_truncated_networks(name: str) -> None:
    model = TINY_MODELS[name].build()
    inputs, depths = mixed_batch(name)
    with exit_at_depths(model, depths):
        model(**inputs, return_dict=False)[0].square().sum().backward()

    expected: dict[str, torch.Tensor] = {}
    for index, depth in enumerate(depths.tolist()):
        smaller = without(TINY_MODELS[name].build(), left_out(model, depth))
        smaller(**sample_of(inputs, index), return_dict=False)[0].square().sum().backward()
        for path, parameter in smaller.named_parameters():
            if parameter.grad is not None:
                expected[path] = expected.get(path, 0) + parameter.grad
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for path, parameter in model.named_parameters():
        if path in expected:
            assert torch.allclose(parameter.grad, expected[path], rtol=1e-4, atol=1e-6 * largest), path
        else:
            assert parameter.grad is None or not parameter.grad.any()


@MODELS
def test_blocks_beyond_a_samples_depth_get_no_gradient_from_it(name: str) -> None:
    inputs, depths = mixed_batch(name)
    for index, depth in enumerate(depths.tolist()):
        model = TINY_MODELS[name].build()
        with exit_at_depths(model, depths):
            model(**inputs, return_dict=False)[0][index].square().sum().backward()
        gone = left_out(model, depth)
        for unit in view(model).units:
            gradients = [float(p.grad.abs().max()) for p in unit.module.parameters() if p.grad is not None]
            assert (max(gradients, default=0.0) > 0) == (unit.name not in gone), unit.name


def test_blocks_run_for_the_samples_that_need_them() -> None:
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    inputs, _ = mixed_batch("DiTTransformer2DModel")
    rows: list[int] = []
    for block in model.transformer_blocks:
        block.ff.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for depths, expected in (
        ([1, 3, 4, 2], [4, 3, 2, 1]),
        ([2, 2, 2, 2], [4, 4]),
        ([1, 1, 4, 1], [4, 1, 1, 1]),
        ([9, 9, 9, 9], [4, 4, 4, 4]),
    ):
        rows.clear()
        with torch.no_grad(), exit_at_depths(model, torch.tensor(depths)):
            model(**inputs)
        assert rows == expected


@pytest.mark.parametrize(("name", "depths"), [("DiTTransformer2DModel", range(1, 5)), ("UViT", range(4, 8))])
def test_equal_depths_are_bitwise_the_network_of_that_depth(name: str, depths: range) -> None:
    model = TINY_MODELS[name].build()
    inputs, _ = mixed_batch(name)
    for depth in depths:
        with torch.no_grad(), exit_at_depths(model, torch.full((4,), depth)):
            output = model(**inputs, return_dict=False)[0]
        smaller = without(TINY_MODELS[name].build(), left_out(model, depth))
        assert torch.equal(output, evaluate(smaller, [inputs])[0][0])


def test_hooks_go_even_when_the_forward_fails() -> None:
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    inputs, depths = mixed_batch("DiTTransformer2DModel")
    plain = evaluate(model, [inputs])[0][0]
    with pytest.raises(KeyError, match="training"), exit_at_depths(model, depths):
        raise KeyError("training")
    with pytest.raises(RuntimeError), exit_at_depths(model, depths):
        model(**inputs | {"hidden_states": torch.zeros(4, 3, 8, 8)})
    assert traces(model) == []
    assert torch.equal(evaluate(model, [inputs])[0][0], plain)


@pytest.mark.parametrize("depths", [torch.tensor([1, 0]), torch.tensor([[1, 2]]), torch.tensor(3), torch.tensor([-1])])
def test_depths_that_are_none_are_refused(depths: torch.Tensor) -> None:
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    with pytest.raises(ConfigError, match="at least 1 for each sample"), exit_at_depths(model, depths):
        pass
    assert traces(model) == []


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "ErnieImageTransformer2DModel"])
def test_depths_that_are_not_one_for_each_sample_are_refused(name: str) -> None:
    if name not in TINY_MODELS:
        pytest.skip("needs a newer diffusers")
    model = TINY_MODELS[name].build()
    # Ernie's streams count tokens first: to cut samples out of them would cut tokens.
    number = 2 if name == "DiTTransformer2DModel" else 4
    inputs = TINY_MODELS[name].inputs(4, 0)
    with pytest.raises(ConfigError, match=f"{number} depths"), exit_at_depths(model, torch.ones(number)):
        model(**inputs)
    assert traces(model) == []


def test_denoiser_without_known_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedBackboneError, match="Linear"), exit_at_depths(nn.Linear(2, 2), torch.tensor([1])):
        pass


# -- exit heads --------------------------------------------------------------------------------------------------------

TABLE = {"bin_edges": (0, 300, 600), "depths": (4, 3, 2)}
CALL_TIMESTEPS = (900, 500, 100)


@pytest.fixture
def heads() -> ExitHeads:
    return ExitHeads(["transformer_blocks.2", "transformer_blocks.3"], width=32, rank=4)


def trained(heads: ExitHeads) -> ExitHeads:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return heads


def predictions(model: nn.Module, schedule: ExitSchedule) -> list[torch.Tensor]:
    calls = calls_at(TINY_MODELS["DiTTransformer2DModel"], CALL_TIMESTEPS)
    return [output[0] for output in accelerate(model, calls, schedule, CALL_TIMESTEPS)[0]]


def test_untrained_heads_change_nothing(tmp_path: Path, heads: ExitHeads) -> None:
    heads.save_pretrained(tmp_path)
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    plain = predictions(model, ExitSchedule(**TABLE))
    headed = predictions(model, ExitSchedule(**TABLE, heads=str(tmp_path)))
    assert all(map(torch.equal, plain, headed))


def test_trained_heads_read_the_hidden_state_at_the_exit(tmp_path: Path, heads: ExitHeads) -> None:
    trained(heads).save_pretrained(tmp_path)
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    plain = predictions(model, ExitSchedule(**TABLE))
    headed = predictions(model, ExitSchedule(**TABLE, heads=str(tmp_path)))

    assert [torch.equal(a, b) for a, b in zip(plain, headed, strict=True)] == [False, False, True]
    calls = calls_at(TINY_MODELS["DiTTransformer2DModel"], CALL_TIMESTEPS)
    for depth, call, output in zip((2, 3), calls, headed, strict=False):
        smaller = without(TINY_MODELS["DiTTransformer2DModel"].build(), view(model).names[depth:])
        head = heads.by_unit()[f"transformer_blocks.{depth}"]
        smaller.transformer_blocks[-1].register_forward_hook(lambda _, __, hidden, head=head: head(hidden))
        assert torch.equal(output, evaluate(smaller, [call])[0][0])


def test_heads_of_other_exits_are_not_used(tmp_path: Path) -> None:
    trained(ExitHeads(["transformer_blocks.1"], width=32, rank=4)).save_pretrained(tmp_path)
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    headed = predictions(model, ExitSchedule(**TABLE, heads=str(tmp_path)))
    assert all(map(torch.equal, predictions(model, ExitSchedule(**TABLE)), headed))


def test_heads_run_once_in_each_row_that_exits(tmp_path: Path, heads: ExitHeads) -> None:
    heads.save_pretrained(tmp_path)
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    schedule = ExitSchedule(**TABLE, heads=str(tmp_path))
    calls: list[str] = []
    for unit, head in schedule.exit_heads().items():
        head.register_forward_hook(lambda *_, unit=unit: calls.append(unit))
    names = view(model).names
    inputs = calls_at(TINY_MODELS["DiTTransformer2DModel"], CALL_TIMESTEPS)
    with counting(model, names, inputs[0]) as counted:
        accelerate(model, inputs, schedule, CALL_TIMESTEPS)
    assert calls == ["transformer_blocks.2", "transformer_blocks.3"]
    assert counted.table(names).sum(axis=1).tolist() == [2, 3, 4]


def test_schedule_with_heads_is_saved_by_its_folder(tmp_path: Path, heads: ExitHeads) -> None:
    heads.save_pretrained(tmp_path)
    schedule = ExitSchedule(**TABLE, heads=tmp_path)  # type: ignore[arg-type]
    schedule.exit_heads()
    assert schedule == ExitSchedule(**TABLE, heads=str(tmp_path))
    again = ExitSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert again.exit_heads().keys() == schedule.exit_heads().keys()
    assert str(tmp_path) in str(ExitSchedule("ase-demo", heads=str(tmp_path)))


@pytest.mark.parametrize("defect", ["missing", "empty", "other model", "weights", "no weights", "pickle", "config"])
def test_folder_that_holds_no_heads_is_refused(tmp_path: Path, heads: ExitHeads, defect: str) -> None:
    folder = tmp_path / "heads"
    if defect == "empty":
        folder.mkdir()
    elif defect == "other model":
        TINY_MODELS["DiTTransformer2DModel"].build().save_pretrained(folder)
    elif defect == "pickle":
        heads.save_pretrained(folder, safe_serialization=False)
    elif defect != "missing":
        heads.save_pretrained(folder)
        weights = folder / "diffusion_pytorch_model.safetensors"
        if defect == "weights":
            weights.write_bytes(b"broken")
        elif defect == "no weights":
            weights.unlink()
        else:
            (folder / "config.json").write_text("{", encoding="utf-8")
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    with pytest.raises(ConfigError, match=r"ExitHeads\.save_pretrained.*heads"):
        predictions(model, ExitSchedule(**TABLE, heads=str(folder)))
    assert traces(model) == []
