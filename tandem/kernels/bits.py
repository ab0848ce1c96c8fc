"""A sum over a tensor's bits that knows where each element belongs, and adds up over parts: what checksums are made of.

    sum = Σ mix(word_e · A + position_e · B)  mod 2^32,    mix(x): x ^= x >> 12; x *= C; x ^= x >> 15

``word_e`` is an element's bits as a signed integer, ``position_e`` its place in the whole tensor, shifts are logical.
Without the mixing it would be linear, and a change of sign bits alone could cancel. The constants are odd: A, C and the
shifts are those of a hash of 32 bits (github.com/skeeto/hash-prospector), B is 2^32 divided by the golden ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.kernels.available import on_triton

A, B, C = 0x2C1B3C6D, 0x61C88647, 0x297A2D39
SHIFT_1, SHIFT_2 = 12, 15
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Whole numbers as wide as an element, by its bytes."""
CHUNK = 1 << 15
"""Elements at a time on a CPU. What is computed on the way stays in a core's cache, and torch keeps so few on one
thread. Several, which wait for each other a dozen times a chunk, took 100 times as long on cores that were busy."""


class Job(NamedTuple):
    """Elements whose sum is added to ``total_N[slot]``.

    They are cast to ``dtype`` first. Element (r, c) has position ``start + r * step + c`` in its tensor. Columns are
    neighbours in memory (stride 1), rows need not be.
    """

    slot: int
    values_RC: Tensor
    dtype: torch.dtype
    start: int = 0
    step: int = 0


def prepare(jobs: Seq[Job]) -> Callable[[Tensor], None]:
    """What adds the sums of all jobs, of the values that they have then, to a ``total_N`` (int32, modulo 2^32).

    All of it is on one device. On a GPU it is a launch for all jobs of the same dtypes, which knows addresses only:
    whoever calls it sees to it that the values still lie where they lay when it was prepared.
    """
    jobs = [job for job in jobs if job.values_RC.numel()]
    if jobs and on_triton(jobs[0].values_RC):
        from tandem.kernels import bits_triton

        return bits_triton.prepare(jobs)
    return partial(_add, jobs)


def _add(jobs: Seq[Job], total_N: Tensor) -> None:
    for slot, values_RC, dtype, start, step in jobs:
        rows, width = values_RC.shape
        if step == width and values_RC.is_contiguous():
            rows, width = 1, rows * width
            values_RC = values_RC.view(1, width)
        place_c = torch.arange(min(width, CHUNK), dtype=torch.int32) * B
        high = max(1, CHUNK // width)
        for row in range(0, rows, high):
            for column in range(0, width, CHUNK):
                part = values_RC[row : row + high, column : column + CHUNK]
                first_R1 = (torch.arange(row, row + part.shape[0])[:, None] * step + start + column) * B
                mixed = part.to(dtype).contiguous().view(WORDS[dtype.itemsize]).int() * A
                mixed += place_c[: part.shape[1]]
                mixed += first_R1.int()
                mixed ^= _shifted(mixed, SHIFT_1)
                mixed *= C
                mixed ^= _shifted(mixed, SHIFT_2)
                total_N[slot] += mixed.sum().int()


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right of int32, which torch shifts arithmetically."""
    return (x >> by) & ((1 << (32 - by)) - 1)
