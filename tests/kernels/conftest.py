"""Kernels run on a GPU where there is one, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

from fastdiff.kernels import launch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation runs its kernel or raises."""
    pytest.importorskip("triton")
    assert torch.cuda.is_available() or launch.INTERPRETED, "fastdiff.kernels was imported before TRITON_INTERPRET=1"
    monkeypatch.setenv("FASTDIFF_KERNELS", "triton")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an operation allocates without filling it holds NaN, so that what a kernel leaves out shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        allocate = getattr(torch, name)

        def filled(*args, allocate=allocate, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, filled)
