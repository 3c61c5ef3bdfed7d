"""Training: what it changes, that it goes on exactly where it stopped, and that its results are of use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from torch import nn

import fastdiff
from fastdiff import zoo
from fastdiff.uem import TrainConfig, load_modules
from fastdiff.uem.data import Batch, TrainingData
from fastdiff.uem.objectives import Objective, make_objective
from fastdiff.uem.sources import prepare
from fastdiff.uem.train import train
from fastdiff.uem.trainer import Trainer, step_generator
from fastdiff.uem.validation import spearman
from tiny.training import pipeline_and_call, small, tiny_dit

OBJECTIVES: dict[str, dict[str, Any]] = {
    "deediff": {},
    "shared heads": {"heads": "shared"},
    "norms": {"heads": "per_exit_norm"},
    "paper": {"ual": "paper", "timestep_aware": False},
    "fine-tuned": {"train_backbone": True, "backbone_learning_rate": 1e-3},
    "heads": {"objective": "heads", "distillation": 0.1},
    "ase": {"objective": "ase", "train_backbone": True, "backbone_learning_rate": 3e-3},
    "truth": {"data": "zoo", "target": "truth"},
}
EVERY_OBJECTIVE = pytest.mark.parametrize("name", OBJECTIVES)


def made(cache: Path, **settings: Any) -> tuple[Objective, TrainingData, TrainConfig]:
    """Returns an objective that is not trained yet, its data, and how to train."""
    pipe, config = tiny_dit(), small(**settings)
    data = prepare(pipe, config, cache)
    return make_objective(pipe.transformer, data, config), data, config


def batch_of(data: TrainingData, size: int = 16) -> Batch:
    return data.batch(data.draw(step_generator(9, 9), size))


def loss_of(objective: Objective, batch: Batch, distils: bool = True) -> torch.Tensor:
    with objective.watching(batch):
        return objective(batch, distils)["loss"]


# -- what is learned ---------------------------------------------------------------------------------------------------


@EVERY_OBJECTIVE
def test_every_objective_lowers_its_loss(name: str, cache: Path, tmp_path: Path) -> None:
    objective, data, config = made(cache, **OBJECTIVES[name], steps=40, learning_rate=1e-2, checkpoint_every=40)
    batch = batch_of(data)
    with torch.no_grad():
        before = loss_of(objective, batch)
        Trainer(objective, data, config, tmp_path, Accelerator(cpu=True), {}).validate()
        with torch.enable_grad():
            Trainer(objective, data, config, tmp_path, Accelerator(cpu=True), {}).fit()
        after = loss_of(objective, batch)
    assert after < 0.97 * before


def reached(objective: Objective, batch: Batch) -> set[str]:
    """Returns the parts that a batch's loss has a gradient for."""
    with objective.watching(batch):
        objective(batch, True)["loss"].backward()
    names = [name for name, value in objective.named_parameters() if value.grad is not None and value.grad.any()]
    return {".".join(name.split(".")[: 2 if name.startswith("exits") else 1]) for name in names}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deediff", {"exits.uncertainty", "exits.exit_heads"}),
        ("shared heads", {"exits.uncertainty"}),
        ("heads", {"exits.exit_heads"}),
        ("fine-tuned", {"exits.uncertainty", "exits.exit_heads", "denoiser"}),
        ("ase", {"denoiser"}),
    ],
)
def test_gradients_reach_what_is_trained_and_nothing_else(name: str, expected: set[str], cache: Path) -> None:
    objective, data, _ = made(cache, **OBJECTIVES[name])
    assert reached(objective, batch_of(data)) == expected


def test_the_timestep_embedder_of_a_schedule_is_frozen(cache: Path) -> None:
    objective, data, _ = made(cache, **OBJECTIVES["ase"])
    reached(objective, batch_of(data))
    embedder = [p for name, p in objective.named_parameters() if "timestep_embedder" in name]
    assert embedder
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in embedder)
    assert any("class_embedder" in name and p.requires_grad for name, p in objective.named_parameters())


def test_the_schedule_decides_how_deep_a_row_goes(cache: Path) -> None:
    schedule = "exit-schedule:bin-edges=[0,500],depths=[4,2],full=4"
    objective, data, _ = made(cache, **OBJECTIVES["ase"], schedule=schedule)
    batch = batch_of(data)
    assert objective.depths(batch.timesteps).tolist() == [2 if t >= 500 else 4 for t in batch.timesteps]  # type: ignore[operator]
    late = batch.timesteps >= 500
    assert late.any()
    assert not late.all()
    with objective.watching(batch):
        prediction = objective.predict(batch)  # type: ignore[operator]
        blocks = objective.denoiser.transformer_blocks
        (gradient,) = torch.autograd.grad(prediction[late].sum(), blocks[3].ff.net[2].weight, retain_graph=True)
        (of_all,) = torch.autograd.grad(prediction.sum(), blocks[3].ff.net[2].weight)
    assert not gradient.any()
    assert of_all.any()


def test_a_frozen_denoiser_stays_as_it_is(trained: Callable[..., Any], tmp_path: Path) -> None:
    pipe = tiny_dit()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    trained(tmp_path, pipe=pipe)
    assert all(torch.equal(before[name], value) for name, value in pipe.transformer.state_dict().items())
    assert not any(parameter.grad is not None for parameter in pipe.transformer.parameters())
    assert not (tmp_path / "transformer").exists()


def test_distillation_stops_where_it_is_told_to(trained: Callable[..., Any], tmp_path: Path) -> None:
    objective = {"distillation": 1.0, "distillation_stop": 3}
    trained(tmp_path / "stops", **objective, steps=3)
    trained(tmp_path / "goes on", **objective | {"distillation_stop": None}, steps=3)
    same = [load_file(tmp_path / run / "diffusion_pytorch_model.safetensors") for run in ("stops", "goes on")]
    assert all(torch.equal(value, same[1][name]) for name, value in same[0].items())
    trained(tmp_path / "stops later", **objective, steps=6)
    trained(tmp_path / "never stops", **objective | {"distillation_stop": None}, steps=6)
    other = [
        load_file(tmp_path / run / "diffusion_pytorch_model.safetensors") for run in ("stops later", "never stops")
    ]
    assert not all(torch.equal(value, other[1][name]) for name, value in other[0].items())


def gradients(objective: Objective, data: TrainingData) -> list[torch.Tensor]:
    batch = batch_of(data)
    with objective.watching(batch):
        objective(batch, True)["loss"].backward()
    return [parameter.grad for parameter in objective.trained().values() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["deediff", "fine-tuned", "ase"])
def test_checkpointed_activations_give_the_same_gradients(name: str, cache: Path) -> None:
    plain = gradients(*made(cache, **OBJECTIVES[name], distillation=0.1)[:2])
    objective, data, _ = made(cache, **OBJECTIVES[name], distillation=0.1, gradient_checkpointing=True)
    ran: list[Any] = []
    objective.denoiser.transformer_blocks[1].norm1.register_forward_hook(lambda *_: ran.append(1))
    checkpointed = gradients(objective, data)
    assert len(plain) == len(checkpointed)
    for expected, found in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len(ran) == (1 if name == "deediff" else 2)  # a frozen denoiser has nothing to compute again


@pytest.mark.parametrize("name", ["deediff", "ase"])
def test_accumulated_parts_are_the_whole_batch(name: str, trained: Callable[..., Any], tmp_path: Path) -> None:
    for parts in (1, 4):
        trained(tmp_path / str(parts), **OBJECTIVES[name], gradient_accumulation=parts)
    whole, parts_ = (state(tmp_path / str(parts)) for parts in (1, 4))
    config = small(**OBJECTIVES[name])
    for key, value in whole.items():
        if key.startswith("model."):
            is_backbone = key.startswith("model.denoiser.")
            # Adam goes by a gradient's sign, which is up to rounding where there is next to none. So not each number is
            # compared but all of a tensor together, with how far they can have gone.
            gone = config.steps * (config.backbone_learning_rate if is_backbone else config.learning_rate)
            assert (parts_[key] - value).square().mean().sqrt() < 0.01 * gone, key
    logged = [json.loads((tmp_path / str(parts) / "log.jsonl").read_text())["loss"] for parts in (1, 4)]
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)


def test_bfloat16_trains_weights_in_full_precision(cache: Path, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        objective, data, config = made(cache, steps=2, mixed_precision="bf16")
        dtypes: set[torch.dtype] = set()
        block = objective.denoiser.transformer_blocks[1].ff.net[2]
        block.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
        Trainer(objective, data, config, tmp_path, Accelerator(cpu=True, mixed_precision="bf16"), {}).fit()
    finally:
        AcceleratorState._reset_state()
    assert dtypes == {torch.bfloat16}
    assert {value.dtype for value in objective.trained().values()} == {torch.float32}


# -- going on ----------------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


@pytest.mark.parametrize("name", ["deediff", "fine-tuned", "ase", "truth"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    name: str, trained: Callable[..., Any], tmp_path: Path
) -> None:
    settings = OBJECTIVES[name] | {"gradient_accumulation": 2}
    whole = trained(tmp_path / "whole", **settings)
    assert trained(tmp_path / "parts", **settings, stop_at=3) == {}
    assert not (tmp_path / "parts" / "validation.json").exists()
    parts = trained(tmp_path / "parts", **settings)
    assert parts == whole
    for key, value in state(tmp_path / "whole").items():
        assert torch.equal(state(tmp_path / "parts")[key], value), key
    for weights in (tmp_path / "whole").rglob("diffusion_pytorch_model.safetensors"):
        again = tmp_path / "parts" / weights.relative_to(tmp_path / "whole")
        assert again.read_bytes() == weights.read_bytes()


def test_what_was_logged_after_the_checkpoint_is_forgotten(trained: Callable[..., Any], tmp_path: Path) -> None:
    trained(tmp_path, stop_at=3)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    trained(tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [3, 6]


def test_a_finished_run_is_not_trained_again(trained: Callable[..., Any], tmp_path: Path) -> None:
    first = trained(tmp_path)
    before = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    assert trained(tmp_path) == first
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == before


def test_averages_start_as_what_is_fine_tuned(cache: Path, tmp_path: Path) -> None:
    objective, data, config = made(cache, **OBJECTIVES["ase"], steps=1, ema_decay=0.9)
    before = {name: value.detach().clone() for name, value in objective.trained().items()}
    Trainer(objective, data, config, tmp_path, Accelerator(cpu=True), {}).fit()
    saved = state(tmp_path)
    for number, (name, old) in enumerate(before.items()):
        expected = 0.9 * old + 0.1 * saved[f"model.{name}"]
        torch.testing.assert_close(saved[f"ema.{number}"], expected)
        assert torch.equal(objective.trained()[name], saved[f"ema.{number}"])


# -- results -----------------------------------------------------------------------------------------------------------


def sampled(pipe: Any, *methods: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    fastdiff.enable(pipe, list(methods))
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=[1, 2], num_inference_steps=4, generator=generator, output_type="np").images


def test_modules_are_what_uncertainty_exit_takes(trained: Callable[..., Any], tmp_path: Path) -> None:
    result = trained(tmp_path)
    pipe = tiny_dit()
    sampled(pipe, fastdiff.UncertaintyExit(weights=str(tmp_path), threshold=0.9))
    assert pipe.fastdiff.last_run.summary()
    modules = load_modules(tmp_path)
    assert modules.exits == [f"transformer_blocks.{number}" for number in (1, 2, 3)] == result["exits"]
    assert json.loads((tmp_path / "validation.json").read_text()) == result
    assert (tmp_path / "validation.png").read_bytes()[:4] == b"\x89PNG"
    assert len(result["rmse"]) == 3
    assert {"layers", "samples"} == set(result["rank_correlation"])


def test_heads_are_what_an_exit_schedule_takes(trained: Callable[..., Any], tmp_path: Path) -> None:
    trained(tmp_path, **OBJECTIVES["heads"])
    schedule = {"bin_edges": (0, 500), "depths": (4, 2)}
    plain = sampled(tiny_dit(), fastdiff.ExitSchedule(**schedule))
    headed = sampled(tiny_dit(), fastdiff.ExitSchedule(**schedule, heads=str(tmp_path)))
    assert abs(plain - headed).max() > 0


@pytest.mark.parametrize("name", ["ase", "fine-tuned"])
def test_a_fine_tuned_denoiser_is_a_diffusers_model(name: str, trained: Callable[..., Any], tmp_path: Path) -> None:
    trained(tmp_path, **OBJECTIVES[name])
    pipe = tiny_dit()
    original = pipe.transformer.state_dict()
    pipe.transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    assert any(not torch.equal(original[key], value) for key, value in pipe.transformer.state_dict().items())
    assert sampled(pipe, fastdiff.ExitSchedule("ase-demo")).shape[0] == 2


def test_results_do_not_name_this_machine(trained: Callable[..., Any], tmp_path: Path) -> None:
    trained(tmp_path, **OBJECTIVES["fine-tuned"])
    texts = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    assert len(texts) >= 4
    assert not [path for path, text in texts.items() if str(tmp_path) in text]


@pytest.mark.parametrize("name", ["UViTPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "PixArtAlphaPipeline"])
def test_other_pipelines_train_without_code_of_their_own(name: str, tmp_path: Path) -> None:
    pipe, requests, arguments = pipeline_and_call(name, 4)
    result = train(pipe, small(steps=2), tmp_path, requests=requests, arguments=arguments)
    assert math.isfinite(result["rmse"][0])
    fastdiff.enable(pipe, fastdiff.UncertaintyExit(weights=str(tmp_path)))


def test_losses_go_to_tensorboard_where_that_is(
    trained: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path)
    told = capsys.readouterr().out.count("TensorBoard is not installed")
    assert told == (0 if find_spec("tensorboard") else 1)
    assert bool(list(tmp_path.rglob("*tfevents*"))) == bool(find_spec("tensorboard"))
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [6]


# -- validation --------------------------------------------------------------------------------------------------------


def test_rank_correlation() -> None:
    rising = torch.arange(6.0).numpy()
    assert spearman(rising, rising**3) == pytest.approx(1)
    assert spearman(rising, -rising) == pytest.approx(-1)
    assert spearman(rising, 0 * rising) == 0
    scipy = pytest.importorskip("scipy.stats")
    first, second = torch.tensor([1.0, 2, 2, 3, 5, 4]).numpy(), torch.tensor([2.0, 1, 4, 4, 4, 9]).numpy()
    assert spearman(first, second) == pytest.approx(scipy.spearmanr(first, second).statistic)


def test_modules_that_know_only_exit_and_timestep_score_nothing_across_samples(cache: Path, tmp_path: Path) -> None:
    objective, data, config = made(cache, samples=24, record_batch=8, validation_rows=64)
    trainer = Trainer(objective, data, config, tmp_path, Accelerator(cpu=True), {})
    for number, module in enumerate(objective.exits.uncertainty):  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(module.probe.weight)
        nn.init.constant_(module.probe.bias, -float(number))
        nn.init.constant_(module.time.weight, 0.01)
    result = trainer.measured()
    assert len({found["uncertainty"][0] for found in result["bins"]}) > 1
    assert result["rank_correlation"]["samples"] == pytest.approx(0, abs=1e-6)
    assert result["rank_correlation"]["layers"] > 0


@pytest.mark.slow
def test_modules_learn_which_samples_are_hard(tmp_path: Path) -> None:
    pipe = DiTPipeline.from_pretrained(zoo.path("glyphs-dit"))
    pipe.set_progress_bar_config(disable=True)
    settings = {"samples": 60, "record_batch": 20, "num_inference_steps": 10, "evaluations": 10, "batch_size": 32}
    config = small(**settings, steps=80, learning_rate=5e-3, warmup_steps=5, validation_rows=160, heads="shared")
    data = prepare(pipe, config, tmp_path)
    trainer = Trainer(make_objective(pipe.transformer, data, config), data, config, tmp_path, Accelerator(cpu=True), {})
    before = trainer.measured()["rank_correlation"]
    trainer.fit()
    after = trainer.measured()["rank_correlation"]
    assert after["layers"] > max(0.7, before["layers"])
    assert after["samples"] > max(0.15, before["samples"])
