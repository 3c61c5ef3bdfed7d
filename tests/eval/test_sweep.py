"""Sweeps: what is compared, what is measured again, and what an interruption costs.

Run as a script it is a small sweep into a folder, to be killed or started by a launcher.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState

from fastdiff.errors import ConfigError, FastDiffError
from fastdiff.eval.processes import OtherProcessError
from fastdiff.eval.sampling import BadImageError
from fastdiff.eval.store import Store
from fastdiff.eval.sweep import Settings, Sweep, steps_in_time
from fastdiff.eval.tasks import make_task
from fastdiff.eval.ways import parse_ways
from tiny.sweeps import KEYS, SPECS, STEPS, contents, judge, points, sweep, tiny_dit

# -- what is compared --------------------------------------------------------------------------------------------------


def test_every_way_is_sampled_judged_and_accounted_for(tmp_path: Path) -> None:
    found = points(sweep(tmp_path, rounds=2).run())
    assert sorted(found) == sorted(KEYS)
    full, fewer, method = (found[key] for key in ("steps-4", "steps-2", "steps-4+feature-inheritance"))
    assert full.is_baseline
    assert full.way["group"] == "full"
    assert full.quality is not None
    assert (full.quality["error"], full.quality["samples"]) == (0, 7)
    assert method.quality is not None
    assert method.quality["error"] > 0
    assert full.macs_share == 1
    assert fewer.macs_share == pytest.approx(0.5, rel=0.01)
    assert method.macs_share == pytest.approx(method.plan.share, rel=0.1)  # type: ignore[union-attr]
    assert method.depth == method.plan.share  # type: ignore[union-attr]
    for point in found.values():
        assert sorted(point.timings) == [1, 2]
        assert {timing.speedup.pairs for timing in point.timings.values()} == {2}
        assert all(timing.denoiser is not None for timing in point.timings.values())
        assert all(t.denoiser.seconds < t.pipeline.seconds for t in point.timings.values())  # type: ignore[union-attr]
        assert all(timing.peak_bytes is None for timing in point.timings.values())
    assert full.timings[1].speedup.median == 1


def test_counted_macs_are_those_of_the_record(tmp_path: Path) -> None:
    # Plain sampling's are counted while it runs, a method's come from fastdiff's record of what ran.
    found = points(sweep(tmp_path, ("feature-inheritance:interval=2,min-evaluations=9",)).run())
    neutral = found["steps-4+feature-inheritance-min-evaluations=9"]
    assert neutral.macs == pytest.approx(found["steps-4"].macs, rel=0.01)
    assert any("skipped nothing" in note for note in neutral.notes)
    assert any("changed nothing" in note for note in neutral.notes)


def test_several_pipelines_have_their_own_baselines(tmp_path: Path) -> None:
    other = tiny_dit()
    with torch.no_grad():
        other.transformer.proj_out_2.weight.mul_(1.5)
    pipes = {"main": tiny_dit(), "tuned": other}
    ways = [*parse_ways(SPECS, STEPS), *parse_ways(["steps:2"], STEPS, model="tuned")]
    task = make_task(other, class_labels=[1], guidance_scale=1.5)
    settings = Settings(num_inference_steps=STEPS, num_samples=2, batch_size=2, rounds=0)
    found = points(Sweep(pipes, ways, task, judge, tmp_path, settings, progress=False).run())
    assert sorted(found) == [*KEYS, "tuned+steps-2", "tuned+steps-4"]
    assert found["tuned+steps-2"].baseline == "tuned+steps-4"
    assert found["tuned+steps-4"].quality["error"] == 0  # type: ignore[index]
    assert found["tuned+steps-2"].quality != found["steps-2"].quality
    with pytest.raises(ConfigError, match="tuned"):
        Sweep(other, ways, task, judge, tmp_path, settings, progress=False)


def test_plain_sampling_that_takes_the_same_time_is_compared(tmp_path: Path) -> None:
    store = sweep(tmp_path, ("feature-inheritance:interval=2",), rounds=1, matches=True).run()
    point = points(store)["steps-4+feature-inheritance"]
    assert point.same_time in {f"steps-{steps}" for steps in range(1, STEPS + 1)}
    match = points(store)[point.same_time]
    assert match.quality is not None
    assert match.timings
    kept = store.fact("matches")
    assert sweep(tmp_path, ("feature-inheritance:interval=2",), rounds=3, matches=True).run().fact("matches") == kept


@pytest.mark.parametrize(("share", "steps"), [(0.55, 10), (1.0, 20), (0.775, 15), (1.7, 20), (0.0, 1), (0.275, 5)])
def test_steps_in_the_same_time(share: float, steps: int) -> None:
    assert steps_in_time(share, {20: 1.0, 10: 0.55}) == steps


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_inference_steps", 0), ("num_samples", 0), ("batch_size", 0), ("rounds", -1), ("timing_batch", 0)],
)
def test_settings_that_are_too_small_are_a_typed_error(name: str, value: int) -> None:
    given = {"num_inference_steps": 4, "num_samples": 2, "batch_size": 2, name: value}
    with pytest.raises(ConfigError, match=name):
        Settings(**given)


# -- what is measured again --------------------------------------------------------------------------------------------


def files(store: Store) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in store.folder.rglob("*.*") if path.is_file()}


def test_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    before = files(sweep(tmp_path, rounds=1).run())
    assert files(sweep(tmp_path, rounds=1).run()) == before


def test_more_ways_are_timed_against_full_sampling_in_the_same_rounds(tmp_path: Path) -> None:
    sweep(tmp_path, ("steps:2",), rounds=2).run()
    store = sweep(tmp_path, ("steps:2", "steps:3"), rounds=2).run()
    held = [sorted(turns) for turns in store.rounds(1)]
    assert held == [["steps-2", "steps-4"]] * 2 + [["steps-3", "steps-4"]] * 2
    assert points(store)["steps-4"].timings[1].speedup.pairs == 4


def test_more_images_change_none(tmp_path: Path) -> None:
    few = sweep(tmp_path, num_samples=3).run().samples("steps-2", 3, 2)
    store = sweep(tmp_path, num_samples=7).run()
    assert np.array_equal(store.samples("steps-2", 7, 2).images[:3], few.images)
    assert store.quality("steps-2")["samples"] == 7  # type: ignore[index]


def test_another_judge_sees_the_same_images(tmp_path: Path) -> None:
    shards = {path: age for path, age in files(sweep(tmp_path, judged={"by": 1}).run()).items() if "shards" in path}
    store = sweep(tmp_path, judged={"by": 2}, judge=lambda *_: {"other": 1}).run()
    assert {path: age for path, age in files(store).items() if "shards" in path} == shards
    assert store.quality("steps-2") == {"other": 1}


def test_other_settings_and_other_weights_are_refused(tmp_path: Path) -> None:
    sweep(tmp_path, ("steps:2",)).run()
    with pytest.raises(ConfigError, match=r"task\.seed is 5, there 0"):
        sweep(tmp_path, ("steps:2",), seed=5).run()
    changed = tiny_dit()
    with torch.no_grad():
        changed.transformer.proj_out_2.weight[0, 0] += 1e-3
    with pytest.raises(ConfigError, match=r"models\.main\.weights\.transformer is"):
        sweep(tmp_path, ("steps:2",), pipe=changed).run()
    changed = tiny_dit()
    changed.scheduler = type(changed.scheduler).from_config(changed.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ConfigError, match="timestep_spacing is 'trailing'"):
        sweep(tmp_path, ("steps:2",), pipe=changed).run()


# -- interruptions -----------------------------------------------------------------------------------------------------


def alone(work: Callable[[], Any]) -> Any:
    """Run something in a process of its own."""
    process = get_context("fork").Process(target=work)
    process.start()
    return process


def kill_at(count: int, *, before: bool, **settings: Any) -> Callable[[], None]:
    """A sweep that kills itself when it moves its n-th file, before or after it has."""

    def run() -> None:
        replace, moved = os.replace, 0

        def killing(*args: Any) -> None:
            nonlocal moved
            moved += 1
            if not before or moved < count:
                replace(*args)
            if moved == count:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = killing  # type: ignore[assignment]
        sweep(**settings).run()

    return run


# The settings are the first file, four rounds follow, three ways, notes and batches of full sampling, and so on.
@pytest.mark.parametrize(("count", "before"), [(1, True), (3, False), (6, True), (12, False), (13, True), (17, True)])
def test_a_killed_sweep_goes_on_to_the_same_numbers(
    tmp_path: Path, uninterrupted: dict[str, Any], count: int, before: bool
) -> None:
    process = alone(kill_at(count, before=before, folder=tmp_path, rounds=2))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    store = sweep(tmp_path, rounds=2).run()
    assert contents(store) == uninterrupted
    assert len(list((tmp_path / "timing").glob("*.json"))) == 4
    assert not list(tmp_path.rglob("*.part"))


def test_a_sweep_killed_at_any_moment_with_damaged_files_goes_on(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    for pause in (0.0, 0.13, 0.31):
        started = len(list(tmp_path.rglob("*.npz")))
        process = alone(lambda: sweep(tmp_path).run())
        deadline = time.monotonic() + 60
        while process.is_alive() and len(list(tmp_path.rglob("*.npz"))) <= started and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    shard = min(tmp_path.rglob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:1000])
    (shard.parent / "00003.npz").write_bytes(b"PK")
    for quality in tmp_path.rglob("quality.json"):
        quality.write_text(quality.read_text()[:30])
    assert contents(sweep(tmp_path).run()) == uninterrupted


# -- processes ---------------------------------------------------------------------------------------------------------


def launched(rank: int, port: int, folder: Path, said: Any, options: dict[str, Any]) -> None:
    """One of two processes, as a launcher starts them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    PartialState._reset_state()
    try:
        sweep(folder, **options).run()
        said.put((rank, torch.distributed.get_backend()))
    except FastDiffError as error:
        said.put((rank, type(error).__name__))


def run_two(folder: Path, **options: Any) -> list[str]:
    """What two processes say in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    said: Any = context.Queue()
    both = [context.Process(target=launched, args=(rank, port, folder, said, options)) for rank in range(2)]
    for process in both:
        process.start()
    heard = sorted(said.get(timeout=120) for _ in both)
    for process in both:
        process.join(60)
    return [what for _, what in heard]


def test_two_processes_make_the_same_images_as_one(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    assert run_two(tmp_path, rounds=1) == ["gloo", "gloo"]
    assert contents(Store(tmp_path)) == uninterrupted
    assert len(Store(tmp_path).rounds(1)) == 1


def test_an_error_in_one_process_ends_both(tmp_path: Path) -> None:
    pipe = tiny_dit()
    decode = pipe.vae.decode
    # Full sampling's second batch is the second process's.
    pipe.vae.decode = lambda latents, **kwargs: decode(latents * (torch.nan if is_second() else 1), **kwargs)

    def is_second() -> bool:
        return os.environ.get("RANK") == "1"

    assert run_two(tmp_path, pipe=pipe) == [OtherProcessError.__name__, BadImageError.__name__]


@pytest.mark.slow
def test_accelerate_launches_a_sweep(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    # On CPUs, too: --cpu leaves starting several processes to MPI, --multi_gpu does it by torchrun.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {"processes": 2}
    assert contents(Store(tmp_path)) == uninterrupted


if __name__ == "__main__":
    torch.set_num_threads(1)
    sweep(Path(sys.argv[1])).run()
    if PartialState().is_main_process:
        print(json.dumps({"processes": PartialState().num_processes}))
