"""Whether this process is one of several that were started together. Imports nothing, since configs ask."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun (or SLURM in its manner) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
