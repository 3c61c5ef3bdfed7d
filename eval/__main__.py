"""``accelerate launch -m fastdiff.eval ...``: `fastdiff eval` for launchers that start a module."""

from __future__ import annotations

import sys

from fastdiff.cli.evaluate import main

sys.exit(main())
