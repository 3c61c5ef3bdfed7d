from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from fastdiff.uem.train import train
from tiny.training import small, tiny_dit


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where training data lies, so that it is made once."""
    return tmp_path_factory.mktemp("training-data")


@pytest.fixture
def trained(cache: Path) -> Callable[..., dict[str, Any]]:
    """Trains for a tiny DiT."""

    def run(out: Path, *, pipe: DiffusionPipeline | None = None, stop_at: int | None = None, **settings: Any) -> Any:
        return train(pipe or tiny_dit(), small(**settings), out, cache=cache, stop_at=stop_at)

    return run
