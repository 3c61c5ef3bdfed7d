"""The training: resumed runs, the early-exit forward, what is frozen, what is dropped, what is written."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from fastdiff.backbones import view
from fastdiff.methods import ExitSchedule
from fastdiff.uem.modules import load_modules
from fastdiff.uem.readout import make_modules
from fastdiff.zoo import data, export, train, training, training_dit
from fastdiff.zoo.training_loop import LoopConfig, fit

DEPTHS = torch.tensor([1, 3, 2, 4])


@pytest.fixture
def transformer() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = training_dit.build_transformer(num_layers=4, num_attention_heads=2, attention_head_dim=8)
    for parameter in model.parameters():  # the identity blocks of a fresh model would make every depth equal
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def _inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    return latents, torch.tensor([10, 400, 700, 990]), torch.tensor([0, 35, training_dit.NULL_CLASS, 7])


def _truncated(model: DiTTransformer2DModel, depth: int) -> DiTTransformer2DModel:
    """The same model with only its first blocks."""
    config = {**model.config, "num_layers": depth}
    short = DiTTransformer2DModel.from_config(config).eval()
    short.load_state_dict({k: v for k, v in model.state_dict().items() if k in short.state_dict()})
    return short


class TestForwardAtDepths:
    def test_each_sample_equals_a_model_that_has_only_its_blocks(self, transformer: DiTTransformer2DModel) -> None:
        latents, timesteps, classes = _inputs()
        with torch.no_grad():
            mixed = training_dit.forward_at_depths(transformer.eval(), latents, timesteps, classes, DEPTHS)
            for index, depth in enumerate(DEPTHS.tolist()):
                alone = _truncated(transformer, depth)(
                    latents[index : index + 1],
                    timestep=timesteps[index : index + 1],
                    class_labels=classes[index : index + 1],
                ).sample
                torch.testing.assert_close(mixed[index : index + 1], alone, atol=1e-5, rtol=1e-4)

    def test_full_depth_is_the_plain_forward(self, transformer: DiTTransformer2DModel) -> None:
        latents, timesteps, classes = _inputs()
        with torch.no_grad():
            full = training_dit.forward_at_depths(transformer.eval(), latents, timesteps, classes, torch.full((4,), 4))
            plain = transformer(latents, timestep=timesteps, class_labels=classes).sample
        assert torch.equal(full, plain)

    def test_depths_make_a_difference(self, transformer: DiTTransformer2DModel) -> None:
        latents, timesteps, classes = _inputs()
        with torch.no_grad():
            outputs = [
                training_dit.forward_at_depths(transformer, latents, timesteps, classes, torch.full((4,), depth))
                for depth in (1, 2, 3, 4)
            ]
        for shallow, deep in itertools.pairwise(outputs):
            assert not torch.allclose(shallow, deep, atol=1e-4)

    def test_no_gradient_above_a_samples_exit(self, transformer: DiTTransformer2DModel) -> None:
        latents, timesteps, classes = _inputs()
        for sample, depth in enumerate(DEPTHS.tolist()):
            transformer.zero_grad()
            training_dit.forward_at_depths(transformer, latents, timesteps, classes, DEPTHS)[
                sample
            ].square().sum().backward()
            for index, block in enumerate(transformer.transformer_blocks):
                largest = max(p.grad.abs().max().item() for p in block.parameters() if p.grad is not None)
                assert (largest > 0) == (index < depth), f"block {index}, depth {depth}"

    def test_predictor_takes_the_depths_from_the_schedule(self, transformer: DiTTransformer2DModel) -> None:
        latents, timesteps, classes = _inputs()
        schedule = ExitSchedule.step(full=4, t_switch=500, d_low=1)
        with torch.no_grad():
            predicted = training_dit.denoiser_predictor(transformer, schedule, compiled=False)(
                latents, timesteps, classes
            )
            expected = training_dit.forward_at_depths(
                transformer, latents, timesteps, classes, torch.tensor([4, 4, 1, 1])
            )
        assert torch.equal(predicted, expected)


def test_shipped_schedule_halves_the_published_table() -> None:
    depths = train.ASE_SCHEDULE.depth_at(torch.arange(50, 1000, 100).numpy(), 14)
    assert depths.tolist() == [14, 14, 12, 12, 10, 10, 8, 8, 6, 6]


def test_early_exit_training_leaves_the_timestep_embedders_alone(
    transformer: DiTTransformer2DModel, tmp_path: Path
) -> None:
    training_dit.freeze_timestep_embedders(transformer)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    latents, labels = torch.randn(32, 4, 8, 8), torch.randint(36, (32,))
    predict = training_dit.denoiser_predictor(transformer, ExitSchedule("ase-demo"), compiled=False)
    fit(
        transformer,
        training_dit.denoiser_loss(predict, latents, labels, 8),
        LoopConfig(steps=2, warmup_steps=1),
        tmp_path,
    )
    changed = {name for name, value in transformer.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if "timestep_embedder" in name]
    assert any("attn1" in name for name in changed)
    assert any("class_embedder" in name for name in changed)


class TestFit:
    def _train(self, folder: Path, steps: int, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = training_dit.build_transformer(num_layers=2, num_attention_heads=2, attention_head_dim=8)
        latents = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        predict = training_dit.denoiser_predictor(model, None, compiled=False)
        loss = training_dit.denoiser_loss(predict, latents, torch.arange(32), 8)
        fit(model, loss, LoopConfig(steps=steps, warmup_steps=3, checkpoint_every=4), folder, stop_at=stop_at)
        return model.state_dict()

    def test_resumed_run_ends_with_the_same_weights(self, tmp_path: Path) -> None:
        whole = self._train(tmp_path / "whole", 10)
        interrupted = self._train(tmp_path / "parts", 10, stop_at=6)
        resumed = self._train(tmp_path / "parts", 10)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert any(not torch.equal(whole[name], interrupted[name]) for name in whole)

    def test_leaves_the_average_of_the_weights(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        seen = []

        def loss(generator: torch.Generator) -> torch.Tensor:
            seen.append(model.weight.item())
            return model.weight.square().sum()

        config = LoopConfig(steps=3, warmup_steps=1, learning_rate=0.1, ema_decay=0.5, ema_warmup=False)
        fit(model, loss, config, tmp_path)
        last = load_file(tmp_path / "checkpoint.safetensors")["model.weight"].item()
        assert last < seen[2] < seen[1] < seen[0]
        expected = 0.5 * (0.5 * (0.5 * seen[0] + 0.5 * seen[1]) + 0.5 * seen[2]) + 0.5 * last
        assert model.weight.item() == pytest.approx(expected)

    def test_learning_rate_warms_up_and_falls_to_its_end(self) -> None:
        config = LoopConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
        rates = [config.learning_rate_at(step) for step in range(101)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[10] == max(rates) == 1.0
        assert rates[100] == pytest.approx(0.1)
        assert all(late <= early for early, late in itertools.pairwise(rates[10:]))


def test_one_label_in_ten_is_dropped_once_for_all_blocks(transformer: DiTTransformer2DModel) -> None:
    labels = torch.zeros(64, dtype=torch.long)
    condition = training_dit.class_condition(labels)
    classes = condition(torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0))
    share = (classes == training_dit.NULL_CLASS).float().mean().item()
    assert abs(share - training_dit.CLASS_DROPOUT) < 0.01  # 5 standard errors
    latents, timesteps, _ = _inputs()
    transformer.train()  # diffusers' own dropout would act in this mode
    first, second = (
        transformer(latents, timestep=timesteps, class_labels=torch.zeros(4, dtype=torch.long)).sample for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return training.build_vae().eval()


def test_normalized_latents_have_unit_variance_and_the_same_reconstructions(vae: AutoencoderKL) -> None:
    images, _ = data.render_many(0, 0, 64)
    tensors = torch.from_numpy(images)
    batch = data.to_tensor(tensors)
    with torch.no_grad():
        before = vae.encode(batch).latent_dist
        plain = vae.decode(before.mode()).sample
        training.normalize_latents(vae, tensors)
        after = vae.encode(batch).latent_dist
        torch.testing.assert_close(vae.decode(after.mode()).sample, plain, atol=1e-3, rtol=1e-3)
    latents = after.mode()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(
        after.std / latents.std((0, 2, 3))[:, None, None],
        before.std / before.mode().std((0, 2, 3))[:, None, None],
        atol=1e-3,
        rtol=1e-2,
    )


def test_export_is_a_half_precision_folder_that_samples(
    transformer: DiTTransformer2DModel, vae: AutoencoderKL, tmp_path: Path
) -> None:
    export.export_dit(transformer, vae, tmp_path / "model")
    assert next(transformer.parameters()).dtype == torch.float32
    pipe = DiTPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {character: index for index, character in enumerate(data.CHARACTERS)}
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, transformer.state_dict()[name].half().float()), name
    export.export_dit(pipe.transformer, pipe.vae, tmp_path / "again")  # models that know where they came from
    assert not [file for file in (tmp_path / "again").rglob("*.json") if str(tmp_path) in file.read_text()]
    images = pipe(class_labels=[3, 5], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)


def test_trained_exits_are_added_to_their_model_or_to_the_copy_that_learned_with_them(
    transformer: DiTTransformer2DModel, vae: AutoencoderKL, tmp_path: Path
) -> None:
    export.export_dit(transformer, vae, tmp_path / "out" / "model")
    inputs = dict(zip(("hidden_states", "timestep", "class_labels"), _inputs(), strict=True))
    make_modules(transformer, inputs, heads="per_exit").save_pretrained(tmp_path / "trained")
    command = ["exits", "--model", "model", "--out", str(tmp_path / "out"), "--trained", str(tmp_path / "trained")]
    train.main(command)
    assert not (tmp_path / "out" / "model-uem").exists()
    load_modules(tmp_path / "out" / "model" / "uem").check(view(transformer))
    nn.init.ones_(transformer.proj_out_2.bias)
    transformer.save_pretrained(tmp_path / "trained" / "transformer")
    train.main(command)
    copy = DiTPipeline.from_pretrained(tmp_path / "out" / "model-uem")
    assert copy.transformer.proj_out_2.bias.unique().tolist() == [1]
    for file in (tmp_path / "out").rglob("uem/*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert len([*(tmp_path / "out").rglob("uem/*.safetensors")]) == 2
    assert not [file for file in (tmp_path / "out").rglob("*.json") if str(tmp_path) in file.read_text()]


def test_command_names_the_stage_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"fastdiff\.zoo\.train dit"):
        train.main(["export", "--work", str(tmp_path / "empty"), "--out", str(tmp_path / "out")])


def test_commands_of_the_guide_are_those_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^python -m fastdiff\.zoo\.train (\S+)([^#\n]*)(?:# ([\d,]+) steps of (\d+))?", page, re.MULTILINE
    )
    for command, options, steps, batch_size in lines:
        args = train._parser().parse_args([command, *options.split()])
        assert (steps == "") == ("steps" not in args), command
        if steps:
            assert (args.steps, args.batch_size) == (int(steps.replace(",", "")), int(batch_size)), command
    assert {stage for stage, _ in train._STAGES.values()} < {command for command, *_ in lines}
