"""How far each sample is from the full run's sample of the same seed, and from its caption.

PSNR, SSIM, LPIPS and CLIP score are torchmetrics'; ``docs/metrics.md`` says what each number means.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fastdiff.eval.features import (
    ImageDataError,
    channels_first,
    check_holds_tensors_only,
    check_images,
    needs_library,
    tensors_digest,
    weights_from,
)
from fastdiff.eval.quality import mean_interval

PSNR_LIMIT = 100.0
"""dB of images that are equal. JSON knows no infinity, and a mean over it would say nothing of the other images."""

SMALLEST_FOR_SSIM = 11
CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class PerImage:
    """A metric of each image.

    Args:
        name: of the metric.
        values: one for each image, in order.
        mean: of the values.
        worst: the least or the greatest value, whichever is worse.
        low: lower end of the mean's 95 % bootstrap interval.
        high: its upper end.
        higher_is_better: which way is better.
    """

    name: str
    values: tuple[float, ...] = field(repr=False)
    mean: float
    worst: float
    low: float
    high: float
    higher_is_better: bool

    @classmethod
    def of(cls, name: str, values: np.ndarray, higher_is_better: bool) -> PerImage:
        """The metric from its values, shape ``(n,)``.

        Raises:
            ImageDataError: if a value is not finite.
        """
        values = np.asarray(values, np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ImageDataError(f"{name} of image {bad[0]} is not finite.")
        worst = values.min() if higher_is_better else values.max()
        low, high = mean_interval(values)
        return cls(name, tuple(values.tolist()), float(values.mean()), float(worst), low, high, higher_is_better)


def measure_pairs(
    images: np.ndarray,
    baseline: np.ndarray,
    *,
    latents: tuple[np.ndarray, np.ndarray] | None = None,
    lpips: Lpips | None = None,
    batch: int = 64,
) -> dict[str, PerImage]:
    """Metrics of each image against the image of the same seed that the full run made.

    Args:
        images: uint8 (n, height, width, 3).
        baseline: of the full run, in the same order.
        latents: also the final latents of both, each (n, ...).
        lpips: also this, from `load_lpips`.
        batch: images compared at a time.

    Returns:
        ``psnr`` in dB, ``ssim`` unless a side is shorter than its window of 11 pixels, and ``lpips`` and
        ``latent_error`` where asked for.

    Raises:
        ImageDataError: if the two sets differ in number or size, are empty, or are no images.
        MissingLibraryError: if torchmetrics is not installed.
    """
    images, baseline = check_images(images), check_images(baseline)
    _check_alike(images.shape, baseline.shape)
    with needs_library("torchmetrics"):
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    def psnr(ours: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        values = peak_signal_noise_ratio(ours, full, data_range=1.0, reduction="none", dim=(1, 2, 3))
        return values.clamp(max=PSNR_LIMIT)

    def ssim(ours: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        values = structural_similarity_index_measure(ours, full, data_range=1.0, reduction="none")
        return torch.as_tensor(values)

    found = {"psnr": PerImage.of("psnr", _by_batch(psnr, images, baseline, batch), True)}
    if min(images.shape[1:3]) >= SMALLEST_FOR_SSIM:
        found["ssim"] = PerImage.of("ssim", _by_batch(ssim, images, baseline, batch), True)
    if lpips is not None:
        found["lpips"] = PerImage.of("lpips", lpips(images, baseline, batch), False)
    if latents is not None:
        found["latent_error"] = PerImage.of("latent_error", latent_error(*latents), False)
    return found


def latent_error(latents: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Norm of each difference over the norm of the full run's latents: float64 (n,), for latents (n, ...).

    Raises:
        ImageDataError: if the shapes differ or latents of the full run are all 0.
    """
    _check_alike(latents.shape, baseline.shape)
    ours, full = (np.asarray(part, np.float64).reshape(len(part), -1) for part in (latents, baseline))
    norms = np.linalg.norm(full, axis=1)
    if not norms.all():
        raise ImageDataError(f"The full run's latents of image {np.flatnonzero(norms == 0)[0]} are all 0.")
    return np.linalg.norm(ours - full, axis=1) / norms


@dataclass(frozen=True, eq=False)
class Lpips:
    """Learned perceptual distance of image pairs.

    Args:
        name: of the network and its weights, by content.
        metric: torchmetrics', on ``device``.
        device: where it runs.
    """

    name: str
    metric: Any = field(repr=False)
    device: torch.device | str = "cpu"

    def __call__(self, images: np.ndarray, baseline: np.ndarray, batch: int = 64) -> np.ndarray:
        """The distance of each pair of uint8 images (n, height, width, 3): float64 (n,)."""

        def distance(ours: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
            return self.metric(ours.to(self.device), full.to(self.device)).reshape(-1)

        return _by_batch(distance, images, baseline, batch)


def load_lpips(
    net: Literal["alex", "vgg", "squeeze"] = "alex",
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Lpips:
    """Load LPIPS.

    The heads come with torchmetrics; the backbone's ImageNet weights are torchvision's.

    Args:
        net: the backbone.
        weights: its file, as torchvision publishes it, instead of a download.
        device: where to run it.

    Raises:
        FeatureWeightsError: if the weights are neither found nor downloaded.
        MissingLibraryError: if torchmetrics or torchvision is not installed.
    """
    with needs_library("torchmetrics and torchvision"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        from torchvision import models

        published = {
            "alex": models.AlexNet_Weights,
            "vgg": models.VGG16_Weights,
            "squeeze": models.SqueezeNet1_1_Weights,
        }
        file = published[net].DEFAULT.url.rpartition("/")[2]
    path = None if weights is None else Path(weights)
    with weights_from(file, path, "--feature-weights lpips=PATH", "leave LPIPS out"), _as_downloaded(file, path):
        metric = LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none", normalize=True)
    metric = metric.to(device).eval()
    return Lpips(f"lpips-{net}@{tensors_digest(metric.net)}", metric, device)


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """Agreement of images with their captions.

    Args:
        name: of the model and its weights, by content.
        metric: torchmetrics', on ``device``.
        device: where it runs.
    """

    name: str
    metric: Any = field(repr=False)
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> PerImage:
        """The CLIP score of each uint8 image (n, height, width, 3) with its caption, from 0 to 100.

        Raises:
            ImageDataError: if there is not one caption for each image.
        """
        images = check_images(images)
        if len(images) != len(captions) or not len(images):
            raise ImageDataError(f"CLIP scores need a caption for each image; got {len(captions)} for {len(images)}.")
        values = []
        for image, caption in tqdm(zip(images, captions, strict=True), "CLIP score", len(images), False, disable=None):
            # One at a time, because torchmetrics gives a batch's mean only.
            values.append(float(self.metric(channels_first(image[None]).to(self.device)[0], caption)))
        return PerImage.of("clip_score", np.array(values), True)


def load_clip(weights: str | Path | None = None, device: torch.device | str = "cpu") -> ClipScorer:
    """Load a CLIP model for CLIP scores, by default the one torchmetrics takes.

    Args:
        weights: folder of a `transformers.CLIPModel` and its processor instead of a download.
        device: where to run it.

    Raises:
        FeatureWeightsError: if the model is neither found nor downloaded.
        MissingLibraryError: if torchmetrics is not installed.
    """
    with needs_library("torchmetrics"):
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPModel, CLIPProcessor

    source = CLIP if weights is None else str(weights)
    path = None if weights is None else Path(weights)
    with weights_from(CLIP, path, "--feature-weights clip=PATH", "leave the CLIP score out"):
        if path is not None and not path.is_dir():
            raise FileNotFoundError("no folder of a CLIP model")
        model = CLIPModel.from_pretrained(source, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(source)
    name = f"{'clip' if weights is not None else CLIP}@{tensors_digest(model)}"
    metric = CLIPScore(model_name_or_path=lambda: (_ClipEmbeddings(model), processor))
    return ClipScorer(name, metric.to(device), device)


class _ClipEmbeddings(nn.Module):
    """A CLIP model whose embeddings are tensors, as torchmetrics expects; since transformers 5 they are outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model.eval(), model.config

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        found = self.model.get_image_features(pixels)
        return getattr(found, "pooler_output", found)

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = self.model.get_text_features(ids, mask)
        return getattr(found, "pooler_output", found)


def _check_alike(ours: tuple[int, ...], full: tuple[int, ...]) -> None:
    if ours != full or not ours[0]:
        raise ImageDataError(
            f"Pairs need as many samples of the same shape on both sides, at least one: {ours}, {full}."
        )


@torch.no_grad()
def _by_batch(
    metric: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], images: np.ndarray, baseline: np.ndarray, batch: int
) -> np.ndarray:
    """A metric of each pair, float64 (n,), from images in [0, 1] with channels first."""
    values = []
    for start in tqdm(range(0, len(images), batch), "pairs", leave=False, disable=None):
        ours, full = (channels_first(part[start : start + batch]).float() / 255 for part in (images, baseline))
        values.append(metric(ours, full).double().cpu().reshape(-1))
    return torch.cat(values).numpy()


@contextlib.contextmanager
def _as_downloaded(file: str, path: Path | None) -> Iterator[None]:
    """Let torch.hub find a local file under the name it would download, if one is given."""
    if path is None:
        yield
        return
    check_holds_tensors_only(path)
    previous = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        downloads = Path(folder, "checkpoints")
        downloads.mkdir()
        (downloads / file).symlink_to(path.resolve())
        try:
            torch.hub.set_dir(folder)
            yield
        finally:
            torch.hub.set_dir(previous)
