"""Gradients are the same bits every time, with several threads too: nothing is added up as threads come."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.models import VOCABULARY, make_module, make_tokenizer
from torch import Tensor

from tandem.batch import Batch
from tandem.data.packing import pack, stamp_weights
from tandem.models.attention import Ask, PackedLayout
from tandem.models.forward import forward
from tandem.models.loading import prepare_module
from tandem.models.sharing import sharing_of
from tandem.types import Sequence

THREADS, TIMES = 4, 25
"""Threads, more than a small machine has cores; and how often, since a race does not always show."""


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def batch_of(prompts: int = 32, samples: int = 8) -> Batch:
    """Several samples of each prompt: enough that torch divides the work among threads."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()

    rows = []
    for _ in range(prompts):
        prompt = ids(16)
        rows += [[*prompt, *ids(20 + 2 * sample)] for sample in range(samples)]
    return stamp_weights(
        pack([Sequence(token_ids=row, trainable=[False] * 16 + [True] * (len(row) - 16)) for row in rows]), "token"
    )


def test_of_attention_to_prompts_that_several_share():
    batch = batch_of()
    sharing = sharing_of(batch)
    assert sharing is not None
    tokens = len(sharing.kept_U)
    layout = PackedLayout(batch.bounds, "cpu", sharing)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, tokens, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    up = torch.randn(1, tokens, 4, 16, generator=generator)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layout.attend(*inputs, Ask(0, None, None)), inputs, up)

    first = gradients()
    for _ in range(TIMES):
        for found, want in zip(gradients(), first, strict=True):
            assert torch.equal(found, want)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_of_a_model_packed_and_padded(name):
    module = make_module(name)
    model = prepare_module(module, make_tokenizer())
    assert model.packed == (name == "llama")
    batch = batch_of()

    def gradients() -> list[Tensor]:
        module.zero_grad()
        (-(forward(model, batch).logp_T * batch.weight_T).sum()).backward()
        return [p.grad.clone() for p in module.parameters()]

    first = gradients()
    for _ in range(6):
        assert all(map(torch.equal, gradients(), first))
