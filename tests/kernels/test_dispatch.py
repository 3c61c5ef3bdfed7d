from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from fastdiff.errors import ConfigError
from fastdiff.kernels import dispatch, launch
from fastdiff.ops import KernelInputError, KernelUnavailableError, lincomb

ONE = torch.ones(1)


@pytest.fixture(autouse=True)
def fresh() -> None:
    dispatch._note.cache_clear()
    dispatch._device_obstacle.cache_clear()


def note(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fastdiff.kernels"]


def test_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="auto, triton, torch, explain"):
        lincomb(ONE, ONE)


def test_auto_takes_the_reference_on_the_cpu_and_logs_why_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        lincomb(ONE, ONE)
    assert note(caplog) == ["lincomb: reference, because the tensors are on the device 'cpu'"]


def test_explain_logs_where_it_is_seen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "explain")
    lincomb(ONE, ONE)
    lincomb(ONE, ONE)
    assert len(note(caplog)) == 1
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.usefixtures("forced")
def test_forced_kernel_runs_or_raises(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    ran = []
    module = sys.modules["fastdiff.kernels.lincomb"]
    monkeypatch.setattr(module, "run", lambda *args, run=module.run: ran.append(args) or run(*args))
    one = ONE.to(device)
    lincomb(one, one)
    assert len(ran) == 1
    with pytest.raises(KernelUnavailableError, match="FASTDIFF_KERNELS=auto"):
        lincomb(one, one.double())
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    lincomb(one, one)
    assert len(ran) == 1


def test_obstacles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.ones(1, requires_grad=True)
    if launch.triton is not None:
        assert "gradients" in dispatch.obstacle(parameter)
        with torch.no_grad():
            assert "gradients" not in dispatch.obstacle(parameter)
        assert "float64" in dispatch.obstacle(ONE, ONE.double())
    monkeypatch.setattr(launch, "triton", None)
    assert dispatch.obstacle(ONE) == "Triton is not installed"


def test_old_gpus_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(7, 5)" in dispatch._device_obstacle(torch.device("cuda", 0), False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not dispatch._device_obstacle(torch.device("cuda", 1), False)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(KernelInputError, match="cpu and meta"):
        lincomb(ONE, torch.ones(1, device="meta"))


def test_operations_work_without_triton() -> None:
    """Triton is not made for every platform."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastdiff.ops as ops\n"
        "print(ops.lincomb(torch.tensor([2.0]), torch.ones(1)).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2.0", done.stderr
