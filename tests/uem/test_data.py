"""Training data: recorded calls are those of the pipeline, noise is the scheduler's, bad images are counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from fastdiff.errors import ConfigError
from fastdiff.uem import TrainConfig
from fastdiff.uem.data import TrainingData, TrainingDataError
from fastdiff.uem.recording import Call, denoiser_of, record
from fastdiff.uem.sources import Share, prepare
from tiny.training import pipeline_and_call

SMALL: dict[str, Any] = {"samples": 6, "record_batch": 3, "evaluations": 3, "num_inference_steps": 4}


def example_images(folder: Path, count: int = 12) -> Path:
    """Writes images of one colour each, with labels."""
    folder.mkdir()
    lines = []
    for number in range(count):
        name = f"{number:02d}.png"
        Image.new("RGB", (40, 50), (20 * number, 255 - 20 * number, 128)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "label": number % 7}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


# -- the pipeline's own calls ------------------------------------------------------------------------------------------

WITH_CALLS = (
    "DiTPipeline",
    "UViTPipeline",
    "StableDiffusion3Pipeline",
    "PixArtAlphaPipeline",
    "FluxPipeline",
    "HunyuanDiTPipeline",
    "Lumina2Pipeline",
    "QwenImagePipeline",
)


@pytest.mark.parametrize("name", WITH_CALLS)
def test_recorded_rows_predict_what_was_predicted(name: str, tmp_path: Path) -> None:
    pipe, requests, arguments = pipeline_and_call(name)
    data = prepare(pipe, TrainConfig(**SMALL), tmp_path, requests, arguments)
    batch = data.batch(data.draw(torch.Generator().manual_seed(1), 5))
    _, denoiser = denoiser_of(pipe)
    with torch.no_grad():
        again = denoiser(**batch.arguments, return_dict=False)[0][:, : batch.truth.shape[1]]
    torch.testing.assert_close(again, batch.truth, rtol=1e-4, atol=1e-5)
    assert len(set(batch.timesteps.tolist())) > 1
    assert batch.truth.std() > 0


def test_both_guidance_branches_are_recorded(tmp_path: Path) -> None:
    for name, folder in (("DiTPipeline", "one call"), ("FluxPipeline", "a call each")):
        pipe, requests, arguments = pipeline_and_call(name)
        data = prepare(pipe, TrainConfig(**SMALL), tmp_path / folder, requests, arguments)
        assert data.rows == 3 * 2 * 3  # images, branches, evaluations; the second call is held out
        assert {branch for (_, branch), _ in data.held_out(100)} == {0, 1}


def test_recording_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe, requests, arguments = pipeline_and_call("DiTPipeline")
    before = dict(vars(pipe.transformer)), dict(vars(pipe.scheduler))
    prepare(pipe, TrainConfig(**SMALL), tmp_path, requests, arguments)
    assert "forward" not in vars(pipe.transformer)
    assert "step" not in vars(pipe.scheduler)
    assert set(vars(pipe.transformer)) == set(before[0])


def test_data_is_kept_and_made_anew_for_another_model(tmp_path: Path) -> None:
    pipe, requests, arguments = pipeline_and_call("DiTPipeline")
    config = TrainConfig(**SMALL)
    prepare(pipe, config, tmp_path, requests, arguments)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    written = {path: path.stat().st_mtime_ns for path in files}
    files[1].write_bytes(files[1].read_bytes()[:100])  # as a killed copy leaves it
    prepare(pipe, config, tmp_path, requests, arguments)
    assert files[0].stat().st_mtime_ns == written[files[0]]
    assert files[1].stat().st_size > 100
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(0.1)
    prepare(pipe, config, tmp_path, requests, arguments)
    assert len(sorted(tmp_path.rglob("*.safetensors"))) == 4


def test_processes_share_the_calls(tmp_path: Path) -> None:
    pipe, requests, arguments = pipeline_and_call("DiTPipeline")
    config = TrainConfig(**SMALL | {"samples": 9})
    made = []

    def wait() -> None:
        made.append(sorted(path.name for path in tmp_path.rglob("*.safetensors")))
        if len(made) == 1:
            prepare(pipe, config, tmp_path, requests, arguments, Share(0, 2))

    prepare(pipe, config, tmp_path, requests, arguments, Share(1, 2, wait))
    assert made == [["00001.safetensors"]]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_arguments_that_the_pipeline_does_not_have_are_refused(tmp_path: Path) -> None:
    pipe, requests, _ = pipeline_and_call("DiTPipeline")
    with pytest.raises(ConfigError, match="DiTPipeline takes no height"):
        prepare(pipe, TrainConfig(**SMALL), tmp_path, requests, {"height": 8})


def test_a_pipeline_of_prompts_has_to_be_given_some(tmp_path: Path) -> None:
    pipe = pipeline_and_call("StableDiffusion3Pipeline")[0]
    with pytest.raises(ConfigError, match="--prompts FILE"):
        prepare(pipe, TrainConfig(**SMALL), tmp_path)


def test_one_call_is_too_little(tmp_path: Path) -> None:
    pipe, _, _ = pipeline_and_call("DiTPipeline")
    folder = example_images(tmp_path / "images", 3)
    with pytest.raises(TrainingDataError, match="at least two"):
        prepare(pipe, TrainConfig(**SMALL | {"data": str(folder)}), tmp_path / "data")


# -- given images ------------------------------------------------------------------------------------------------------


def given(tmp_path: Path, name: str = "DiTPipeline", scheduler: Any = None, **settings: Any) -> tuple[Any, Any]:
    """Returns a pipeline and data made of images for it."""
    pipe, requests, arguments = pipeline_and_call(name)
    if scheduler is not None:
        pipe.scheduler = scheduler
    folder = tmp_path / "images"
    if not folder.exists():
        example_images(folder)
    config = TrainConfig(**SMALL | {"data": str(folder), "samples": 12} | settings)
    is_by_class = "class_labels" in requests
    return pipe, prepare(pipe, config, tmp_path / "data", None if is_by_class else requests, arguments)


def test_images_bring_their_latents_and_classes(tmp_path: Path) -> None:
    pipe, data = given(tmp_path)
    drawn = data.draw(torch.Generator().manual_seed(0), 40)
    batch = data.batch(drawn)
    first = drawn.places[0][0]
    pixels = torch.stack(
        [torch.tensor([20 * n, 255 - 20 * n, 128]).float().view(3, 1, 1).expand(3, 64, 64) for n in range(3)]
    )
    size = 8 * first.sample.shape[-1]
    with torch.no_grad():
        expected = pipe.vae.encode(pixels[:, :, :size, :size] / 127.5 - 1).latent_dist.mode()
    tables = {id(place[0]): place[0] for place in drawn.places}
    table = next(table for table in tables.values() if table.own["class_labels"][0] == 0)
    torch.testing.assert_close(table.sample[:3], expected * pipe.vae.config.scaling_factor, rtol=1e-3, atol=1e-4)
    assert table.own["class_labels"].tolist() == [0, 1, 2, 1000, 1000, 1000]
    assert {1000, 0} <= set(batch.arguments["class_labels"].tolist())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_truth_are_the_schedulers(prediction: str, tmp_path: Path) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    _, data = given(tmp_path, scheduler=scheduler)
    drawn = data.draw(torch.Generator().manual_seed(0), 6)
    batch = data.batch(drawn)
    clean = torch.stack([table.sample[row] for table, _, row in drawn.places])
    signal = scheduler.alphas_cumprod[batch.timesteps.long()].sqrt().view(-1, 1, 1, 1)
    noise = (1 - signal**2).sqrt()
    assert drawn.noise is not None
    torch.testing.assert_close(batch.arguments["hidden_states"], signal * clean + noise * drawn.noise)
    truths = {"epsilon": drawn.noise, "v_prediction": signal * drawn.noise - noise * clean, "sample": clean}
    torch.testing.assert_close(batch.truth, truths[prediction])
    assert batch.arguments["timestep"].tolist() == batch.timesteps.tolist()
    assert batch.arguments["timestep"].dtype == torch.int64


@pytest.mark.parametrize(("name", "unit"), [("StableDiffusion3Pipeline", 1), ("FluxPipeline", 1000)])
def test_flow_matching(name: str, unit: float, tmp_path: Path) -> None:
    _, data = given(tmp_path, name, FlowMatchEulerDiscreteScheduler(shift=3.0))
    drawn = data.draw(torch.Generator().manual_seed(0), 6)
    batch = data.batch(drawn)
    clean = torch.stack([table.sample[row] for table, _, row in drawn.places])
    sigma = (batch.timesteps / 1000).view(-1, *[1] * (clean.ndim - 1))
    sample, timestep = batch.arguments["hidden_states"], batch.arguments["timestep"]
    torch.testing.assert_close(sample, (1 - sigma) * clean + sigma * drawn.noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.truth, drawn.noise - clean)
    torch.testing.assert_close(timestep * unit, batch.timesteps)
    many = data.batch(data.draw(torch.Generator().manual_seed(0), 200)).timesteps
    assert many.median() > 650  # shifted to the noisy end


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_min_snr_weights_make_errors_of_the_prediction_those_of_the_image(prediction: str, tmp_path: Path) -> None:
    is_flow = prediction == "flow"
    name = "StableDiffusion3Pipeline" if is_flow else "DiTPipeline"
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if not is_flow:
        scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, rescale_betas_zero_snr=True)
    _, data = given(tmp_path, name, scheduler, snr_gamma=5)
    batch = data.batch(data.draw(torch.Generator().manual_seed(0), 2000))
    assert batch.weights is not None
    sigma = batch.timesteps / 1000
    signal = 1 - sigma if is_flow else scheduler.alphas_cumprod[batch.timesteps.long()].sqrt()
    noise = sigma if is_flow else (1 - signal**2).sqrt()
    # By how much the clean sample is off where the prediction is off by 1: x0 = (x - noise * epsilon) / signal, ...
    moved = {"epsilon": noise / signal, "v_prediction": noise, "sample": torch.ones_like(noise), "flow": noise}
    expected = (signal / noise).square().clamp(max=5) * moved[prediction].square()
    expected[signal == 0] = float(prediction == "epsilon")  # the limit; this scheduler ends without any signal
    torch.testing.assert_close(batch.weights, expected, rtol=1e-4, atol=1e-6)
    assert given(tmp_path, name, scheduler)[1].batch(data.draw(torch.Generator(), 4)).weights is None


@pytest.mark.parametrize("name", ["DiTPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_the_share_of_unconditional_rows(name: str, tmp_path: Path) -> None:
    pipe, requests, arguments = pipeline_and_call(name)
    requests |= {key: value[:1].expand_as(value) for key, value in requests.items() if key.startswith("negative")}
    data = prepare(pipe, TrainConfig(**SMALL, unconditional=0.2), tmp_path, requests, arguments)
    drawn = data.draw(torch.Generator().manual_seed(1), 9000)
    rows = Counter((table.group(row), evaluation, row) for table, evaluation, row in drawn.places)
    assert len(rows) == data.rows
    alike = {branch for branch in (0, 1) if len(conditioning(data, branch)) == 1}
    (unconditional,) = alike
    assert unconditional == {"DiTPipeline": 1, "StableDiffusion3Pipeline": 0, "FluxPipeline": 1}[name]
    for branch, share in ((unconditional, 0.2), (1 - unconditional, 0.8)):
        counts = [count for (of, _, _), count in rows.items() if of == branch]
        assert sum(counts) / 9000 == pytest.approx(share, abs=0.02)
        assert max(counts) < 1.5 * min(counts)  # all alike


def conditioning(data: TrainingData, branch: int) -> set[str]:
    """What the rows of a branch are asked for."""
    places = data.draw(torch.Generator().manual_seed(1), 300).places
    names = {"class_labels", "encoder_hidden_states"}
    return {
        str(table.value(name, evaluation, row).tolist())
        for table, evaluation, row in places
        if table.group(row) == branch
        for name in names & set(table.own)
    }


@pytest.mark.parametrize("arguments", [{"guidance_scale": 1.0}, {"class_labels": [3]}])
def test_an_unconditional_branch_that_cannot_be_told_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    pipe, requests, call = pipeline_and_call("DiTPipeline")
    requests = {name: arguments.pop(name, value) for name, value in requests.items()}
    with pytest.raises(ConfigError, match=r"unconditional=0\.2 needs guidance .* here (0 of 1|2 of 2) branches"):
        prepare(pipe, TrainConfig(**SMALL, unconditional=0.2), tmp_path, requests, call | arguments)


def test_nothing_is_computed_to_learn_the_conditioning() -> None:
    pipe, requests, arguments = pipeline_and_call("FluxPipeline")
    ran: list[Any] = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    calls = record(pipe, {**requests, **arguments, "num_inference_steps": 2, "output_type": "latent"}, 0, None)
    assert not ran
    assert len(calls) == 2  # both guidance branches, of the first step alone
    assert all(isinstance(call, Call) and call.prediction is None and call.step == 0 for call in calls)


def test_an_unreadable_image_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = example_images(tmp_path / "images", 4)
    for number in range(100):
        Image.new("RGB", (8, 8)).save(folder / f"more-{number}.png")
    (folder / "metadata.jsonl").unlink()
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:40])
    pipe = pipeline_and_call("UViTPipeline")[0]
    config = TrainConfig(**SMALL | {"data": str(folder), "samples": 104, "record_batch": 26})
    data = prepare(pipe, config, tmp_path / "data")
    assert "1 images could not be read" in capsys.readouterr().out
    assert data.rows == 25 + 26 + 26


def test_too_many_unreadable_images_are_refused(tmp_path: Path) -> None:
    folder = example_images(tmp_path / "images")
    (folder / "03.png").write_bytes(b"no image")
    with pytest.raises(TrainingDataError, match=r"1 of 12 images of .* cannot be read, more than 1%"):
        given(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(TrainingDataError, match="holds no images"):
        given(tmp_path)


def test_data_that_there_is_not_is_refused(tmp_path: Path) -> None:
    pipe, _, _ = pipeline_and_call("DiTPipeline")
    with pytest.raises(ConfigError, match="no training data 'nowhere'"):
        prepare(pipe, TrainConfig(**SMALL | {"data": "nowhere"}), tmp_path)


def test_images_without_the_labels_that_are_needed_are_refused(tmp_path: Path) -> None:
    (example_images(tmp_path / "images") / "metadata.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"have no labels: give metadata\.jsonl"):
        given(tmp_path)


def test_metadata_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (example_images(tmp_path / "images") / "metadata.jsonl").write_text("{")
    with pytest.raises(TrainingDataError, match=r"metadata\.jsonl cannot be read"):
        given(tmp_path)
