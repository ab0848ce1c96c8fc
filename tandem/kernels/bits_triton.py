"""The Triton kernel of ``bits.py``: one launch for many tensors, one reading of each."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels import bits

BLOCK = 2048
MOST_BLOCKS, LEAST_PROGRAMS = 16, 512
"""Blocks that a program adds up, where there are enough of them to keep a GPU busy with so many programs."""
FIELDS = 8
"""Of a job in the table, int64: address, slot, size, width, stride between rows, start, step, first program."""
VECTOR = 16
"""Bytes of the widest load, and a multiple of the elements in one: what addresses and sizes are to be divisible by."""
A, B, C = tl.constexpr(bits.A), tl.constexpr(bits.B), tl.constexpr(bits.C)
SHIFT_1, SHIFT_2 = tl.constexpr(bits.SHIFT_1), tl.constexpr(bits.SHIFT_2)
TYPES = {
    torch.float32: (tl.float32, tl.int32),
    torch.bfloat16: (tl.bfloat16, tl.int16),
    torch.float16: (tl.float16, tl.int16),
    torch.int32: (tl.int32, tl.int32),
    torch.int16: (tl.int16, tl.int16),
    torch.int8: (tl.int8, tl.int8),
    torch.uint8: (tl.uint8, tl.int8),
}


class Kind(NamedTuple):
    """What the kernel is compiled for: jobs of one kind share a launch."""

    source: torch.dtype
    wire: torch.dtype
    flat: bool
    """Whether neighbours in memory have neighbouring positions throughout."""
    aligned: bool
    """Whether it may load several elements at once."""


@dataclass(frozen=True)
class Launch:
    """Jobs of one kind. ``job_P`` is which of them each program works on, at ``blocks`` blocks of it."""

    kind: Kind
    table_JF: Tensor
    job_P: Tensor
    blocks: int

    def __call__(self, total_N: Tensor) -> None:
        """Sums of integers are the same in whatever order programs come to add theirs."""
        source, wire, flat, aligned = self.kind
        cast, word = TYPES[wire]
        _add_sums[(len(self.job_P),)](
            total_N, self.table_JF, self.job_P, self.blocks, SOURCE=TYPES[source][0], CAST=cast, WORD=word, FLAT=flat,
            DIVISOR=VECTOR if aligned else 1, FIELDS=FIELDS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def prepare(jobs: Seq[bits.Job]) -> Callable[[Tensor], None]:
    """As ``bits.prepare``, of jobs that are not empty. The values' memory is not kept alive."""
    kinds: dict[Kind, list[bits.Job]] = {}
    for job in jobs:
        kinds.setdefault(_kind(job), []).append(job)
    launches = [_launch(kind, mine) for kind, mine in kinds.items()]

    def add(total_N: Tensor) -> None:
        for launch in launches:
            launch(total_N)

    return add


def _kind(job: bits.Job) -> Kind:
    values_RC = job.values_RC
    rows, width = values_RC.shape
    flat = rows == 1 or values_RC.stride(0) == width == job.step
    aligned = flat and values_RC.data_ptr() % VECTOR == 0 and values_RC.numel() % VECTOR == 0
    return Kind(values_RC.dtype, job.dtype, flat, aligned)


def _launch(kind: Kind, jobs: Seq[bits.Job]) -> Launch:
    sizes = [job.values_RC.numel() for job in jobs]
    blocks = max(1, min(MOST_BLOCKS, triton.cdiv(sum(sizes), BLOCK) // LEAST_PROGRAMS))
    programs = [triton.cdiv(size, BLOCK * blocks) for size in sizes]
    rows: list[list[int]] = []
    first = 0
    for (slot, values_RC, _, start, step), size, count in zip(jobs, sizes, programs, strict=True):
        width, stride = values_RC.shape[1], values_RC.stride(0)
        rows.append([values_RC.data_ptr(), slot, size, width, stride, start, step, first])
        first += count
    table_JF = torch.tensor(rows, dtype=torch.int64)
    job_P = torch.arange(len(jobs), dtype=torch.int32).repeat_interleave(torch.tensor(programs))
    device = jobs[0].values_RC.device
    # Without waiting for what the device is doing; the copies are staged before these return.
    return Launch(kind, table_JF.to(device, non_blocking=True), job_P.to(device, non_blocking=True), blocks)


@triton.jit(do_not_specialize=["blocks"])
def _add_sums(  # type: ignore[no-untyped-def]
    total, table, jobs, blocks, SOURCE: tl.constexpr, CAST: tl.constexpr, WORD: tl.constexpr, FLAT: tl.constexpr,
    DIVISOR: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    job = table + tl.load(jobs + program) * FIELDS
    values = tl.multiple_of(tl.load(job).to(tl.pointer_type(SOURCE)), DIVISOR)
    slot = tl.load(job + 1)
    size = tl.multiple_of(tl.load(job + 2), DIVISOR)
    width, stride = tl.load(job + 3), tl.load(job + 4)
    start, step = tl.load(job + 5), tl.load(job + 6)
    first = (program - tl.load(job + 7)) * blocks * BLOCK
    lane = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], dtype=tl.uint32)
    for block in range(tl.minimum(tl.cdiv(size - first, BLOCK), blocks).to(tl.int32)):
        index = first + block * BLOCK + lane
        inside = index < size
        if FLAT:
            value = tl.load(values + index, mask=inside, other=0)
            position = (start + index).to(tl.uint32)
        else:
            row = index // width
            column = index - row * width
            value = tl.load(values + row * stride + column, mask=inside, other=0)
            position = (start + row * step + column).to(tl.uint32)
        mixed = value.to(CAST).to(WORD, bitcast=True).to(tl.uint32) * A + position * B
        mixed ^= mixed >> SHIFT_1
        mixed *= C
        mixed ^= mixed >> SHIFT_2
        found += tl.where(inside, mixed, 0)
    tl.atomic_add(total + slot, tl.sum(found, axis=0).to(tl.int32))
