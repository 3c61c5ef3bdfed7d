"""Reference sets: what samples are compared with, from a folder, published statistics, a data set or the zoo.

Features of a set of images are taken once for a network and kept under ``$XDG_CACHE_HOME/fastdiff/references``, under
a name made from the content of the images and the name of the network, which stands for its weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from PIL import Image

from fastdiff.errors import ConfigError, FastDiffError
from fastdiff.eval.features import FeatureNet, ImageDataError, check_images, extract
from fastdiff.eval.quality import FeatureStatistics
from fastdiff.image_dataset import image_column

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
ZOO_RENDERS = 5000
FORMAT = "fastdiff-reference-1"
SOURCES = "an image folder, a .npz of statistics, a saved .safetensors, datasets:NAME[:SPLIT[:COLUMN]], zoo:glyphs"


class ReferenceSetError(FastDiffError, ValueError):
    """A reference set that cannot be read, or that was made for another network or another size of images."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What is known of a reference set in one network's feature space.

    Args:
        name: of the set.
        network: name of the network, or None where published statistics do not say.
        statistics: of its features.
        features: float32 (n, dim), or None where only the statistics are known.
        image_size: height and width of its images, or None where it is not known.
    """

    name: str
    network: str | None
    statistics: FeatureStatistics
    features: np.ndarray | None = field(default=None, repr=False)
    image_size: tuple[int, int] | None = None

    def check_network(self, net: FeatureNet) -> None:
        """Refuse another network than the one the reference was made with.

        Raises:
            ReferenceSetError: if the name or the length of the features differs.
        """
        if self.network is not None and self.network != net.name:
            raise ReferenceSetError(
                f"The reference {self.name} holds features of {self.network}; the samples' are of {net.name}. "
                "Use that network, or make the reference anew from its images."
            )
        if len(self.statistics.mean) != net.dim:
            raise ReferenceSetError(
                f"The reference {self.name} has {len(self.statistics.mean)} features; {net.name} makes {net.dim}."
            )

    def check_size(self, images: np.ndarray) -> None:
        """Refuse images of another size than the reference's.

        Args:
            images: uint8 (n, height, width, 3).

        Raises:
            ReferenceSetError: if both sizes are known and differ.
        """
        size = images.shape[1:3]
        if self.image_size is not None and self.image_size != size:
            raise ReferenceSetError(
                f"The images of the reference {self.name} are {self.image_size[0]}x{self.image_size[1]}, the samples "
                f"{size[0]}x{size[1]} (height x width). Resize one of them first: resizing inside a network would "
                "be measured as a difference."
            )

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, from which `load_reference` reads it again.

        A file that is only partly written never carries the name.
        """
        tensors = {"mean": self.statistics.mean, "root": self.statistics.root}
        if self.features is not None:
            tensors["features"] = np.ascontiguousarray(self.features, np.float32)
        described = {
            "name": self.name,
            "network": self.network,
            "count": self.statistics.count,
            "trace": self.statistics.trace,
            "image_size": self.image_size,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            # One entry: safetensors writes several in any order, and equal references are to be equal files.
            partial.write_bytes(safetensors.numpy.save(tensors, {FORMAT: json.dumps(described)}))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def load_reference(
    source: str | Path,
    net: FeatureNet,
    *,
    renders: int = ZOO_RENDERS,
    batch: int = 64,
    cache: Path | None = None,
) -> Reference:
    """Load a reference set.

    Args:
        source: one of

            - a folder, searched for images at any depth; all of one size;
            - a ``.npz`` file: ``mu`` and ``sigma`` as pytorch-fid and clean-fid save them, or ``feats`` as clean-fid
              saves them for KID;
            - a ``.safetensors`` file that `Reference.save` wrote;
            - ``datasets:NAME[:SPLIT[:COLUMN]]``: of the `datasets` library, NAME on disk (`save_to_disk`) or on the
              hub; by default the split "train" and the first column of images;
            - ``zoo:glyphs`` or ``zoo:glyphs:bold-digits``: renders that no model was trained on.
        net: the feature network.
        renders: number of images of a zoo source.
        batch: images that go through the network at a time.
        cache: folder to keep features in, instead of ``$XDG_CACHE_HOME/fastdiff/references``.

    Raises:
        ConfigError: if the source is none of these.
        ReferenceSetError: if statistics cannot be read, or are those of another network.
        ImageDataError: if there are no images, one cannot be read, or they differ in size.
    """
    text = str(source)
    path = Path(source)
    if text.startswith("zoo:"):
        return _of_images(text, _zoo_images(text, renders), net, batch, cache)
    if text.startswith("datasets:"):
        return _of_images(text, DatasetImages(*image_column(text, ReferenceSetError), text), net, batch, cache)
    if text and path.is_dir():
        return _of_images(path.resolve().name, FolderImages(path), net, batch, cache)
    if path.suffix in {".npz", ".safetensors"} and path.is_file():
        reference = _read_npz(path) if path.suffix == ".npz" else _read_saved(path)
        reference.check_network(net)
        return reference
    raise ConfigError(f"There is no reference {text!r}; give one of: {SOURCES}.")


class FolderImages:
    """The images of a folder and of those in it, in the order of their paths, read as they are asked for.

    Args:
        folder: searched at any depth for files with a suffix from `IMAGE_SUFFIXES`.

    Raises:
        ImageDataError: if there are none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self._size: tuple[int, int] | None = None
        if not self.paths:
            raise ImageDataError(f"{self.folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: slice) -> np.ndarray:
        return np.stack([self._read(path) for path in self.paths[chosen]])

    def digest(self) -> str:
        """Stands for the content of all files."""
        return _digest(path.read_bytes() for path in self.paths)

    def _read(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                pixels = _pixels(image, str(path))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a broken PNG is a SyntaxError to PIL
            raise ImageDataError(f"The image {path} cannot be read: {error}") from error
        self._size = self._size or pixels.shape[:2]
        _check_same_size(pixels, self._size, str(path), str(self.paths[0]))
        return pixels


class DatasetImages:
    """A column of images of a `datasets.Dataset`, decoded as they are asked for.

    Args:
        table: the data set.
        column: the column.
        name: for messages.
    """

    def __init__(self, table: Any, column: str, name: str) -> None:
        self._table = table.select_columns([column])
        self._column = column
        self._name = name
        self._size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, chosen: slice) -> np.ndarray:
        return np.stack([self._read(index) for index in range(*chosen.indices(len(self)))])

    def digest(self) -> str:
        """Stands for the content of all images."""
        return _digest(self._read(index).tobytes() for index in range(len(self)))

    def _read(self, index: int) -> np.ndarray:
        where = f"{index} of {self._name}"
        try:
            image = self._table[index][self._column]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageDataError(f"The image {where} cannot be read: {error}") from error
        if not isinstance(image, Image.Image):
            raise ImageDataError(f"Item {where} is a {type(image).__name__}; expected an image. Name another column.")
        pixels = _pixels(image, where)
        self._size = self._size or pixels.shape[:2]
        _check_same_size(pixels, self._size, where, f"0 of {self._name}")
        return pixels


def _pixels(image: Image.Image, where: str) -> np.ndarray:
    """uint8 (height, width, 3), of an image with 8 bits a channel."""
    if image.mode.startswith(("F", "I")):
        raise ImageDataError(f"The image {where} has mode {image.mode}; only 8 bits a channel are comparable.")
    return np.asarray(image.convert("RGB"))


def _check_same_size(pixels: np.ndarray, size: tuple[int, int], where: str, first: str) -> None:
    height, width = pixels.shape[:2]
    if (height, width) != size:
        raise ImageDataError(
            f"The image {where} is {height}x{width}, but {first} is {size[0]}x{size[1]} (height x width). "
            "Crop and resize the images to one size first."
        )


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(hashlib.sha256(part).digest())
    return state.hexdigest()


def _zoo_images(source: str, renders: int) -> np.ndarray:
    from fastdiff.zoo.check import HELD_OUT_SEED
    from fastdiff.zoo.data import BOLD_DIGITS, render_many

    subsets = {"zoo:glyphs": None, "zoo:glyphs:bold-digits": BOLD_DIGITS}
    if source not in subsets:
        raise ConfigError(f"The zoo has no reference {source!r}; choose one of: {', '.join(subsets)}.")
    return render_many(HELD_OUT_SEED, 0, renders, subsets[source])[0]


def _of_images(
    name: str, images: np.ndarray | FolderImages | DatasetImages, net: FeatureNet, batch: int, cache: Path | None
) -> Reference:
    content = _digest([images.tobytes()]) if isinstance(images, np.ndarray) else images.digest()
    folder = _cache_folder() if cache is None else cache
    key = _digest([content.encode(), net.name.encode(), FORMAT.encode()])
    path = folder / f"{key[:32]}.safetensors"
    with contextlib.suppress(ReferenceSetError):  # not there, or damaged: made anew
        kept = _read_saved(path)
        if kept.network == net.name:
            return Reference(name, kept.network, kept.statistics, kept.features, kept.image_size)
    size = check_images(images[:1]).shape[1:3]
    features = extract(net, images, batch)
    reference = Reference(name, net.name, FeatureStatistics.of(features), features, size)
    try:
        reference.save(path)
    except OSError as error:
        warnings.warn(f"The features of {name} could not be kept in {folder}: {error}", stacklevel=3)
    return reference


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff" / "references"


def _read_saved(path: Path) -> Reference:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise ReferenceSetError(f"{path} was not written by Reference.save of this version of fastdiff.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        described = json.loads(metadata[FORMAT])
        statistics = FeatureStatistics(tensors["mean"], tensors["root"], described["trace"], described["count"])
        size = described["image_size"]
        return Reference(
            described["name"],
            described["network"],
            statistics,
            tensors.get("features"),
            None if size is None else (size[0], size[1]),
        )
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ReferenceSetError):
            raise
        raise ReferenceSetError(f"{path} is no saved reference set: {error}") from error


def _read_npz(path: Path) -> Reference:
    """Statistics or features as pytorch-fid and clean-fid save them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in ("mu", "sigma", "feats") if key in file}
            found = ", ".join(file.files)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ReferenceSetError(f"{path} is no npz file of plain arrays: {error}") from error
    if not {"mu", "sigma"} <= set(arrays) and "feats" not in arrays:
        raise ReferenceSetError(f"{path} holds {found or 'nothing'}; expected mu and sigma, or feats.")
    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            raise ReferenceSetError(f"{key} in {path} is not an array of finite numbers.")
    features = arrays.get("feats")
    if features is not None:
        if features.ndim != 2:
            raise ReferenceSetError(f"feats in {path} has shape {features.shape}; expected (n, dim).")
        return Reference(path.stem, None, FeatureStatistics.of(features), features.astype(np.float32))
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ReferenceSetError(
            f"mu and sigma in {path} have shapes {mean.shape} and {covariance.shape}; expected (dim,) and (dim, dim)."
        )
    return Reference(path.stem, None, FeatureStatistics.from_moments(mean, covariance))
