"""Sums over the raw bits of a tensor, of which checksums are made."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.available import on_triton

CHUNK = 1 << 24


def moments(words_N: Tensor) -> Tensor:
    """int64 [2] on the words' device: sum of int16 words, and of their squares, modulo 2^64."""
    if on_triton(words_N):
        from tandem.kernels import bits_triton

        return bits_triton.moments(words_N)
    total = torch.zeros(2, dtype=torch.int64, device=words_N.device)
    for chunk in words_N.split(CHUNK):
        wide = chunk.int()
        total += torch.stack((chunk.sum(dtype=torch.int64), (wide * wide).sum(dtype=torch.int64)))
    return total
