"""Whether Triton, which torch's builds for GPUs on Linux bring along, is there."""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec("triton") is not None


def on_triton(x: Tensor) -> bool:
    """Whether Triton kernels run on this tensor: it is on a GPU and Triton is there."""
    return x.is_cuda and has_triton()
