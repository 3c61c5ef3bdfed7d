"""Sweeps: ways that cannot be sampled, packages that calibrate themselves, and disks that fill up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fastdiff.errors import FastDiffError
from fastdiff.eval.peers import Peer, PeerUnavailableError
from fastdiff.eval.sampling import BadImageError, Samples
from fastdiff.eval.store import Store, StoreError
from fastdiff.eval.sweep import SweepError
from fastdiff.eval.ways import Way
from tiny.sweeps import KEYS, STEPS, contents, points, sweep, tiny_dit


class Refusing(Peer):
    """A package that cannot do anything."""

    name = "refusing"
    distribution = "refusing"
    module = "json"

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        raise PeerUnavailableError("it refuses")


class Failing(Refusing):
    """A package that fails in the call."""

    name = "failing"

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        hook = pipe.transformer.register_forward_hook(lambda *_: [][0])
        return hook.remove


class Idle(Refusing):
    """A package that does nothing and says so."""

    name = "idle"

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        return lambda: None

    def engaged(self, pipe: DiffusionPipeline) -> bool:
        return False


def _break(_: Any, __: Any, output: Any) -> None:
    output.sample.mul_(torch.nan)


def _dim(_: Any, __: Any, output: Any) -> None:
    output.sample.mul_(0.9)


class Breaking(Refusing):
    """A package that breaks images."""

    name = "breaking"

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        hook = pipe.transformer.register_forward_hook(_break)
        return hook.remove


@dataclass(frozen=True)
class Calibrating(Idle):
    """A package that measures something in a call before it can be enabled."""

    scale: float | None = None

    name = "calibrating"

    def prepared(self, pipe: DiffusionPipeline, num_inference_steps: int, sample: Callable[[], Any]) -> Peer:
        calls: list[Any] = []
        hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
        sample()
        hook.remove()
        return replace(self, scale=float(len(calls)))

    def _enable(self, pipe: DiffusionPipeline, num_inference_steps: int) -> Callable[[], Any]:
        assert self.scale == STEPS
        hook = pipe.transformer.register_forward_hook(_dim)
        return hook.remove

    def engaged(self, pipe: DiffusionPipeline) -> bool:
        return True


for peer in (Refusing, Failing, Idle, Breaking, Calibrating):
    Peer.registry.pop(peer.name, None)  # they are for these tests alone


@pytest.mark.parametrize("rounds", [0, 1])
def test_peers_that_cannot_run_are_listed_with_the_reason(tmp_path: Path, rounds: int) -> None:
    ways = tuple(Way(STEPS, peer=peer()) for peer in (Refusing, Failing, Idle))
    found = points(sweep(tmp_path, ways=ways, rounds=rounds).run())
    assert found["steps-4+refusing"].error == {"kind": "PeerUnavailableError", "message": "it refuses"}
    assert found["steps-4+failing"].error == {"kind": "IndexError", "message": "list index out of range"}
    assert found["steps-4+failing"].quality is None
    assert all(found[key].quality is not None and found[key].error is None for key in KEYS)
    idle = found["steps-4+idle"]
    assert idle.macs_share == pytest.approx(1)
    assert any("left nothing out" in note for note in idle.notes)
    assert any("changed nothing" in note for note in idle.notes)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_peer_that_measures_something_first_keeps_its_name(tmp_path: Path, rounds: int) -> None:
    way = Way(STEPS, peer=Calibrating())
    found = points(sweep(tmp_path, ways=(way,), rounds=rounds).run())
    assert set(found) == {*KEYS, way.key}
    assert {path.name for path in (tmp_path / "ways").iterdir()} == set(found)
    assert found[way.key].error is None
    assert found[way.key].quality is not None
    assert found[way.key].quality["error"] > 0
    assert len(found[way.key].timings) == 2 * rounds


def test_a_method_for_another_model_is_listed_with_the_reason(tmp_path: Path) -> None:
    found = points(sweep(tmp_path, ("skip-tuning", "steps:2"), rounds=1).run())
    error = found["steps-4+skip-tuning"].error
    assert error is not None
    assert "Error" in error["kind"]
    assert found["steps-2"].quality is not None


def test_bad_images_are_a_typed_error_when_all_else_is_finished(tmp_path: Path) -> None:
    ways = (Way(STEPS, peer=Breaking()),)
    with pytest.raises(SweepError, match=r"1 of 4 ways.*seed 0.*steps-4\+breaking.*not finite"):
        sweep(tmp_path, ways=ways).run()
    found = points(Store(tmp_path))
    assert found["steps-4+breaking"].error["kind"] == "BadImageError"  # type: ignore[index]
    assert all(found[key].quality is not None for key in KEYS)


def test_bad_images_of_full_sampling_end_the_sweep(tmp_path: Path) -> None:
    pipe = tiny_dit()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(BadImageError, match=r"seed 0.*steps-4,"):
        sweep(tmp_path, pipe=pipe).run()


def test_faults_of_fastdiff_itself_are_not_excused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Way.applied

    @contextmanager
    def faulty(way: Way, pipe: DiffusionPipeline) -> Iterator[Any]:
        if way.methods:
            raise ZeroDivisionError
        with made(way, pipe):
            yield

    monkeypatch.setattr(Way, "applied", faulty)
    with pytest.raises(ZeroDivisionError):
        sweep(tmp_path).run()


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, Any]
) -> None:
    replace, moved = os.replace, 0

    def full(*args: Any) -> None:
        nonlocal moved
        moved += 1
        if moved > 9:
            raise OSError(28, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match="No space left"):
            sweep(tmp_path).run()
    assert Store(tmp_path).quality("steps-4") is None
    assert Store(tmp_path).has_batch("steps-4", 1)
    assert contents(sweep(tmp_path).run()) == uninterrupted


def test_an_error_of_the_judge_keeps_the_images(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    def refusing(*_: Samples) -> dict[str, Any]:
        raise FastDiffError("the reference has another size")

    with pytest.raises(FastDiffError, match="another size"):
        sweep(tmp_path, judge=refusing).run()
    assert Store(tmp_path).has_batch("steps-4", 3)
    assert contents(sweep(tmp_path).run()) == uninterrupted
