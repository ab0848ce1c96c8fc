"""Divergences against TRL's, float64 loops and each other, and a head's chunks against the whole in one piece."""

import math

import pytest
import torch
from torch import nn

from tandem.functional import distillation
from tandem.functional.distillation import Against
from tandem.functional.divergence import Divergence, divergence, with_tail
from tandem.functional.logprobs import chunked_head
from tandem.kernels.logprob import PLAIN, HeadShape

STUDENT = [[2.0, -1.0, 0.5, 0.0, 3.0], [0.1, 0.2, 0.3, 0.4, 0.5], [-4.0, 8.0, 1.0, 0.0, 0.0]]
TEACHER = [[1.0, 0.0, -0.5, 2.0, 2.5], [0.5, -1.2, 0.3, 1.4, 0.0], [1.0, 3.0, -2.0, 0.5, 0.1]]
# TRL 1.16 GKDTrainer.generalized_jsd_loss(beta, temperature, reduction="none"), summed over the vocabulary, float64.
GOLDEN = [
    ("forward", 0.5, 1.0, [0.5099468536280889, 0.2505422865240521, 1.396193670426261]),  # beta 0
    ("reverse", 0.5, 1.0, [0.3044028730232484, 0.2915195714555196, 0.2392002119814772]),  # beta 1
    ("jsd", 0.5, 1.0, [0.0881342153719415, 0.06413322492519777, 0.07944468601319854]),
    ("jsd", 0.1, 1.0, [0.040755509772525685, 0.022520300553994843, 0.04941824479977468]),
    ("jsd", 0.9, 2.0, [0.012212496872240117, 0.006958190826856795, 0.044342937386613206]),
    ("forward", 0.5, 2.0, [0.16354333922590467, 0.0735458569070591, 1.0665111183867804]),
]
KINDS = ("forward", "reverse", "jsd")


def logp(rows, temperature=1.0):
    return (torch.tensor(rows, dtype=torch.float64) / temperature).log_softmax(-1)


def by_loop(student, teacher, kind, beta):
    """From the definition, token by token."""

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    def one(p, q):
        if kind != "jsd":
            return kl(q, p) if kind == "forward" else kl(p, q)
        m = [(1 - beta) * a + beta * b for a, b in zip(p, q, strict=True)]
        return beta * kl(q, m) + (1 - beta) * kl(p, m)

    return [one(p, q) for p, q in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True)]


@pytest.mark.parametrize(("kind", "beta", "temperature", "expected"), GOLDEN)
def test_golden(kind, beta, temperature, expected):
    student, teacher = logp(STUDENT, temperature), logp(TEACHER, temperature)
    assert divergence(student, teacher, kind, beta).tolist() == pytest.approx(expected, abs=1e-12)
    assert by_loop(student, teacher, kind, beta) == pytest.approx(expected, abs=1e-12)


def test_jsd_goes_to_the_two_kls_and_is_symmetric_in_the_middle():
    student, teacher = logp(STUDENT), logp(TEACHER)
    forward, reverse = (divergence(student, teacher, kind) for kind in ("forward", "reverse"))
    small = 1e-6
    torch.testing.assert_close(divergence(student, teacher, "jsd", small) / small, forward, rtol=1e-2, atol=0)
    torch.testing.assert_close(divergence(student, teacher, "jsd", 1 - small) / small, reverse, rtol=1e-2, atol=0)
    torch.testing.assert_close(divergence(student, teacher, "jsd"), divergence(teacher, student, "jsd"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_one_side_never_says_counts_nothing_where_it_does_not_weigh(kind):
    never = [[0.0, 1.0, -math.inf]]
    both = divergence(logp(never), logp([[0.5, 0.0, -math.inf]]), kind)
    torch.testing.assert_close(both, divergence(logp([[0.0, 1.0]]), logp([[0.5, 0.0]]), kind))
    if kind != "reverse":
        # The teacher never says the third, and the student may.
        assert torch.isfinite(divergence(logp([[0.0, 1.0, 0.0]]), logp([[0.5, 0.0, -math.inf]]), kind)).all()


def test_a_tail_is_the_mass_of_the_others_and_less_is_seen_through_it():
    logits = torch.tensor(STUDENT, dtype=torch.float64)
    ids = torch.tensor([[4, 0], [4, 3], [1, 2]])
    found = with_tail(logits, ids)
    whole = logits.log_softmax(-1)
    torch.testing.assert_close(found[:, :2], whole.gather(-1, ids))
    torch.testing.assert_close(found[:, 2].exp(), 1 - whole.gather(-1, ids).exp().sum(-1))
    teacher = torch.tensor(TEACHER, dtype=torch.float64)
    for kind in KINDS:
        all_of_it = divergence(whole, teacher.log_softmax(-1), kind)
        assert (divergence(found, with_tail(teacher, ids), kind) <= all_of_it).all()
        most = torch.arange(4).expand(3, 4)  # the tail is one token
        torch.testing.assert_close(divergence(with_tail(logits, most), with_tail(teacher, most), kind), all_of_it)


N, D, V, WORDS = 10, 7, 23, 20
"""Rows, hidden size, and a vocabulary of which the last 3 rows are padding."""


def problem(kind, k, temperature, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    head = nn.Linear(D, V, bias=True, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(draw(V, D))
        head.bias.copy_(draw(V))
    hidden, target = draw(N, D).requires_grad_(), torch.randint(WORDS, (N,), generator=g)
    state, weight, bias = draw(N, 2 * D), draw(V + 2, 2 * D) / 2, draw(V + 2)  # the teacher's padding is its own
    ask = Divergence(kind=kind, beta=0.3, temperature=temperature)
    teacher = (state @ weight.T + bias)[:, :WORDS] / temperature
    if not k:
        return head, hidden, target, Against(ask=ask, words=WORDS, state_ND=state, head=(weight, bias)), teacher
    ids = teacher.topk(k).indices
    against = Against(ask=ask, words=WORDS, top_logp_NK=with_tail(teacher, ids), top_id_NK=ids)
    return head, hidden, target, against, teacher


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [PLAIN, HeadShape(0.7), HeadShape(1.3, 2.5)])
def test_a_chunked_head_gives_value_and_gradient_of_the_whole(kind, k, chunk, shape, monkeypatch):
    monkeypatch.setattr(distillation, "BLOCK_BYTES", {"cpu": 4 * V * 3})  # blocks of 3 rows
    temperature, weights = 1.7, torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    head, hidden, target, against, teacher = problem(kind, k, temperature)
    leaves = [hidden, head.weight, head.bias]

    logits = shape.scale * (hidden @ head.weight.T + head.bias)
    logits = logits if shape.cap is None else shape.cap * torch.tanh(logits / shape.cap)
    logp = (logits / 0.8).log_softmax(-1).gather(1, target[:, None])[:, 0]
    student, other = (logits[:, :WORDS] / temperature).log_softmax(-1), teacher.log_softmax(-1)
    if k:
        groups = [(row, [t for t in range(WORDS) if t not in row]) for row in against.top_id_NK.tolist()]

        def grouped(x):
            return torch.stack(
                [torch.stack([*x[i, top].exp(), x[i, rest].exp().sum()]).log() for i, (top, rest) in enumerate(groups)]
            )

        student, other = grouped(student), grouped(other)
    expected = divergence(student, other, kind, 0.3)
    assert by_loop(student.detach(), other, kind, 0.3) == pytest.approx(expected.tolist(), abs=1e-12)

    for head_like, both in ((head, True), (head, False), (lambda x: x @ head.weight.T + head.bias, True)):
        found = chunked_head(
            head_like, hidden, target, temperature=0.8, chunk_tokens=chunk, against=against, entropy=True, shape=shape
        )
        torch.testing.assert_close(found.divergence_N, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.logp_N, logp, rtol=0, atol=1e-12)
        share = 0.4 if both else 0.0
        got = torch.autograd.grad((found.divergence_N * weights - share * found.logp_N).sum(), leaves)
        wanted = torch.autograd.grad((expected * weights - share * logp).sum(), leaves, retain_graph=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not got[1][WORDS:].any() if not share else got[1][WORDS:].any()


def test_no_more_logits_exist_than_a_chunk_has(monkeypatch):
    """Neither of the student nor of the teacher."""
    head, hidden, target, against, _ = problem("jsd", 0, 1.0)
    rows = []
    whole = distillation.products.linear

    def watched(x, *rest):
        rows.append(len(x))
        return whole(x, *rest)

    monkeypatch.setattr(distillation.products, "linear", watched)
    chunked_head(head, hidden, target, chunk_tokens=4, against=against).divergence_N.sum().backward()
    assert max(rows) == 4
    assert sum(rows) > 2 * N


def test_bfloat16_is_compared_in_float32():
    head, hidden, target, against, teacher = problem("forward", 3, 1.0)
    found = chunked_head(head.bfloat16(), hidden.detach().bfloat16(), target, against=against).divergence_N
    assert found.dtype == torch.float32
    logits = head(hidden.detach().bfloat16())[:, :WORDS].double()
    exact = divergence(with_tail(logits, against.top_id_NK), with_tail(teacher, against.top_id_NK), "forward")
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
