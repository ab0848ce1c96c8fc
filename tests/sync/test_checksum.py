"""Checksums are the sum that they say, add up over parts, and see what a sum of bits alone does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tandem.kernels import bits
from tandem.sync.checksum import MODULUS, ParameterSums
from tandem.sync.plan import plan_of

DTYPES = [torch.float32, torch.bfloat16]


def by_hand(tensor: Tensor) -> int:
    """The formula, an element at a time, in Python's integers."""
    total = 0
    words = tensor.reshape(-1).view({4: torch.int32, 2: torch.int16}[tensor.dtype.itemsize]).tolist()
    for position, word in enumerate(words):
        x = (word * 0x2C1B3C6D + position * 0x61C88647) % MODULUS
        x ^= x >> 12
        x = x * 0x297A2D39 % MODULUS
        total += x ^ x >> 15
    return total % MODULUS


def sums_of(slots: int, *jobs: bits.Job) -> list[int]:
    total = torch.zeros(slots, dtype=torch.int32)
    bits.prepare(jobs)(total)
    return [x % MODULUS for x in total.tolist()]


def checksum(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    return sums_of(1, bits.Job(0, tensor.reshape(1, -1), dtype or tensor.dtype))[0]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [7, 1 << 17])
def test_the_checksum_is_the_sum_that_it_says(dtype, chunk, monkeypatch):
    monkeypatch.setattr(bits, "CHUNK", chunk)
    tensor = random(9, 12, dtype=dtype)
    assert checksum(tensor) == by_hand(tensor)
    assert checksum(tensor.float(), torch.bfloat16) == by_hand(tensor.bfloat16())


@pytest.mark.parametrize("chunk", [7, 1 << 17])
def test_parts_add_up_wherever_they_lie(chunk, monkeypatch):
    """Rows of a shard, columns of a tensor-parallel rank, rows inside a fused parameter."""
    monkeypatch.setattr(bits, "CHUNK", chunk)
    tensor = random(9, 12)
    fused = torch.cat([random(2, 12), tensor, random(3, 12)])
    for parts in (
        [(tensor[:4].reshape(1, -1), 0, 0), (tensor[4:].reshape(1, -1), 48, 0)],
        [(tensor[:, :5], 0, 12), (tensor[:, 5:].contiguous(), 5, 12)],
        [(fused[2:11], 0, 12)],
    ):
        jobs = [bits.Job(1, values, tensor.dtype, start, step) for values, start, step in parts]
        assert sums_of(2, *jobs) == [0, by_hand(tensor)]


def swapped(tensor: Tensor, a: slice | int, b: slice | int) -> Tensor:
    other = tensor.clone()
    other[a], other[b] = tensor[b], tensor[a]
    return other


def with_bits(tensor: Tensor, index: int, flip: int) -> Tensor:
    other = tensor.clone()
    words = other.view(-1).view({4: torch.int32, 2: torch.int16}[tensor.dtype.itemsize])
    words[index] ^= flip
    return other


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "two rows swapped": lambda t: swapped(t, 3, 11),
    "two heads swapped": lambda t: swapped(t, slice(0, 8), slice(8, 16)),
    "transposed": lambda t: t.t().contiguous(),
    # Rounded afterwards: a bfloat16 number times 1.001 is the same bfloat16 number.
    "times 1.001": lambda t: (random(*t.shape) * 1.001).to(t.dtype),
    "one sign": lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 77, -t, t),
    "all signs": lambda t: -t,
    "rolled by one": lambda t: t.roll(1),
    "the lowest bit of one": lambda t: with_bits(t, 5, 1),
    "two neighbours swapped": lambda t: swapped(t.view(-1), 8, 9).view(t.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_it_sees(fault, dtype):
    tensor = random(32, 32, dtype=dtype)
    assert checksum(FAULTS[fault](tensor)) != checksum(tensor)


def test_differences_are_spread_over_all_values():
    """Of two signs swapped in 3,000 ways no two give the same difference but by chance (2^-32 each pair of ways)."""
    tensor = random(100, dtype=torch.bfloat16)
    words = tensor.view(torch.int16)
    truth = checksum(tensor)
    found = set()
    for i in range(3000):
        a, b = i % 99, i % 99 + 1 + (i // 99) % (99 - i % 99)
        other = words.clone()
        other[a] ^= -(2**15)
        other[b] ^= -(2**15)
        found.add((a, b, (checksum(other.view(torch.bfloat16)) - truth) % MODULUS))
    differences = {difference for *_, difference in found}
    assert 0 not in differences
    assert len(differences) >= len(found) - 1


@pytest.mark.parametrize(("overlap", "at_once"), [(True, [1, 1, 1]), (False, [3])])
def test_what_is_prepared_is_played_back_until_a_tensor_moves(overlap, at_once, monkeypatch):
    """Values that change where they lie, memory that is given away and comes back elsewhere, and other memory."""
    prepared: list[int] = []

    def counted(jobs, **options):
        prepared.append(len(jobs))
        return prepare(jobs, **options)

    prepare = bits.prepare
    monkeypatch.setattr(bits, "prepare", counted)
    parameters = {"a": random(9, 12), "b": random(5), "none": random(0, 4)}
    sums = ParameterSums(parameters, plan_of(parameters.items(), bucket_bytes=1), torch.device("cpu"), overlap)

    def are_right() -> bool:
        return sums.now() == {name: by_hand(tensor) for name, tensor in parameters.items()}

    assert are_right()
    for tensor in parameters.values():
        tensor.mul_(1.5)
    assert are_right()
    assert prepared == at_once
    storage, kept = parameters["a"].untyped_storage(), parameters["a"].clone()
    storage.resize_(0)
    elsewhere = random(9, 12)
    storage.resize_(kept.nbytes + 4096)
    parameters["a"].copy_(kept)
    assert are_right()
    parameters["b"].data = elsewhere[0, :5].clone()
    assert are_right()
    assert prepared in (at_once * 3, at_once * 2)


@pytest.mark.parametrize("overlap", [True, False])
def test_copies_made_to_be_summed_are_made_for_every_push(overlap):
    """A parameter whose elements are no neighbours, as one that lies on the CPU and is summed on a GPU; and others."""
    parameters = {"a": random(9, 12), "b": random(9, 12).t(), "c": random(5)}
    sums = ParameterSums(parameters, plan_of(parameters.items(), bucket_bytes=1), torch.device("cpu"), overlap)
    for _ in range(3):
        for tensor in parameters.values():
            tensor.mul_(1.5)
        assert sums.now() == {name: by_hand(tensor.contiguous()) for name, tensor in parameters.items()}
