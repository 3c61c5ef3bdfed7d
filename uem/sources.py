"""Where training data comes from: the pipeline itself, glyphs, a folder of images, or a data set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from fastdiff.errors import ConfigError
from fastdiff.image_dataset import image_column
from fastdiff.uem.config import TrainConfig
from fastdiff.uem.data import TrainingData, TrainingDataError, chosen, load_tables, save_tables, table_of
from fastdiff.uem.encoding import encoded
from fastdiff.uem.files import CheckpointError, digest, fingerprint, write_json
from fastdiff.uem.noising import Noising
from fastdiff.uem.recording import Call, call_parameters, denoiser_of, record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
METADATA = "metadata.jsonl"
METADATA_LINE = '{"file_name": "a.png", "text": "...", "label": 3}'
UNREADABLE = 0.01
"""Share of the images that may be unreadable."""

SELF_SAMPLES, GLYPHS = 288, 2880
MANY_STEPS, STEP_SPREAD = 20, 11
VERSION = 1


@dataclass(frozen=True)
class Share:
    """Which of several processes this is.

    Args:
        index: its number.
        count: how many there are.
        wait: waits for the others.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


Requests = Mapping[str, Any]
"""Arguments of the pipeline's call with one value for each image, over and over: lists, or tensors."""


def prepare(
    pipe: DiffusionPipeline,
    config: TrainConfig,
    folder: Path,
    requests: Requests | None = None,
    arguments: Mapping[str, Any] | None = None,
    share: Share | None = None,
) -> TrainingData:
    """Make training data, or go on with what an earlier run left in the folder.

    Args:
        pipe: the pipeline, not accelerated.
        config: says what data, and how much.
        folder: for the data; each kind has a folder of its own there, named by what made it.
        requests: what the pipeline is asked for; None for all its classes.
        arguments: further arguments of its calls.
        share: this process among those that share the work.

    Raises:
        ConfigError: if the pipeline cannot be called so, or there is no such data.
        TrainingDataError: if there is too little data, or too much of it is unreadable.
        OutputError: if the folder cannot be written to.
    """
    share = share or Share()
    shared = dict(arguments or {})
    if config.guidance_scale is not None:
        shared["guidance_scale"] = config.guidance_scale
    if unknown := [name for name in (*(requests or {}), *shared) if name not in call_parameters(pipe)]:
        raise ConfigError(f"{type(pipe).__name__} takes no {', '.join(unknown)}.")
    source: _Source
    if config.data == "self":
        source = _Own(pipe, config, asked(pipe) if requests is None else requests, shared)
    else:
        source = _Given(pipe, config, _pictures(config), requests, shared)
    place = folder / digest({**source.described(), "models": _fingerprints(pipe)})[:16]
    with suppress(FileExistsError):
        place.mkdir(parents=True)
    bar = tqdm(
        range(share.index, source.calls, share.count),
        desc="preparing data",
        unit="call",
        disable=share.index > 0,
        mininterval=1,
    )
    skipped = 0
    for number in bar:
        path = place / f"{number:05d}.safetensors"
        try:
            skipped += load_tables(path)[1]
        except CheckpointError:
            tables, unreadable = source.make(number)
            save_tables(path, tables, unreadable)
            skipped += unreadable
        source.check(skipped)
    share.wait()
    loaded = [load_tables(place / f"{number:05d}.safetensors") for number in range(source.calls)]
    skipped = sum(unreadable for _, unreadable in loaded)
    source.check(skipped)
    if skipped and share.index == 0:
        print(f"{skipped} images could not be read and are left out")
    if share.index == 0:
        write_json(place / "made_by.json", source.described())
    return TrainingData([tables for tables, _ in loaded if tables], source.noising, config.unconditional)


def _fingerprints(pipe: DiffusionPipeline) -> dict[str, Any]:
    modules = {name: fingerprint(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return {"modules": modules, "scheduler": [type(pipe.scheduler).__name__, scheduler], "version": VERSION}


def asked(pipe: DiffusionPipeline) -> dict[str, Any]:
    """All classes of a pipeline that samples by class; nothing for one that is asked for nothing.

    Raises:
        ConfigError: for a pipeline that has to be told more.
    """
    parameters = call_parameters(pipe)
    config = denoiser_of(pipe)[1].config
    if "class_labels" in parameters:
        names = getattr(pipe, "labels", None) or {}
        classes = sorted(set(names.values())) or range(
            config.get("num_classes") or config.get("num_embeds_ada_norm") or 0
        )
        return {"class_labels": list(classes)} if len(classes) else {}
    if "prompt" in parameters:
        raise ConfigError(f"{type(pipe).__name__} samples from prompts; give some: --prompts FILE, one in each line.")
    return {}


class _Source:
    """Makes the tables of one pipeline call after the other."""

    noising: Noising | None = None
    calls: int

    def __init__(self, pipe: DiffusionPipeline, config: TrainConfig, arguments: Mapping[str, Any]) -> None:
        self.pipe, self.config, self.arguments = pipe, config, arguments

    def make(self, number: int) -> tuple[list[Any], int]:
        """The tables of one call, and how many images could not be read for it."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """What the data depends on, beside the models."""
        raise NotImplementedError

    def check(self, skipped: int) -> None:
        """Refuse data of which too much is unreadable."""

    def _call(self, requests: Requests, indices: range, steps: int) -> dict[str, Any]:
        """Arguments of a call for some images."""
        parameters = call_parameters(self.pipe)
        given = chosen(requests, indices)
        if not given:
            counters = [name for name in ("batch_size", "num_images_per_prompt") if name in parameters]
            given = {counters[0]: len(indices)} if counters else {}
        generators = [torch.Generator().manual_seed((self.config.seed << 20) + index) for index in indices]
        extra: dict[str, Any] = {"generator": generators, "num_inference_steps": steps}
        # DiTPipeline takes any other word than "pt" for arrays, and decodes in each case.
        extra["output_type"] = "latent"
        return {**given, **{name: value for name, value in extra.items() if name in parameters}, **self.arguments}

    def _branches(self, calls: Sequence[Call], images: int) -> list[Any]:
        """The tables of the guidance branches, which are calls of their own or parts of one."""
        by_step: dict[int, list[Call]] = {}
        for call in calls:
            by_step.setdefault(call.step, []).append(call)
        branches = zip(*by_step.values(), strict=True)
        return [table_of(branch, images, number) for number, branch in enumerate(branches)]


class _Own(_Source):
    """The pipeline's own samples, of which some evaluations are kept."""

    def __init__(
        self, pipe: DiffusionPipeline, config: TrainConfig, requests: Requests, arguments: Mapping[str, Any]
    ) -> None:
        super().__init__(pipe, config, arguments)
        self.requests = requests
        self.calls = max(2, math.ceil((config.samples or SELF_SAMPLES) / config.record_batch))

    def described(self) -> dict[str, Any]:
        names = ("data", "seed", "record_batch", "evaluations", "num_inference_steps", "guidance_scale")
        settings = {name: getattr(self.config, name) for name in names}
        asked_for = {
            name: values if isinstance(values, list) else torch.as_tensor(values).tolist()
            for name, values in self.requests.items()
        }
        return {**settings, "requests": digest(asked_for), "arguments": digest(_plain(self.arguments))}

    def make(self, number: int) -> tuple[list[Any], int]:
        batch = self.config.record_batch
        steps = self.config.num_inference_steps
        # Calls of other lengths visit other timesteps; a pipeline of few steps is made for their number.
        steps += number % STEP_SPREAD if steps >= MANY_STEPS else 0
        kept = min(steps, self.config.evaluations)
        shift = (number * 0.618) % 1  # so that calls keep different evaluations
        evaluations = sorted({int((place + shift) * steps / kept) % steps for place in range(kept)})
        call = self._call(self.requests, range(number * batch, (number + 1) * batch), steps)
        calls = record(self.pipe, call, self.config.seed + number, evaluations)
        return self._branches(calls, batch), 0


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


# -- given images ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Images, and what they show.

    Args:
        count: how many.
        read: the image of a number, RGB; raises an `OSError`, `SyntaxError` or `ValueError` for one that is damaged.
        labels: class of each image, or None.
        captions: text of each image, or None.
        name: stands for the content.
    """

    count: int
    read: Callable[[int], Image.Image]
    labels: Sequence[int] | None
    captions: Sequence[str] | None
    name: str


class _Given(_Source):
    """Given images, encoded once; noise is added when they are drawn."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        config: TrainConfig,
        pictures: Pictures,
        requests: Requests | None,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__(pipe, config, arguments)
        self.pictures = pictures
        self.requests = self._asked(pictures) if requests is None else requests
        self.calls = math.ceil(pictures.count / config.record_batch)
        first = record(pipe, self._call(self.requests, range(2), 2), 0, None)
        self.noising = Noising(pipe.scheduler, first[0], config.snr_gamma)

    def _asked(self, pictures: Pictures) -> Requests:
        parameters = call_parameters(self.pipe)
        if "class_labels" in parameters and pictures.labels is not None:
            return {"class_labels": list(pictures.labels)}
        if "prompt" in parameters and pictures.captions is not None:
            return {"prompt": list(pictures.captions)}
        needed = [name for name in ("class_labels", "prompt") if name in parameters]
        is_optional = needed == ["class_labels"] and parameters["class_labels"].default is None
        if needed and not is_optional and not any("embeds" in name for name in self.arguments):
            what = "labels" if needed[0] == "class_labels" else "captions"
            raise ConfigError(
                f"{type(self.pipe).__name__} takes {needed[0]}, and the images of {self.config.data!r} have no {what}: "
                f"give {METADATA} in the folder, with lines such as {METADATA_LINE}."
            )
        return {}

    def described(self) -> dict[str, Any]:
        settings = {name: getattr(self.config, name) for name in ("seed", "record_batch", "guidance_scale")}
        asked_for = {
            name: values.tolist() if isinstance(values, torch.Tensor) else values
            for name, values in self.requests.items()
        }
        return {
            **settings,
            "images": self.pictures.name,
            "count": self.pictures.count,
            "requests": digest(asked_for),
            "arguments": digest(_plain(self.arguments)),
        }

    def make(self, number: int) -> tuple[list[Any], int]:
        batch = self.config.record_batch
        wanted = range(number * batch, min((number + 1) * batch, self.pictures.count))
        readable, images = [], []
        for index in wanted:
            try:
                images.append(ImageOps.exif_transpose(self.pictures.read(index)).convert("RGB"))
                readable.append(index)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # noqa: PERF203 - each by itself
                continue
        skipped = len(wanted) - len(images)
        if not images:
            return [], skipped
        requests = chosen(self.requests, readable)
        calls = record(self.pipe, self._call(requests, range(len(images)), 2), self.config.seed + number, None)
        sample = next(iter(calls[0].arguments))
        clean = encoded(self.pipe, images, calls[0].arguments[sample])
        for call in calls:
            call.arguments[sample] = clean.repeat(len(call.arguments[sample]) // len(images), *[1] * (clean.ndim - 1))
        return self._branches(calls, len(images)), skipped

    def check(self, skipped: int) -> None:
        if skipped > UNREADABLE * self.pictures.count:
            raise TrainingDataError(
                f"{skipped} of {self.pictures.count} images of {self.config.data!r} cannot be read, more than "
                f"{UNREADABLE:.0%}. Look at the files, or leave these out."
            )


def _pictures(config: TrainConfig) -> Pictures:
    if config.data == "zoo":
        from fastdiff.zoo.data import render

        return Pictures(
            config.samples or GLYPHS,
            lambda index: Image.fromarray(render(0, index).image),
            [render(0, index).character for index in range(config.samples or GLYPHS)],
            None,
            "glyphs",
        )
    if config.data.startswith("datasets:"):
        return _dataset(config.data, config.samples)
    folder = Path(config.data)
    if not folder.is_dir():
        raise ConfigError(
            f"There is no training data {config.data!r}: give self, zoo, a folder of images, or "
            "datasets:NAME[:SPLIT[:COLUMN]]."
        )
    return _folder(folder, config.samples)


def _folder(folder: Path, limit: int | None) -> Pictures:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:limit]
    if not paths:
        raise TrainingDataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}).")

    def read(index: int) -> Image.Image:
        with Image.open(paths[index]) as image:
            image.load()
            return image

    name = digest([[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in paths])
    labels, captions = _described(folder, paths)
    return Pictures(len(paths), read, labels, captions, name)


def _described(folder: Path, paths: Sequence[Path]) -> tuple[list[int] | None, list[str] | None]:
    """Labels and captions from a folder's metadata, where it has some for every image."""
    path = folder / METADATA
    if not path.is_file():
        return None, None
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        by_name = {line["file_name"]: line for line in lines}
        found = [by_name.get(str(image.relative_to(folder).as_posix()), {}) for image in paths]
        labels = [int(entry["label"]) for entry in found if "label" in entry]
        captions = [str(entry["text"]) for entry in found if "text" in entry]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingDataError(f"{path} cannot be read: {error}. It needs lines such as {METADATA_LINE}.") from error
    return (labels if len(labels) == len(paths) else None), (captions if len(captions) == len(paths) else None)


def _dataset(source: str, limit: int | None) -> Pictures:
    table, column = image_column(source, TrainingDataError)
    table = table.select(range(min(limit or len(table), len(table))))
    text = next((key for key in ("text", "caption", "prompt") if key in table.features), None)
    labels = table["label"][:] if "label" in table.features else None
    captions = table[text][:] if text else None
    return Pictures(len(table), lambda index: table[index][column], labels, captions, f"{source}:{table._fingerprint}")
