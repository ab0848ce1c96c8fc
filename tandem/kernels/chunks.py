"""Sequences cut into chunks, as scans go through them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """Sequences cut into chunks of ``length`` tokens, filled up with zeros: M chunks, [M, L, ...].

    First the first chunk of each, then the second of each that has one, and so on: ``counts`` says of how many. Those
    with more chunks stand before those with fewer.
    """

    length: int
    counts: list[int]
    place_T: Tensor | None = None
    """int64: where each token lies among the M L places. None: all sequences are rows of the same length."""

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, ...] → [M, L, ...]."""
        if self.place_T is not None:
            empty = x.new_zeros(sum(self.counts) * self.length, *x.shape[2:])
            return empty.index_copy_(0, self.place_T, x[0]).unflatten(0, (-1, self.length))
        steps = len(self.counts)
        filled = F.pad(x, (0, 0) * (x.ndim - 2) + (0, steps * self.length - x.shape[1]))
        return filled.unflatten(1, (steps, self.length)).transpose(0, 1).flatten(0, 1)

    def join(self, x: Tensor, tokens: int) -> Tensor:
        """[M, L, ...] → [B, T, ...]."""
        if self.place_T is not None:
            return x.flatten(0, 1).index_select(0, self.place_T)[None]
        return x.unflatten(0, (len(self.counts), -1)).transpose(0, 1).flatten(1, 2)[:, :tokens]

    @staticmethod
    def of_rows(x: Tensor, most: int) -> Chunks:
        """Of rows [B, T, ...]: as few of at most ``most`` tokens as there can be, no longer than they have to be."""
        rows, tokens = x.shape[:2]
        steps = -(-tokens // most)
        return Chunks(-(-tokens // steps), [rows] * steps)
