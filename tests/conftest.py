"""Set-up that every test shares."""

from __future__ import annotations

import os

# Tests run from what the repository holds. Set before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton settles this when a kernel is defined, its own included: before anything in any test imports it.
    os.environ["TRITON_INTERPRET"] = "1"

# Tiny models are slower on many threads, and one thread adds up in the same order on every machine.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
