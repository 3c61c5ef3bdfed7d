"""Metrics of pairs and of captions: against the formulas, the libraries' own calls, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff import zoo
from fastdiff.eval.features import FeatureWeightsError, ImageDataError
from fastdiff.eval.paired import PSNR_LIMIT, PerImage, latent_error, load_clip, load_lpips, measure_pairs


def images(count: int = 6, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 236, (count, side, side, 3), dtype=np.uint8)


def with_noise(baseline: np.ndarray, levels: list[int]) -> np.ndarray:
    """Image i differs from the baseline's by ``levels[i]`` everywhere, up or down at random."""
    signs = np.random.default_rng(1).choice([-1, 1], baseline.shape)
    steps = np.reshape(levels, (-1, 1, 1, 1))
    return (baseline + signs * steps).astype(np.uint8)


def test_psnr_is_the_formula_image_by_image() -> None:
    levels = [1, 2, 4, 8, 16, 0]
    measured = measure_pairs(with_noise(images(), levels), images(), batch=4)["psnr"]
    expected = [20 * np.log10(255 / level) for level in levels[:-1]]
    assert measured.values == pytest.approx([*expected, PSNR_LIMIT], rel=1e-5)
    assert measured.worst == pytest.approx(expected[-1], rel=1e-5)
    assert measured.mean == pytest.approx(np.mean(measured.values))
    assert measured.low < measured.mean < measured.high


def test_ssim_falls_with_noise_and_is_one_for_equal_images() -> None:
    measured = measure_pairs(with_noise(images(3), [0, 5, 20]), images(3))["ssim"]
    assert measured.values[0] == pytest.approx(1)
    assert measured.values[0] > measured.values[1] > measured.values[2] == measured.worst


def test_ssim_is_left_out_where_its_window_does_not_fit() -> None:
    assert set(measure_pairs(images(side=8), images(side=8))) == {"psnr"}


def test_latent_error_is_the_norm_of_the_difference_over_that_of_the_full_runs() -> None:
    full = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float16)
    ours = full * np.array([1, 1.5, -1], np.float16).reshape(-1, 1, 1, 1)
    assert latent_error(ours, full) == pytest.approx([0, 0.5, 2], abs=1e-3)
    measured = measure_pairs(images(3), images(3), latents=(ours, full))["latent_error"]
    assert measured.worst == pytest.approx(2, abs=1e-3)
    with pytest.raises(ImageDataError, match="image 0 are all 0"):
        latent_error(full, 0 * full)


@pytest.mark.parametrize(
    ("ours", "full"),
    [(images(3), images(4)), (images(3), images(3, side=16)), (images(0), images(0)), (images(3) / 255, images(3))],
    ids=["number", "size", "none", "floats"],
)
def test_pairs_that_do_not_match_are_typed_errors(ours: np.ndarray, full: np.ndarray) -> None:
    with pytest.raises(ImageDataError):
        measure_pairs(ours, full)
    if ours.dtype == np.uint8:
        with pytest.raises(ImageDataError):
            latent_error(ours, full)


def test_a_value_that_is_not_finite_names_the_image() -> None:
    with pytest.raises(ImageDataError, match="latent_error of image 1"):
        PerImage.of("latent_error", np.array([0, np.nan]), False)


def test_metrics_of_images_fit_into_json() -> None:
    measured = measure_pairs(images(), images())
    assert json.loads(json.dumps(dataclasses.asdict(measured["psnr"]), allow_nan=False))["worst"] == PSNR_LIMIT


@pytest.fixture
def lpips_file(tmp_path: Path) -> Path:
    """Random weights in torchvision's format, for LPIPS's smallest backbone."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "mine.pth")  # noqa: TID251 - the library's own format
    return tmp_path / "mine.pth"


def test_lpips_from_a_local_file_is_the_published_formula(lpips_file: Path) -> None:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    downloads = torch.hub.get_dir()
    lpips = load_lpips("squeeze", lpips_file)
    assert torch.hub.get_dir() == downloads
    ours = with_noise(images(side=64), [0, 1, 4, 8, 16, 20])
    measured = measure_pairs(ours, images(side=64), lpips=lpips, batch=5)["lpips"]
    assert measured.values[0] == 0
    assert all(np.diff(measured.values) > 0)
    assert measured.worst == measured.values[-1]

    # The same weights put into torchmetrics' module by hand.
    with pytest.MonkeyPatch.context() as patch:
        models = pytest.importorskip("torchvision.models")
        made = models.squeezenet1_1()
        made.load_state_dict(torch.load(lpips_file, weights_only=True))  # noqa: TID251
        patch.setattr(models, "squeezenet1_1", lambda **_: made)
        metric = LearnedPerceptualImagePatchSimilarity("squeeze", reduction="none", normalize=True)
    pixels = [torch.from_numpy(part).movedim(3, 1) / 255 for part in (ours, images(side=64))]
    np.testing.assert_allclose(measured.values, metric(*pixels).numpy(), rtol=1e-4, atol=1e-7)


def test_lpips_names_stand_for_the_weights(lpips_file: Path) -> None:
    first = load_lpips("squeeze", lpips_file).name
    weights = torch.load(lpips_file, weights_only=True)  # noqa: TID251
    weights["features.0.weight"] += 1
    torch.save(weights, lpips_file)  # noqa: TID251
    assert first.startswith("lpips-squeeze@")
    assert load_lpips("squeeze", lpips_file).name != first


def test_missing_lpips_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for given in (None, tmp_path / "absent.pth"):
        with pytest.raises(FeatureWeightsError, match=r"squeezenet1_1-.*\.pth .*--feature-weights lpips=PATH"):
            load_lpips("squeeze", given)
    assert torch.hub.get_dir() == str(tmp_path / "hub")


def test_missing_clip_weights_say_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    for given in (None, tmp_path / "absent"):
        with pytest.raises(FeatureWeightsError, match=r"openai/clip.*--feature-weights clip=PATH"):
            load_clip(given)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model with random weights and the zoo's tokenizer."""
    pytest.importorskip("torchvision")  # the image processor needs it
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(zoo.path("glyphs-sd") / "tokenizer")
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=size | text, vision_config=size | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_the_models_embeddings(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    captions = ["a red A on white", "a blue 7 on yellow", "a green Z on black"]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    expected = []
    for image, caption in zip(images(3), captions, strict=True):
        inputs = processor(text=[caption], images=[image], return_tensors="pt")
        with torch.no_grad():
            seen = model(**inputs)
        expected.append(max(0, 100 * torch.cosine_similarity(seen.image_embeds, seen.text_embeds).item()))
    assert max(expected) > 0
    measured = load_clip(clip_folder)(images(3), captions)
    assert measured.values == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert measured.worst == min(measured.values)


def test_clip_score_needs_a_caption_for_each_image(clip_folder: Path) -> None:
    scorer = load_clip(clip_folder)
    assert scorer.name.startswith("clip@")
    for count in (0, 2):
        with pytest.raises(ImageDataError, match="a caption for each image"):
            scorer(images(count), ["one"])
