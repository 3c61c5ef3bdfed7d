"""Labelled glyph images: an endless, deterministic data set that needs no download.

Every image is a digit or capital letter in one of the DejaVu faces that ship with matplotlib, drawn in two
contrasting colours over a mild gradient, slightly scaled, rotated and shifted. Image ``index`` of stream ``seed``
is always the same image, whatever was drawn before it, so a data set is named by two integers.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
)
PALETTE = {
    "black": (25, 25, 25),
    "white": (235, 235, 235),
    "red": (205, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 220, 60),
    "green": (40, 140, 60),
    "cyan": (70, 200, 215),
    "blue": (40, 60, 190),
    "purple": (125, 50, 150),
    "pink": (240, 150, 190),
}
COLORS = tuple(PALETTE)
LABELS = ("character", "font", "foreground", "background")
"""The columns of every array of labels."""

IMAGE_SIZE = 32
MAX_ROTATION_DEGREES = 12.0
MIN_LUMINANCE_CONTRAST = 80.0
_SUPERSAMPLING = 4
_COLOR_JITTER = 12.0
_GRADIENT = 18.0
_FONT_SIZE = 34  # pixels per em at scale 1: a capital is then about 25 of the 32 pixels high


@dataclass(frozen=True)
class Glyph:
    """One rendered image with its labels.

    Attributes:
        image: uint8 array of shape (32, 32, 3), RGB.
        character: index into ``CHARACTERS``.
        font: index into ``FONTS``.
        foreground: index into ``COLORS``.
        background: index into ``COLORS``.
    """

    image: np.ndarray
    character: int
    font: int
    foreground: int
    background: int

    @property
    def labels(self) -> tuple[int, int, int, int]:
        """Character, font, foreground and background."""
        return self.character, self.font, self.foreground, self.background


@functools.cache
def _font(index: int, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # only for the folder of its fonts

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONTS[index]}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def color_pairs() -> list[tuple[int, int]]:
    """All (foreground, background) pairs that differ clearly in luminance."""
    luminance = np.array(list(PALETTE.values())) @ np.array([0.299, 0.587, 0.114])
    count = len(COLORS)
    return [
        (fore, back)
        for fore in range(count)
        for back in range(count)
        if abs(luminance[fore] - luminance[back]) >= MIN_LUMINANCE_CONTRAST
    ]


@functools.cache
def _glyph_mask(character: int, font: int) -> tuple[Image.Image, float, float]:
    """The upright glyph at full scale on an oversized canvas, with the centre of its bounding box."""
    size = 2 * IMAGE_SIZE * _SUPERSAMPLING
    mask = Image.new("L", (size, size), 0)
    face = _font(font, _FONT_SIZE * _SUPERSAMPLING)
    ImageDraw.Draw(mask).text((size // 2, size // 2), CHARACTERS[character], fill=255, font=face, anchor="mm")
    box = mask.getbbox()
    assert box is not None, "every face has every character"
    left, top, right, bottom = box
    return mask, (left + right) / 2, (top + bottom) / 2


def _coverage(rng: np.random.Generator, character: int, font: int) -> np.ndarray:
    """Share of every pixel covered by the glyph, float32 (32, 32) in [0, 1]."""
    mask, centre_x, centre_y = _glyph_mask(character, font)
    scale = rng.uniform(0.75, 1.0)
    angle = math.radians(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    shift_x, shift_y = rng.uniform(-2.0, 2.0, size=2) * _SUPERSAMPLING
    size = IMAGE_SIZE * _SUPERSAMPLING
    # PIL's affine transform maps output to input coordinates, so this is the inverse rotation and scaling.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    out_x, out_y = size / 2 + shift_x, size / 2 + shift_y
    coefficients = (cos, sin, centre_x - cos * out_x - sin * out_y, -sin, cos, centre_y + sin * out_x - cos * out_y)
    drawn = mask.transform((size, size), Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR)
    return np.asarray(drawn.reduce(_SUPERSAMPLING), dtype=np.float32) / 255.0


@dataclass(frozen=True)
class Subset:
    """The images of a stream that show one of some characters in one of some faces.

    Attributes:
        characters: some of ``CHARACTERS``.
        fonts: some of ``FONTS``.
    """

    characters: str
    fonts: tuple[str, ...]

    def has(self, character: int, font: int) -> bool:
        """Whether an image with these labels belongs to it."""
        return CHARACTERS[character] in self.characters and FONTS[font] in self.fonts


BOLD_DIGITS = Subset("0123456789", ("DejaVuSerif-Bold",))
"""All that ``glyphs-ddpm`` knows."""


def _begin(seed: int, index: int) -> tuple[np.random.Generator, int, int]:
    """The randomness of an image, with its character and font, which are drawn first."""
    rng = np.random.default_rng([seed, index])
    return rng, int(rng.integers(len(CHARACTERS))), int(rng.integers(len(FONTS)))


def render(seed: int, index: int) -> Glyph:
    """Renders image ``index`` of the stream ``seed``.

    Args:
        seed: names the stream; non-negative.
        index: position in the stream; non-negative.

    Returns:
        The image and its labels. The same arguments always give the same bytes.
    """
    rng, character, font = _begin(seed, index)
    foreground, background = color_pairs()[rng.integers(len(color_pairs()))]
    coverage = _coverage(rng, character, font)[..., None]

    colors = np.array([PALETTE[COLORS[foreground]], PALETTE[COLORS[background]]], dtype=np.float32)
    fore, back = colors + rng.uniform(-_COLOR_JITTER, _COLOR_JITTER, size=(2, 3)).astype(np.float32)
    direction = rng.uniform(0, 2 * math.pi)
    strength = rng.uniform(0, _GRADIENT)
    axis = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    ramp = strength * (math.cos(direction) * axis[None, :] + math.sin(direction) * axis[:, None])
    image = fore * coverage + (back + ramp[..., None]) * (1 - coverage)
    return Glyph(np.clip(np.rint(image), 0, 255).astype(np.uint8), character, font, int(foreground), int(background))


def to_tensor(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 images (..., 32, 32, 3) to the float32 range [-1, 1], channels first (..., 3, 32, 32)."""
    return torch.as_tensor(images).movedim(-1, -3).float() / 127.5 - 1.0


def render_many(seed: int, start: int, count: int, subset: Subset | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Renders a run of the stream.

    Args:
        seed: names the stream.
        start: the first image.
        count: number of images.
        subset: leave out, and do not count, the images that do not belong to it.

    Returns:
        uint8 images (count, 32, 32, 3) and int64 labels (count, 4): character, font, foreground, background.
    """
    indices: Iterable[int] = itertools.count()
    if subset is not None:
        indices = (index for index in indices if subset.has(*_begin(seed, index)[1:]))
    glyphs = [render(seed, index) for index in itertools.islice(indices, start, start + count)]
    return np.stack([glyph.image for glyph in glyphs]), np.array([glyph.labels for glyph in glyphs])


def batches(seed: int, batch_size: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches: images float32 (batch, 3, 32, 32) in [-1, 1] and labels int64 (batch, 4)."""
    while True:
        images, labels = render_many(seed, start, batch_size)
        yield to_tensor(images), torch.from_numpy(labels)
        start += batch_size


class GlyphDataset(IterableDataset):
    """The endless stream ``seed`` as a torch data set of (image, labels); workers share it without overlap.

    Args:
        seed: names the stream.
        start: index of the first image.
    """

    def __init__(self, seed: int, start: int = 0):
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        index, stride = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            glyph = render(self.seed, index)
            yield to_tensor(glyph.image), torch.tensor(glyph.labels)
            index += stride


def _render_chunk(job: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    return render_many(*job)


def pool(path: Path, seed: int, count: int, workers: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images 0..count-1 of a stream, rendered once by several processes and kept in a safetensors file.

    Args:
        path: the file; read if it exists and was made with the same seed and count, else (re)written.
        seed: names the stream.
        count: number of images.
        workers: processes to render with; by default one per CPU.

    Returns:
        uint8 images (count, 32, 32, 3) and int64 labels (count, 4).
    """
    stamp = torch.tensor([seed, count])
    if path.exists():
        stored = load_file(path)
        if torch.equal(stored["stamp"], stamp):
            return stored["images"], stored["labels"]
    chunk = 1000
    jobs = [(seed, start, min(chunk, count - start)) for start in range(0, count, chunk)]
    with multiprocessing.get_context("spawn").Pool(workers) as processes:
        parts = list(tqdm(processes.imap(_render_chunk, jobs), total=len(jobs), desc="rendering", unit="k images"))
    images, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"images": images, "labels": labels, "stamp": stamp}, path)
    return images, labels
