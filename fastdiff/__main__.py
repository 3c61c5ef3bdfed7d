"""``python -m fastdiff`` is the `fastdiff` command."""

from __future__ import annotations

import sys

from fastdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
