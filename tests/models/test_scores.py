"""Attention whose scores are bent, or share their softmax with a sink: against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tandem.models import attention
from tandem.models.attention import Ask, FlashWithSinks, PackedLayout, scored_attention
from tandem.models.sharing import Sharing, sharing_of


def by_hand(query, key, value, ask, first_key=0):
    """[Q, H, D] of one sequence, whose query i stands at ``first_key + i``: loops over heads and tokens."""
    rows = []
    for i in range(len(query)):
        heads = []
        for head in range(query.shape[1]):
            shared = head // (query.shape[1] // key.shape[1])
            start = 0 if ask.sliding_window is None else max(0, first_key + i + 1 - ask.sliding_window)
            weights, total = [], torch.zeros((), dtype=torch.float64)
            for j in range(start, first_key + i + 1):
                score = (query[i, head] * key[j, shared]).sum() * (ask.scaling or query.shape[-1] ** -0.5)
                if ask.softcap is not None:
                    score = ask.softcap * torch.tanh(score / ask.softcap)
                weights.append((score.exp(), value[j, shared]))
                total = total + score.exp()
            if ask.sinks is not None:
                total = total + ask.sinks[head].exp()
            heads.append(sum(weight * v for weight, v in weights) / total)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


ASKS = {
    "cap": Ask(0, 0.7, None, 0.9, None),
    "cap in a window": Ask(0, None, 3, 2.0, None),
    "sinks": Ask(0, 0.7, None, None, torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=torch.float64)),
    "both in a window": Ask(0, 0.7, 2, 1.3, torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=torch.float64)),
}


@pytest.mark.parametrize("few", [False, True], ids=["at once", "few scores at a time"])
@pytest.mark.parametrize("name", ASKS)
def test_packed_values_and_gradients(name, few, monkeypatch):
    if few:
        monkeypatch.setattr(attention, "SCORES", 50)
    torch.manual_seed(0)
    ask, lengths = ASKS[name], [5, 1, 7]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    query = torch.randn(1, 4, 13, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 13, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [query, key, value]
    if ask.sinks is not None:
        inputs.append(ask.sinks.clone().requires_grad_())
        ask = ask._replace(sinks=inputs[-1])
    found = PackedLayout(bounds, "cpu").attend(query, key, value, ask)[0]
    parts = [x[0].transpose(0, 1).split(lengths) for x in (query, key, value)]
    truth = torch.cat([by_hand(*part, ask) for part in zip(*parts, strict=True)])
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=1e-12)
    up = torch.randn_like(truth)
    for one, two in zip(torch.autograd.grad(found, inputs, up), torch.autograd.grad(truth, inputs, up), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


def test_a_shared_prompt_is_seen():
    """Segments that drop a prefix, of several lengths, get what they would get with it."""
    from tandem.data.packing import pack
    from tandem.types import Sequence

    ids = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 7, 7, 8]]
    batch = pack([Sequence(token_ids=i, trainable=[True] * len(i)) for i in ids], prompt_lengths=[3, 3, 3])
    sharing = sharing_of(batch)
    assert isinstance(sharing, Sharing)
    torch.manual_seed(1)
    # What a token gets depends on itself and its position: those that are shared are alike.
    table = torch.randn(3, 10, 4, 8, dtype=torch.float64)
    query, key, value = (table[i][batch.token_ids_T][:, :heads] for i, heads in ((0, 4), (1, 2), (2, 2)))
    whole, part = (
        [x.transpose(0, 1)[None] for x in rows]
        for rows in ((query, key, value), [x[sharing.kept_U] for x in (query, key, value)])
    )
    ask = ASKS["both in a window"]
    truth = PackedLayout(batch.bounds, "cpu").attend(*whole, ask)[0]
    found = PackedLayout(batch.bounds, "cpu", sharing).attend(*part, ask)[0]
    torch.testing.assert_close(sharing.expand(found), truth, atol=1e-12, rtol=1e-12)


def test_without_a_layout_padding_that_sees_nothing_is_finite():
    query = torch.randn(1, 2, 3, 4)
    mask = torch.tensor([[False, False, False], [False, True, False], [False, True, True]])[None, None]
    found = scored_attention(query, query, query, mask, ASKS["cap"])
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, :, 1], query[:, :, 1])


def test_the_flash_kernels_gradients_with_sinks(monkeypatch):
    """The backward is told a log-sum with the sink in it. The kernel's place is taken by its formulas in float64."""

    def scores(q, k, scale):
        return (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(
            torch.ones(len(q), len(k)).triu(1).bool(), -math.inf
        )

    def flash(q, k, v, *_, scale):
        score = scores(q, k, scale)
        out = torch.einsum("hij,jhd->ihd", score.softmax(-1), v)
        return out, score.logsumexp(-1), torch.zeros(1), torch.zeros(1), torch.zeros(1)

    def flash_backward(up, q, k, v, out, log_sum, *_, scale):
        weight = (scores(q, k, scale) - log_sum[..., None]).exp()
        delta = (up * out).sum(-1).T[..., None]
        of_score = weight * (torch.einsum("ihd,jhd->hij", up, v) - delta) * scale
        return (
            torch.einsum("hij,jhd->ihd", of_score, k),
            torch.einsum("hij,ihd->jhd", of_score, q),
            torch.einsum("hij,ihd->jhd", weight, up),
        )

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)
    torch.manual_seed(0)
    inputs = [torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sinks = torch.tensor([0.4, -1.0], dtype=torch.float64, requires_grad=True)
    found = FlashWithSinks.apply(*inputs, sinks, (), {"scale": 0.6})
    truth = by_hand(*inputs, Ask(0, 0.6, None, None, sinks))
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=1e-12)
    up = torch.randn_like(truth)
    found_gradients = torch.autograd.grad(found, [*inputs, sinks], up)
    for one, two in zip(found_gradients, torch.autograd.grad(truth, [*inputs, sinks], up), strict=True):
        # The sink's part goes through float32, as on a GPU.
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
