"""Sums inside the segments of a packed [T] tensor.

``bounds`` is int64 [S + 1]: segment ``s`` is ``[bounds[s], bounds[s + 1])``. Each segment is added up by itself, in
the order of its tokens, so a result does not depend on what the segment is packed with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def segment_sum(x_T: Tensor, bounds: Tensor) -> Tensor:
    """Sum of each segment, [S], in the dtype of ``x_T``."""
    return torch.segment_reduce(x_T, "sum", offsets=bounds.to(x_T.device), initial=0)
