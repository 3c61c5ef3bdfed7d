"""What a sweep keeps on disk, and what becomes of damaged and unwritable files."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdiff.errors import ConfigError
from fastdiff.eval.sampling import Samples
from fastdiff.eval.speed import Turn
from fastdiff.eval.store import UNFINISHED, Store, StoreError
from fastdiff.eval.ways import parse_ways, plain
from fastdiff.eval.work import Work
from fastdiff.plan import ComputePlan

KEY = "steps-4"
SETTINGS = {"task": {"seed": 0, "shared": {"guidance_scale": 1.5}}, "batch_size": 2}


def batch(number: int = 0) -> Samples:
    draw = np.random.default_rng(number)
    return Samples(draw.integers(0, 256, (2, 8, 8, 3), np.uint8), draw.standard_normal((2, 4)).astype(np.float32))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "sweep")
    store.open(SETTINGS)
    return store


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size: writing more fails as it does on a full disk, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(store: Store) -> set[str]:
    return {path.name for path in store.folder.rglob("*") if path.is_file()}


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_images_come_back_in_order_and_cut_to_their_number(store: Store) -> None:
    for number in (1, 0):
        store.add_batch(KEY, number, batch(number), Work(10.0 + number, 0.5))
    samples = store.samples(KEY, 3, 2)
    together = Samples.joined([batch(0), batch(1)]).first(3)
    assert np.array_equal(samples.images, together.images)
    assert np.array_equal(samples.denoised, together.denoised)
    assert (store.work(KEY).macs, store.work(KEY).depth, store.work(KEY).plan) == (10.5, 0.5, None)


def test_images_without_latents(store: Store) -> None:
    store.add_batch(KEY, 0, Samples(batch().images))
    assert store.samples(KEY, 2, 2).latents is None
    assert store.work(KEY).macs is None


def test_the_plan_is_that_of_the_first_batch(store: Store) -> None:
    plans = [ComputePlan.full(rows, ["a"]) for rows in (3, 4)]
    for number in (1, 0):
        store.add_batch(KEY, number, batch(number), Work(1.0, 1.0, plans[number]))
    assert store.plan(KEY) == plans[0]


def test_missing_images_are_a_typed_error(store: Store) -> None:
    store.add_batch(KEY, 0, batch())
    with pytest.raises(StoreError, match="not all of the 3 images"):
        store.samples(KEY, 3, 2)


def test_images_as_files(store: Store, tmp_path: Path) -> None:
    store.add_batch(KEY, 0, batch())
    paths = store.export_png(KEY, tmp_path / "png", 2, 2)
    assert [path.name for path in paths] == ["00000.png", "00001.png"]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in paths]), batch().images)


def test_quality_belongs_to_its_judge(store: Store) -> None:
    judged = {"samples": 4, "features": ("zoo", 128)}
    store.set_quality(KEY, judged, {"fid": np.float32(1.5), "psnr": math.inf, "folds": np.arange(2), "by": {"x": 1}})
    assert store.quality(KEY, judged) == {"fid": 1.5, "psnr": None, "folds": [0, 1], "by": {"x": 1}}
    assert store.quality(KEY, {**judged, "samples": 5}) is None
    assert store.quality(KEY) is not None
    json.loads((store.folder / "ways" / KEY / "quality.json").read_text(), parse_constant=pytest.fail)


def test_rounds_are_kept_by_batch(store: Store) -> None:
    turns = [{"a": Turn(1.0, 0.5), "b": Turn(2.0)}, {"a": Turn(3.0, None, 7)}]
    for size, turn in ((1, turns[0]), (8, turns[1]), (1, turns[1])):
        store.add_round(size, turn, {"device": "cpu"})
    assert store.rounds(1) == turns
    assert store.rounds(8) == turns[1:]
    assert store.timed_batches == [1, 8]
    assert store.environment == {"device": "cpu"}


def test_ways_errors_notes_and_facts(store: Store) -> None:
    ways = parse_ways(["steps:4", "layer-skipping"], 8)
    for way in ways:
        store.add(way)
    assert store.way_keys() == sorted(way.key for way in ways)
    told = store.told(ways[1].key)
    assert told is not None
    assert (told["spec"], told["num_inference_steps"], told["plain"]) == ("steps:8+layer-skipping", 8, False)
    store.set_error(KEY, {"kind": "SomeError", "message": "why"})
    assert store.error(KEY) == {"kind": "SomeError", "message": "why"}
    store.set_error(KEY, None)
    assert store.error(KEY) is None
    store.set_notes(KEY, ["changed nothing"])
    assert store.notes(KEY) == ["changed nothing"]
    store.add_fact("batch", 8)
    store.add_fact("other", [1])
    assert (store.fact("batch"), store.fact("other"), store.fact("none")) == (8, [1], None)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_with_what_differs(store: Store) -> None:
    Store(store.folder).open(SETTINGS)
    other = {"task": {"seed": 1, "shared": {"guidance_scale": 1.5}}, "batch_size": 2, "new": True}
    with pytest.raises(ConfigError) as raised:
        store.open(other)
    message = str(raised.value)
    assert "task.seed is 1, there 0" in message
    assert "new is True, there None" in message
    assert "guidance_scale" not in message


def test_another_schema_is_refused(store: Store) -> None:
    path = store.folder / "settings.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 0'))
    with pytest.raises(ConfigError, match="schema_version is 1, there 0"):
        store.open(SETTINGS)


def test_results_without_settings_are_refused(store: Store) -> None:
    store.add(plain(4))
    path = store.folder / "settings.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(ConfigError, match="missing or damaged"):
        store.open(SETTINGS)
    with pytest.raises(StoreError, match="holds no sweep"):
        _ = store.settings


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_half_written_batch_is_not_there(store: Store) -> None:
    store.add_batch(KEY, 0, batch())
    path = store.folder / "ways" / KEY / "shards" / "00000.npz"
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 53), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not store.has_batch(KEY, 0), length
    path.write_bytes(whole[:900] + bytes([whole[900] ^ 255]) + whole[901:])
    assert not store.has_batch(KEY, 0)
    path.write_bytes(whole)
    assert store.has_batch(KEY, 0)


def test_pickles_are_not_read(store: Store) -> None:
    path = store.folder / "ways" / KEY / "shards" / "00000.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    assert not store.has_batch(KEY, 0)


def test_half_written_records_are_not_there(store: Store) -> None:
    store.set_quality(KEY, {}, {"fid": 1.0})
    store.add_round(1, {"a": Turn(1.0)}, {})
    store.add_round(1, {"a": Turn(2.0)}, {})
    for path in (store.folder / "ways" / KEY / "quality.json", store.folder / "timing" / "00000.json"):
        path.write_text(path.read_text()[:-3])
    assert store.quality(KEY) is None
    assert store.rounds(1) == [{"a": Turn(2.0)}]
    store.add_round(1, {"a": Turn(3.0)}, {})
    assert store.rounds(1) == [{"a": Turn(2.0)}, {"a": Turn(3.0)}]


def test_what_a_killed_process_left_is_cleared_away(store: Store) -> None:
    store.add_batch(KEY, 0, batch())
    left = [store.folder / f"tmp{UNFINISHED}", store.folder / "ways" / KEY / "shards" / f"tmp{UNFINISHED}"]
    for path in left:
        path.write_bytes(b"half")
    assert np.array_equal(store.samples(KEY, 2, 2).images, batch().images)
    store.open(SETTINGS)
    assert not any(path.exists() for path in left)


# -- places that cannot be written to ----------------------------------------------------------------------------------


def test_a_full_disk_is_a_typed_error_and_what_was_finished_is_kept(store: Store) -> None:
    store.add_batch(KEY, 0, batch())
    before = names(store)
    with file_size_limit(700), pytest.raises(StoreError, match="What was finished is kept") as raised:
        store.add_batch(KEY, 1, batch(1))
    assert isinstance(raised.value, OSError)
    with file_size_limit(10), pytest.raises(StoreError, match="quality"):
        store.set_quality(KEY, {}, {"fid": 1.0})
    assert names(store) == before
    assert store.has_batch(KEY, 0)
    store.add_batch(KEY, 1, batch(1))
    assert store.has_batch(KEY, 1)


def test_a_disk_that_is_full_when_files_are_moved(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = names(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for write in (lambda: store.add_batch(KEY, 0, batch()), lambda: store.add_fact("a", 1)):
            with pytest.raises(StoreError, match="No space left"):
                write()
    assert names(store) == before


def test_a_file_in_place_of_the_folder_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="taken"):
        Store(tmp_path / "taken")
