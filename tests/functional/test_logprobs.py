"""Token log-probs against TRL, float64 log_softmax and themselves in one piece."""

import math

import pytest
import torch

from tandem.functional import logprobs
from tandem.functional.logprobs import chunked_head
from tandem.kernels.logprob import PLAIN, HeadShape

LOGITS = torch.tensor(
    [[2.0, -1.0, 0.5, 0.0, 3.0], [0.1, 0.2, 0.3, 0.4, 0.5], [-4.0, 8.0, 1.0, 0.0, 0.0]], dtype=torch.float64
)
TARGET = torch.tensor([4, 0, 2])


def identity(x):
    return x


def chunked_logprobs(head, hidden, target, *, entropy=True, **options):
    return chunked_head(head, hidden, target, entropy=entropy, **options)[:2]


def linear(hidden=7, vocab=11, rows=10, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, hidden, generator=g, dtype=dtype, requires_grad=True)
    x = torch.randn(rows, hidden, generator=g, dtype=dtype, requires_grad=True)
    target = torch.randint(vocab, (rows,), generator=g)
    return weight, x, target


def test_golden_from_trl():
    # TRL 1.16 trainer/utils.py: selective_log_softmax(temperature=0.7), entropy_from_logits(logits / 0.7), float64.
    logp, entropy = chunked_logprobs(identity, LOGITS, TARGET, temperature=0.7)
    expected_logp = torch.tensor([-0.25062562675138533, -1.9154708462374281, -10.000067193840854], dtype=torch.float64)
    expected_entropy = torch.tensor([0.6558219294144119, 1.5892968584152718, 0.000770450028140637], dtype=torch.float64)
    torch.testing.assert_close(logp, expected_logp, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10, 2048])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_equals_float64_log_softmax(chunk_tokens, temperature):
    weight, x, target = linear()
    logp, entropy = chunked_logprobs(
        lambda h: h @ weight.T, x, target, temperature=temperature, chunk_tokens=chunk_tokens
    )
    full = ((x.double() @ weight.double().T) / temperature).log_softmax(-1)
    assert logp.dtype == entropy.dtype == torch.float32
    # float32 rounding of logits of size ~10.
    torch.testing.assert_close(logp.double(), full.gather(1, target[:, None])[:, 0], rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.double(), -(full.exp() * full).sum(-1), rtol=0, atol=5e-6)


def test_bfloat16_logits_are_reduced_in_float32():
    logits = LOGITS.bfloat16()
    logp, entropy = chunked_logprobs(identity, logits, TARGET, temperature=0.7)
    full = (logits.double() / 0.7).log_softmax(-1)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), full.gather(1, TARGET[:, None])[:, 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradient_does_not_depend_on_chunks(entropy_grad):
    gradients = []
    for chunk_tokens in (2048, 3):
        weight, x, target = linear(dtype=torch.float64)
        logp, entropy = chunked_logprobs(
            lambda h, w=weight: h @ w.T,
            x,
            target,
            temperature=0.7,
            chunk_tokens=chunk_tokens,
            entropy_grad=entropy_grad,
        )
        assert entropy.requires_grad == entropy_grad
        loss = (logp * torch.arange(10)).sum() + (0.3 * entropy.sum() if entropy_grad else 0.0)
        gradients.append(torch.autograd.grad(loss, [weight, x]))
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_gradcheck_with_an_entropy_bonus(chunk_tokens):
    # An in-place division by the temperature made this very backward pass fail elsewhere.
    weight, x, target = linear(hidden=3, vocab=4, rows=5, dtype=torch.float64)

    def loss(weight, x):
        logp, entropy = chunked_logprobs(
            lambda h: (h @ weight.T).exp(), x, target, temperature=0.7, chunk_tokens=chunk_tokens, entropy_grad=True
        )
        return logp, entropy

    assert torch.autograd.gradcheck(loss, (weight, x))


def test_the_heads_logits_are_left_alone():
    logits = LOGITS.clone()
    chunked_logprobs(identity, logits, TARGET, temperature=0.7)
    assert torch.equal(logits, LOGITS)


def test_temperature_is_part_of_the_distribution():
    # Two tokens with logits (1, 0): p = sigmoid(1 / T).
    for temperature in (0.25, 1.0, 4.0):
        logp, _ = chunked_logprobs(identity, torch.tensor([[1.0, 0.0]]), torch.tensor([0]), temperature=temperature)
        assert logp.item() == pytest.approx(-math.log1p(math.exp(-1 / temperature)), abs=1e-7)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_no_logits_are_kept_for_the_backward_pass_with_several_chunks(chunk_tokens, entropy_grad):
    vocab, (weight, x, target) = 1013, linear(vocab=1013)
    kept: list[int] = []
    sizes: list[int] = []

    def head(h):
        sizes.append(len(h))
        return h @ weight.T

    def pack(tensor):
        kept.append(tensor.numel() if tensor.ndim == 2 and tensor.shape[-1] == vocab else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, identity):
        logp, entropy = chunked_logprobs(head, x, target, chunk_tokens=chunk_tokens, entropy_grad=entropy_grad)
    chunked = chunk_tokens < len(x)
    assert sizes == ([4, 4, 2] if chunked else [10])
    assert (sum(kept) == 0) == chunked
    (logp + entropy).sum().backward()
    # In the backward pass each chunk's logits are made once more, never two chunks' together.
    assert sorted(sizes) == ([2, 2, 4, 4, 4, 4] if chunked else [10])


def test_nothing_is_recomputed_without_gradient():
    weight, x, target = linear()
    calls = []
    with torch.no_grad():
        chunked_logprobs(lambda h: calls.append(1) or h @ weight.T, x, target, chunk_tokens=4)
    assert len(calls) == 3


def test_entropy_of_extreme_and_forbidden_tokens():
    inf = float("inf")
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, -inf], [5.0, -inf, -inf]], requires_grad=True)
    logp, entropy = chunked_logprobs(identity, logits, torch.tensor([0, 1, 0]), entropy_grad=True)
    assert logp.tolist() == pytest.approx([0.0, -math.log(2), 0.0], abs=1e-7)
    assert entropy.tolist() == pytest.approx([0.0, math.log(2), 0.0], abs=1e-7)
    (logp + entropy).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_no_tokens_and_no_entropy():
    weight, x, target = linear()
    logp, entropy = chunked_logprobs(lambda h: h @ weight.T, x[:0], target[:0], entropy=False)
    assert logp.shape == (0,)
    assert entropy is None
    logp.sum().backward()


def test_refuses_greedy_temperature():
    with pytest.raises(ValueError, match="temperature 0"):
        chunked_logprobs(identity, LOGITS, TARGET, temperature=0)


def linear_head(hidden=7, vocab=11, rows=10, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(3)
    head = torch.nn.Linear(hidden, vocab, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return head, x, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("shape", [PLAIN, HeadShape(0.4), HeadShape(1.0, 2.0), HeadShape(3.0, 1.5)])
def test_a_linear_head_equals_its_logits_log_softmax_in_float64(chunk_tokens, bias, entropy_grad, shape):
    head, x, target = linear_head(bias=bias)
    leaves = [x, *head.parameters()]
    up = torch.randn(2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp, entropy = chunked_logprobs(
        head, x, target, temperature=0.7, chunk_tokens=chunk_tokens, entropy_grad=entropy_grad, shape=shape
    )
    assert entropy.requires_grad == entropy_grad
    found = torch.autograd.grad((up[0] * logp).sum() + ((up[1] * entropy).sum() if entropy_grad else 0), leaves)
    logits = shape.scale * head(x)
    logits = logits if shape.cap is None else shape.cap * torch.tanh(logits / shape.cap)
    log_p = (logits / 0.7).log_softmax(-1)
    plain_logp, plain_entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(logp, plain_logp, rtol=0, atol=1e-13)
    torch.testing.assert_close(entropy, plain_entropy, rtol=0, atol=1e-13)
    plain = (up[0] * plain_logp).sum() + (up[1] * plain_entropy).sum() * entropy_grad
    for a, b in zip(found, torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradcheck_of_a_linear_head():
    head, x, target = linear_head(hidden=3, vocab=4, rows=5)
    assert torch.autograd.gradcheck(
        lambda x, *_: chunked_logprobs(head, x, target, temperature=0.7, chunk_tokens=2, entropy_grad=True),
        (x, *head.parameters()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_head_in_lower_precision(dtype):
    head, x, target = linear_head(hidden=16, vocab=500, rows=40, dtype=dtype)
    logp, _ = chunked_logprobs(head, x, target, chunk_tokens=16)
    logp.sum().backward()
    exact, exact_x, _ = linear_head(hidden=16, vocab=500, rows=40)
    with torch.no_grad():
        for a, b in zip([exact_x, *exact.parameters()], [x, *head.parameters()], strict=True):
            a.copy_(b)
    chunked_logprobs(exact, exact_x, target, chunk_tokens=1000)[0].sum().backward()
    assert logp.dtype == torch.float32
    for a, b in zip([x, *head.parameters()], [exact_x, *exact.parameters()], strict=True):
        assert a.grad.dtype == dtype
        # A few roundings of what is of the size of the largest.
        assert (a.grad - b.grad).abs().max() < 8 * torch.finfo(dtype).eps * b.grad.abs().max()


def test_the_weights_gradient_may_gather_elsewhere():
    head, x, target = linear_head(dtype=torch.bfloat16, bias=False)
    gathered = torch.ones(11, 7)
    logp, _ = chunked_logprobs(head, x, target, chunk_tokens=4, weight_gradient=lambda: gathered)
    logp.sum().backward()
    assert head.weight.grad is None
    logits = head(x.detach()).double()
    slope = torch.nn.functional.one_hot(target, 11) - logits.softmax(-1)
    want = slope.T @ x.detach().double()
    # Each row's slope is rounded to bfloat16 once; the sum is not.
    torch.testing.assert_close(gathered - 1, want.float(), rtol=0, atol=10 * 2**-8)
    assert not torch.equal(gathered, gathered.bfloat16().float())


@pytest.mark.parametrize("rows", [4, 10])
def test_a_linear_head_saves_nothing_of_the_logits_size(rows):
    vocab = 1013
    head, x, target = linear_head(vocab=vocab, rows=rows)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, identity):
        logp, entropy = chunked_logprobs(head, x, target, chunk_tokens=4, entropy_grad=True)
    assert all(shape in {(rows, 7), (rows,), (vocab, 7), (vocab,)} for shape in kept)
    (logp + entropy).sum().backward()


def test_a_second_backward_of_a_linear_head_is_the_same():
    head, x, target = linear_head()
    logp, entropy = chunked_logprobs(head, x, target, chunk_tokens=4, entropy_grad=True)
    loss = (logp + entropy).sum()
    first = torch.autograd.grad(loss, [x, head.weight], retain_graph=True)
    second = torch.autograd.grad(loss, [x, head.weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [PLAIN, HeadShape(0.7), HeadShape(0.7, 2.0)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_frozen_linear_heads_logits_are_made_once(monkeypatch, dtype, most, shape):
    """Its gradient is float64's, for any factors of the rows, and as often as it is asked for."""
    head, x, target = linear_head(dtype=dtype)
    head.requires_grad_(False)
    factor = torch.linspace(-2, 3, len(target))
    exact = x.detach().double().requires_grad_()
    logits = shape.of(exact @ head.weight.double().T + head.bias.double()) / 0.6
    (logits.log_softmax(-1).gather(1, target[:, None])[:, 0] * factor).sum().backward()
    made, kept = [], []
    monkeypatch.setattr(logprobs, "_logits", lambda *given, own=logprobs._logits: made.append(1) or own(*given))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, identity):
        logp, _ = chunked_logprobs(head, x, target, chunk_tokens=4, temperature=0.6, shape=shape)
    for _ in range(2):
        (found,) = torch.autograd.grad((logp * factor).sum(), x, retain_graph=True)
        assert found.dtype == dtype
        assert (found.double() - exact.grad).abs().max() < most * exact.grad.abs().max()
    assert len(made) == 3
    assert kept == [tuple(x.shape)]


def test_a_frozen_linear_head_and_a_frozen_input():
    head, x, target = linear_head()
    head.requires_grad_(False)
    chunked_logprobs(head, x, target)[0].sum().backward()
    assert x.grad is not None
    assert head.weight.grad is None
    head.requires_grad_(True)
    chunked_logprobs(head, x.detach(), target)[0].sum().backward()
    assert head.weight.grad is not None


def test_what_is_more_than_a_matrix_product_is_called():
    head, x, target = linear_head()
    plain, _ = chunked_logprobs(head, x, target)
    head.register_forward_hook(lambda module, inputs, logits: logits * 0.5)
    hooked, _ = chunked_logprobs(head, x, target)
    torch.testing.assert_close(hooked, chunked_logprobs(lambda h: head(h), x, target)[0])
    assert not torch.allclose(plain, hooked)


def test_no_tokens_through_a_linear_head():
    head, x, target = linear_head()
    logp, entropy = chunked_logprobs(head, x[:0], target[:0], entropy_grad=True)
    (logp.sum() + entropy.sum()).backward()
    assert x.grad.abs().sum() == head.weight.grad.abs().sum() == 0
