"""Buckets hold whole layers, tensors lie where both ends expect them, and checksums add up."""

from __future__ import annotations

import pytest
import torch
from conftest import make_module

from tandem.sync.checksum import add, checksum
from tandem.sync.plan import ALIGNMENT, plan_of, used, views


def layer_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else name


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 1 << 30])
def test_a_layer_is_never_cut_and_nothing_is_lost(bucket_bytes):
    module = make_module("llama")
    plan = plan_of(module.named_parameters(), torch.bfloat16, bucket_bytes=bucket_bytes)
    assert [spec.name for bucket in plan.buckets for spec in bucket] == [n for n, _ in module.named_parameters()]
    homes: dict[str, set[int]] = {}
    for number, bucket in enumerate(plan.buckets):
        for spec in bucket:
            homes.setdefault(layer_of(spec.name), set()).add(number)
    assert all(len(numbers) == 1 for numbers in homes.values())
    assert plan.nbytes == 2 * sum(p.numel() for p in module.parameters())
    assert len(plan.buckets) == {1: len(homes), 1 << 30: 1}.get(bucket_bytes, len(plan.buckets))


def test_views_are_aligned_apart_and_inside_the_buffer():
    plan = plan_of(make_module("gpt_neox").named_parameters())
    buffer = torch.zeros(plan.buffer_bytes, dtype=torch.uint8)
    for bucket in plan.buckets:
        tensors = views(bucket, buffer)
        for i, (_, tensor) in enumerate(tensors):
            assert (tensor.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0
            tensor.fill_(i + 1)
        assert all((tensor == i + 1).all() for i, (_, tensor) in enumerate(tensors))
        end = tensors[-1][1].data_ptr() + tensors[-1][1].nbytes - buffer.data_ptr()
        assert end <= used(bucket, buffer).numel()


def test_tied_parameters_travel_once():
    module = make_module("gemma2_softcap")
    names = [spec.name for spec in plan_of(module.named_parameters()).tensors]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_add_up_and_see_one_bit(dtype):
    tensor = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = [checksum(part) for part in tensor.split([3, 4])]
    assert add(parts) == checksum(tensor)
    assert add([checksum(part) for part in tensor.split([5, 7], dim=1)]) == checksum(tensor)
    padded = torch.cat([tensor, tensor.new_zeros(2, 12)])
    assert checksum(padded)[:2] == checksum(tensor)[:2]
    flipped = tensor.clone()
    flipped.view(-1).view(torch.int16)[5] ^= 1
    assert checksum(flipped)[:2] != checksum(tensor)[:2]


def test_the_checksum_is_the_sum_that_it_says(monkeypatch):
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(1)).bfloat16()
    words = tensor.view(torch.int16).tolist()
    expected = (sum(words) % 2**63, sum(w * w for w in words) % 2**63, 50)
    assert checksum(tensor) == expected
    monkeypatch.setattr("tandem.kernels.bits.CHUNK", 7)
    assert checksum(tensor) == expected
