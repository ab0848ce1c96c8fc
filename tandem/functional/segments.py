"""Sums and means inside the segments of a packed [T] tensor.

``bounds`` is int64 [S + 1]: segment ``s`` is ``[bounds[s], bounds[s + 1])``. Each segment is added up by itself, in
the order of its tokens, so a result does not depend on what the segment is packed with.
"""

from __future__ import annotations

from torch import Tensor, segment_reduce


def segment_sum(x_T: Tensor, bounds: Tensor) -> Tensor:
    """Sum of each segment, [S], in the dtype of ``x_T``."""
    return segment_reduce(x_T, "sum", offsets=bounds.to(x_T.device), initial=0)


def segment_mean(x_T: Tensor, mask_T: Tensor, bounds: Tensor) -> Tensor:
    """Mean over each segment's tokens where ``mask_T`` is true, [S]; 0 for a segment with none."""
    mask_T = mask_T.to(x_T.dtype)
    return segment_sum(x_T * mask_T, bounds) / segment_sum(mask_T, bounds).clamp(min=1)
