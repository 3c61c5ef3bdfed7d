"""Feature networks: what turns images into the vectors that distances between sets of images are measured on.

A distance means something only beside the network it was measured with, so every network carries a name that says
which one it is and which weights it has, by content. Stored features and reference statistics keep that name.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fastdiff.errors import ConfigError, FastDiffError

INCEPTION_LAYERS = (64, 192, 768, 2048)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
CLEAN_INCEPTION_FILE = "inception-2015-12-05.pt"
SPECS = "inception[:64|192|768|2048], clean-inception, zoo, module:attr"


class FeatureWeightsError(FastDiffError, OSError):
    """Weights of a network for a metric that are neither here nor to be had."""


class MissingLibraryError(FastDiffError, ImportError):
    """A metric whose library is not installed, or not in a version that works."""


class ImageDataError(FastDiffError, ValueError):
    """Images, or their features, that cannot be measured: none, of the wrong size or type, unreadable, not finite."""


class Images(Protocol):
    """A set of images of one size: a uint8 array (n, height, width, 3), or what is read like one, a slice at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: slice, /) -> np.ndarray: ...


def channels_first(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, height, width, 3) to uint8 (n, 3, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def clean_resize(images: np.ndarray) -> torch.Tensor:
    """clean-fid's resizing in mode "clean": uint8 (n, height, width, 3) to float32 (n, 3, 299, 299) in [0, 255]."""
    with needs_library("clean-fid"):
        from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    return torch.from_numpy(np.stack([resize(image).transpose(2, 0, 1) for image in images]))


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A network that features come from.

    Args:
        name: which network with which weights; equal names give comparable features.
        dim: length of a feature vector.
        module: prepared images on ``device`` to features (n, dim).
        device: where the module runs.
        prepare: uint8 images (n, height, width, 3) to what the module takes.
        logits: features (n, dim) to class logits (n, classes), for the Inception score; None if there is no classifier.
        library: whose formulas FID and KID are computed with.
        image_size: height and width of the only images it takes, or None.
    """

    name: str
    dim: int
    module: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    device: torch.device | str = "cpu"
    prepare: Callable[[np.ndarray], torch.Tensor] = field(default=channels_first, repr=False)
    logits: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False)
    library: Literal["torchmetrics", "clean-fid"] = "torchmetrics"
    image_size: tuple[int, int] | None = None


def load_feature_net(
    spec: str, weights: str | Path | None = None, device: torch.device | str = "cpu", *, custom: bool = True
) -> FeatureNet:
    """Load a feature network by name.

    Args:
        spec: one of

            - ``inception`` or ``inception:64|192|768|2048``: torch-fidelity's Inception v3 as torchmetrics runs it,
              the features after the layer of that width;
            - ``clean-inception``: clean-fid's Inception v3 behind its own resizing;
            - ``zoo``: the shipped glyph reader, for images of 32x32;
            - ``module:attr``: an `nn.Module`, a subclass that is built without arguments, or a function, found by
              importing ``module``. It takes uint8 images (n, 3, height, width) and returns (n, dim).
        weights: local file instead of a download: for Inception in the library's format (for ``clean-inception`` also
            its folder), for ``module:attr`` a safetensors file.
        device: where to run it.
        custom: whether ``module:attr``, which runs code of the caller's choice, is allowed.

    Raises:
        ConfigError: if the spec names no network.
        FeatureWeightsError: if the weights are neither found nor downloaded; says which file and what to do.
        MissingLibraryError: if the library that has the network is not installed.
    """
    kind, _, option = spec.partition(":")
    path, device = None if weights is None else Path(weights), torch.device(device)
    if kind == "inception" and (not option or option in map(str, INCEPTION_LAYERS)):
        return _inception(int(option or 2048), path, device)
    if spec == "clean-inception":
        return _clean_inception(path, device)
    if spec == "zoo":
        return _zoo(device)
    if custom and kind != "inception" and kind and option:
        return _custom(kind, option, path, device)
    raise ConfigError(f"There are no features {spec!r}; choose one of: {SPECS}.")


@torch.no_grad()
def extract(net: FeatureNet, images: Images, batch: int = 64) -> np.ndarray:
    """Features of images, float32 (n, dim), with a progress bar where there is a terminal.

    Raises:
        ImageDataError: if there are no images, they have the wrong type or size, or a feature is not finite.
    """
    count = len(images)
    if not count:
        raise ImageDataError("There are no images to take features of.")
    features = np.empty((count, net.dim), np.float32)
    with tqdm(total=count, desc="features", unit="image", leave=False, disable=None) as progress:
        for start in range(0, count, batch):
            pixels = check_images(images[start : start + batch], net.image_size)
            seen = net.module(net.prepare(pixels).to(net.device))
            if seen.shape != (len(pixels), net.dim):
                raise ImageDataError(
                    f"{net.name} made features of shape {tuple(seen.shape)} from {len(pixels)} images; "
                    f"expected {(len(pixels), net.dim)}."
                )
            features[start : start + len(pixels)] = seen.float().cpu().numpy()
            progress.update(len(pixels))
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ImageDataError(
            f"{net.name} makes features that are not finite of {len(bad)} of {count} images, first of image {bad[0]}."
        )
    return features


def check_images(images: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """The images, if they are uint8 (n, height, width, 3) and of the size asked for.

    Raises:
        ImageDataError: if they are not; names the first image that is not finite, where that is why.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3:
        raise ImageDataError(f"Images have shape (n, height, width, 3); got {images.shape}.")
    if images.dtype != np.uint8:
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        cause = f"; image {bad[0]} holds NaN or infinity" if len(bad) else ""
        raise ImageDataError(f"Images are uint8 from 0 to 255; got {images.dtype}{cause}.")
    if size is not None and images.shape[1:3] != size:
        raise ImageDataError(f"Images are to be {size[0]}x{size[1]}; got {images.shape[1]}x{images.shape[2]}.")
    return images


def tensors_digest(module: nn.Module) -> str:
    """Twelve hexadecimal digits that stand for a module's parameters and buffers."""
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:12]


@contextmanager
def needs_library(name: str) -> Iterator[None]:
    """Turn an import that fails inside into a `MissingLibraryError` that says what to install."""
    try:
        yield
    except ImportError as error:
        raise MissingLibraryError(f"This needs {name}: pip install 'fastdiff[eval]' ({error}).") from error


@contextmanager
def weights_from(file: str, given: Path | None, flag: str, otherwise: str) -> Iterator[None]:
    """Turn weights that fail to load inside into a `FeatureWeightsError`.

    Args:
        file: the name under which the weights are published.
        given: the local path, or None for a download.
        flag: the command's flag that takes such a path.
        otherwise: what to do without the weights.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        tried = "could not be downloaded" if given is None else f"could not be read from {given}"
        cause = str(error).strip().splitlines()
        raise FeatureWeightsError(
            f"{file} {tried} ({cause[0] if cause else type(error).__name__}). Give the path of a copy with {flag}, "
            f"or {otherwise}."
        ) from error


FLAG = "--feature-weights PATH"
OFFLINE = "choose features that need no download: --features zoo|module:attr"


def check_holds_tensors_only(path: Path) -> None:
    """Refuse a PyTorch file that would run code, before a library that allows it opens the file.

    Raises:
        ValueError: if it does not load as plain tensors.
    """
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=False)  # noqa: TID251 - runs no code
    except OSError:
        raise
    except Exception as error:  # torch raises the unpickler's own error types
        raise ValueError(f"not a PyTorch file of plain tensors: {type(error).__name__}") from error


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    return module.to(device).eval().requires_grad_(False)


def _inception(layer: int, path: Path | None, device: torch.device) -> FeatureNet:
    with needs_library("torchmetrics and torch-fidelity"), weights_from(INCEPTION_FILE, path, FLAG, OFFLINE):
        from torchmetrics.image.fid import FrechetInceptionDistance

        if path is not None:
            check_holds_tensors_only(path)
        where = None if path is None else str(path)
        metric = FrechetInceptionDistance(feature=layer, feature_extractor_weights_path=where)
    net: Any = _frozen(metric.inception, device)

    def logits(features: torch.Tensor) -> torch.Tensor:
        # Without the bias, as torch-fidelity and torchmetrics take them ("logits_unbiased").
        return features.to(net.fc.weight) @ net.fc.weight.T

    name = f"inception-{layer}@{tensors_digest(net)}"
    return FeatureNet(name, layer, net, device, logits=logits if layer == 2048 else None)


def _clean_inception(path: Path | None, device: torch.device) -> FeatureNet:
    with needs_library("clean-fid"):
        from cleanfid.inception_torchscript import InceptionV3W
    with weights_from(CLEAN_INCEPTION_FILE, path, FLAG, OFFLINE):
        # clean-fid's own default is the temporary folder, which every user of the machine can write to.
        folder = Path(torch.hub.get_dir(), "checkpoints") if path is None else path if path.is_dir() else path.parent
        if path is None:
            folder.mkdir(parents=True, exist_ok=True)
        elif not (folder / CLEAN_INCEPTION_FILE).is_file() or path not in (folder, folder / CLEAN_INCEPTION_FILE):
            raise FileNotFoundError(f"clean-fid reads no other file name than {CLEAN_INCEPTION_FILE}")
        net = _frozen(InceptionV3W(str(folder), download=path is None), device)
    return FeatureNet(
        f"clean-inception@{tensors_digest(net)}", 2048, net, device, prepare=clean_resize, library="clean-fid"
    )


def _zoo(device: torch.device) -> FeatureNet:
    from fastdiff import zoo
    from fastdiff.zoo.data import IMAGE_SIZE, to_tensor
    from fastdiff.zoo.reader import GlyphReader

    reader: Any = _frozen(GlyphReader.from_pretrained(zoo.path("glyphs-cnn")), device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return reader.features(pixels.to(reader.dtype))

    def logits(seen: torch.Tensor) -> torch.Tensor:
        return reader.answer(seen.to(reader.device, reader.dtype)).character

    return FeatureNet(
        f"glyphs-cnn@{tensors_digest(reader)}",
        reader.config.feature_dim,
        features,
        device,
        prepare=to_tensor,
        logits=logits,
        image_size=(IMAGE_SIZE, IMAGE_SIZE),
    )


def _custom(module_name: str, attribute: str, path: Path | None, device: torch.device) -> FeatureNet:
    spec = f"{module_name}:{attribute}"
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"There are no features {spec!r} ({error}); choose one of: {SPECS}.") from error
    if inspect.isclass(found) and issubclass(found, nn.Module):
        found = found()
    if not callable(found):
        raise ConfigError(f"{spec} is a {type(found).__name__}; expected an nn.Module or a function of images.")
    if isinstance(found, nn.Module):
        _load_custom(found, spec, path)
        found = _frozen(found, device)
    elif path is not None:
        raise ConfigError(f"{spec} is a function, which takes no weights; got {path}.")
    dim = getattr(found, "num_features", None)
    return FeatureNet(f"{spec}@{_code_digest(found)}", int(dim or _probe(found, spec, device)), found, device)


def _load_custom(module: nn.Module, spec: str, path: Path | None) -> None:
    if path is None:
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FeatureWeightsError(f"{path} does not hold weights of {spec} in safetensors: {error}") from error


def _probe(extractor: Callable[[torch.Tensor], torch.Tensor], spec: str, device: torch.device) -> int:
    try:
        with torch.no_grad():
            shape: Sequence[int] = extractor(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)).shape
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{spec} fails on a uint8 image of 64x64 ({error}). Give it an attribute `num_features`, the length of a "
            "feature vector, if it takes other sizes."
        ) from error
    if len(shape) != 2:
        raise ConfigError(f"{spec} made {tuple(shape)} of one image; expected features of shape (1, dim).")
    return shape[1]


def _code_digest(extractor: Any) -> str:
    """Stands for the weights of a module, its structure, and the source of its class or of the function."""
    state = hashlib.sha256()
    if isinstance(extractor, nn.Module):
        state.update(f"{tensors_digest(extractor)} {extractor!r}".encode())
    try:
        source = inspect.getsource(type(extractor) if isinstance(extractor, nn.Module) else extractor)
    except (OSError, TypeError):  # built in, or typed into an interpreter
        source = repr(type(extractor))
    state.update(source.encode())
    return state.hexdigest()[:12]
