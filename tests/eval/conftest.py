from __future__ import annotations

from typing import Any

import pytest

from tiny.sweeps import contents, sweep


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that a small sweep leaves when nothing happens to it."""
    return contents(sweep(tmp_path_factory.mktemp("sweep")).run())
