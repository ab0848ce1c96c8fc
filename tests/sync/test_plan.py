"""Buckets hold whole layers, and tensors lie where both ends expect them."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_module

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
