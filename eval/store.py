"""What a sweep has finished, as files that a killed process cannot leave half-written.

A folder holds one sweep:

- ``settings.json``: what all its points have in common; other settings are refused
- ``timing/00003.json``: one round of turns
- ``facts.json``: what was found out once, such as the saturating batch
- ``ways/KEY/way.json``: what the way is
- ``ways/KEY/shards/00000.npz``: the images of a batch
- ``ways/KEY/quality.json``: what the judge says about them, and ``plan.json``: what ran
- ``ways/KEY/error.json``: why there is nothing else

Files are written under another name and moved. What cannot be read all the same counts as not there, and is made again.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdiff.errors import ConfigError, FastDiffError
from fastdiff.eval.sampling import Samples
from fastdiff.eval.speed import Turn
from fastdiff.eval.ways import Way
from fastdiff.eval.work import Work, mean_of
from fastdiff.plan import ComputePlan, write_json

SCHEMA_VERSION = 1

UNFINISHED = ".part"
"""Files that end so are being written, or were when their process ended."""


class StoreError(FastDiffError, OSError):
    """A folder that results cannot be written to or read from, such as one on a full disk."""


class Store:
    """The folder of a sweep.

    Args:
        folder: made if it is not there.

    Raises:
        StoreError: if it cannot be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        with _writing(self.folder):
            (self.folder / "ways").mkdir(parents=True, exist_ok=True)

    # -- settings ------------------------------------------------------------------------------------------------------

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make sure that what the folder holds belongs to these settings, and clear away what was left half-written.

        For one process, before any other writes.

        Raises:
            ConfigError: if it was measured with other settings, naming what differs.
            StoreError: if the folder cannot be written to.
        """
        settings = {"schema_version": SCHEMA_VERSION, **_as_json(settings)}
        path = self.folder / "settings.json"
        kept = _read(path)
        if kept is None and any((self.folder / "ways").iterdir()):
            raise ConfigError(f"{path} is missing or damaged, but there are results beside it. Choose another folder.")
        if kept is not None and (differing := list(_differences(kept, settings))):
            raise ConfigError(
                f"{self.folder} holds results with other settings: {'; '.join(differing)}. "
                "Delete it, choose another folder, or repeat the command that began it."
            )
        with _writing(self.folder):
            for left in self.folder.rglob(f"*{UNFINISHED}"):
                left.unlink()
        if kept is None:
            self._write(path, settings)

    @property
    def settings(self) -> dict[str, Any]:
        """What all points have in common.

        Raises:
            StoreError: if the folder holds no sweep.
        """
        settings = _read(self.folder / "settings.json")
        if settings is None:
            raise StoreError(f"{self.folder} holds no sweep: settings.json is missing or damaged.")
        return settings

    def fact(self, name: str) -> Any:
        """Something found out once, or None if it was not yet."""
        return (_read(self.folder / "facts.json") or {}).get(name)

    def add_fact(self, name: str, value: Any) -> None:
        """Keep something found out once."""
        self._write(self.folder / "facts.json", {**(_read(self.folder / "facts.json") or {}), name: value})

    # -- ways ----------------------------------------------------------------------------------------------------------

    def add(self, way: Way) -> None:
        """Keep what a way is; labels and groups may change later."""
        told: dict[str, Any] = {"spec": way.spec, "label": way.label, "group": way.group, "model": way.model}
        told |= {"num_inference_steps": way.num_inference_steps, "plain": way.is_plain}
        told["peer"] = None if way.peer is None else {"name": way.peer.name, "version": way.peer.version()}
        if self.told(way.key) != told:
            self._write(self._of(way.key) / "way.json", told)

    def way_keys(self) -> list[str]:
        """The ways that are kept."""
        return sorted(path.parent.name for path in (self.folder / "ways").glob("*/way.json"))

    def told(self, key: str) -> dict[str, Any] | None:
        """What a way is."""
        return _read(self._of(key) / "way.json")

    def error(self, key: str) -> dict[str, str] | None:
        """Why a way could not be sampled: ``kind`` and ``message``; None if it could, or was not yet."""
        return _read(self._of(key) / "error.json")

    def set_error(self, key: str, error: Mapping[str, str] | None) -> None:
        """Keep why a way cannot be sampled, or that it can."""
        path = self._of(key) / "error.json"
        if error is None:
            path.unlink(missing_ok=True)
        else:
            self._write(path, error)

    def notes(self, key: str) -> list[str]:
        """What is to be known about a way, such as that it changed nothing."""
        return list((_read(self._of(key) / "notes.json") or {}).get("notes", ()))

    def set_notes(self, key: str, notes: Sequence[str]) -> None:
        """Keep what is to be known about a way."""
        self._write(self._of(key) / "notes.json", {"notes": notes})

    # -- images --------------------------------------------------------------------------------------------------------

    def add_batch(self, key: str, number: int, samples: Samples, work: Work = Work()) -> None:  # noqa: B008 - frozen
        """Keep a batch of images and what it took to make them.

        Raises:
            StoreError: if it cannot be written, because the disk is full or for another reason.
        """
        numbers = {"macs": work.macs, "depth": work.depth}
        arrays = {"images": samples.images, "latents": samples.latents, **numbers}
        path = self._shard(key, number)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _save_arrays(path, {name: np.asarray(array) for name, array in arrays.items() if array is not None})
            if number == 0 and work.plan is not None:
                work.plan.save(self._of(key) / "plan.json")

    def has_batch(self, key: str, number: int) -> bool:
        """Whether a batch is there in full."""
        return _load_arrays(self._shard(key, number)) is not None

    def samples(self, key: str, count: int, batch_size: int) -> Samples:
        """The first images of a way.

        Raises:
            StoreError: if they are not all there.
        """
        parts = [_load_arrays(self._shard(key, number)) for number in range(math.ceil(count / batch_size))]
        if any(part is None for part in parts):
            raise StoreError(f"{self.folder} has not all of the {count} images of {key}. Repeat the sweep's command.")
        return Samples.joined([Samples(part["images"], part.get("latents")) for part in parts if part]).first(count)

    def work(self, key: str) -> Work:
        """What an image of a way takes, the mean over its batches."""
        parts = [_load_arrays(path, ("macs", "depth")) or {} for path in sorted(self._of(key).glob("shards/*.npz"))]
        macs, depth = (mean_of([part.get(name) for part in parts]) for name in ("macs", "depth"))
        return Work(macs, depth, self.plan(key))

    def plan(self, key: str) -> ComputePlan | None:
        """What the first batch executed, of a way with methods."""
        path = self._of(key) / "plan.json"
        return ComputePlan.load(path) if _read(path) is not None else None

    def export_png(self, key: str, folder: str | os.PathLike[str], count: int, batch_size: int) -> list[Path]:
        """Write a way's images as ``00000.png``, ``00001.png``, ...

        Raises:
            StoreError: if they are not all there, or cannot be written.
        """
        folder = Path(folder)
        paths = []
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(self.samples(key, count, batch_size).images):
                paths.append(folder / f"{index:05}.png")
                Image.fromarray(image).save(paths[-1])
        return paths

    # -- measurements --------------------------------------------------------------------------------------------------

    def quality(self, key: str, judged: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What the judge said of a way, if it looked at as many images in the same manner; None for any manner."""
        kept = _read(self._of(key) / "quality.json")
        if kept is None or (judged is not None and kept["judged"] != _as_json(judged)):
            return None
        return dict(kept["quality"])

    def set_quality(self, key: str, judged: Mapping[str, Any], quality: Mapping[str, Any]) -> None:
        """Keep what the judge says of a way; a number that is not finite is kept as None."""
        self._write(self._of(key) / "quality.json", {"judged": judged, "quality": quality})

    def add_round(self, batch: int, turns: Mapping[str, Turn], environment: Mapping[str, Any]) -> None:
        """Keep a round of turns."""
        names = [int(path.stem) for path in (self.folder / "timing").glob("*.json")]
        path = self.folder / "timing" / f"{max(names, default=-1) + 1:05}.json"
        told = {key: asdict(turn) for key, turn in turns.items()}
        self._write(path, {"batch": batch, "turns": told, "environment": environment})

    def rounds(self, batch: int) -> list[dict[str, Turn]]:
        """The rounds of turns with this batch."""
        kept = [told["turns"] for told in self._kept_rounds() if told["batch"] == batch]
        return [{key: Turn(**turn) for key, turn in turns.items()} for turns in kept]

    @property
    def timed_batches(self) -> list[int]:
        """The batches that were timed, smallest first."""
        return sorted({told["batch"] for told in self._kept_rounds()})

    @property
    def environment(self) -> dict[str, Any] | None:
        """Where the last round was timed."""
        kept = self._kept_rounds()
        return kept[-1]["environment"] if kept else None

    def _kept_rounds(self) -> list[dict[str, Any]]:
        rounds = [_read(path) for path in sorted((self.folder / "timing").glob("*.json"))]
        return [told for told in rounds if told is not None]

    # -- files ---------------------------------------------------------------------------------------------------------

    def _of(self, key: str) -> Path:
        return self.folder / "ways" / key

    def _shard(self, key: str, number: int) -> Path:
        return self._of(key) / "shards" / f"{number:05}.npz"

    def _write(self, path: Path, data: Mapping[str, Any]) -> None:
        with _writing(path):
            write_json(path, _as_json(data))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Within the block, an error of the operating system's becomes a `StoreError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{path} cannot be written: {error}. What was finished is kept: make room or choose another folder, "
            "and repeat the command."
        ) from error


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if it is not there in full."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}.") from error
    return data if isinstance(data, dict) else None


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _load_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The arrays in a file, by default all; None if they are not there in full."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if names is None or name in names}
    except (FileNotFoundError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}.") from error


def _differences(kept: Mapping[str, Any], given: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What differs, each as a path of names with both values."""
    for name in dict.fromkeys([*kept, *given]):
        old, new = kept.get(name), given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{where}{name}.")
        elif old != new:
            yield f"{where}{name} is {new!r}, there {old!r}"


def _as_json(value: Any) -> Any:
    """JSON-compatible, with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
