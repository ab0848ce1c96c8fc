"""Log-prob kernels against float64: plain torch, and Triton's (in its interpreter where there is no GPU)."""

import pytest
import torch

from tandem.kernels import logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["torch", "triton"]


def form(name):
    """(row_stats, logits_gradient_) of one form."""
    if name == "torch":
        return logprob.row_stats_torch, logprob.logits_gradient_torch_
    kernels = pytest.importorskip("tandem.kernels.logprob_triton", reason="no triton here")
    return kernels.row_stats, kernels.logits_gradient_


def logits_of(rows, vocabulary, dtype=torch.float32, scale=4.0):
    generator = torch.Generator().manual_seed(rows * vocabulary)
    logits = (torch.randn(rows, vocabulary, generator=generator) * scale).to(DEVICE, dtype)
    target = torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE)
    return logits, target


def truth(logits, target, temperature):
    """Logsumexp, log-prob and entropy by log_softmax in float64, with a graph to the logits."""
    leaf = logits.double().requires_grad_()
    z = leaf / temperature
    log_p = z.log_softmax(-1)
    terms = torch.where(log_p > -1e300, log_p.exp() * log_p, 0.0)
    return leaf, z.logsumexp(-1), log_p.gather(1, target[:, None])[:, 0], -terms.sum(-1)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("vocabulary", [2, 37, 4096, 4097, 9001])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_stats_equal_float64(name, vocabulary, temperature):
    logits, target = logits_of(5, vocabulary)
    row_stats, _ = form(name)
    found = row_stats(logits, target, temperature, entropy=True)
    for value, want in zip(found, truth(logits, target, temperature)[1:], strict=True):
        assert value.dtype == torch.float32
        # float32 rounding of numbers up to about 30.
        torch.testing.assert_close(value.double(), want.detach(), rtol=0, atol=1e-5)
    assert row_stats(logits, target, temperature, entropy=False)[2] is None


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("vocabulary", [37, 4096, 9001])
@pytest.mark.parametrize(("logp", "entropy"), [(True, False), (False, True), (True, True)])
def test_gradient_equals_float64(name, vocabulary, logp, entropy):
    temperature = 0.7
    logits, target = logits_of(6, vocabulary)
    row_stats, logits_gradient_ = form(name)
    up = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaf, _, logp_n, entropy_n = truth(logits, target, temperature)
    ((up[0] * logp_n).sum() * logp + (up[1] * entropy_n).sum() * entropy).backward()
    logsumexp, _, own_entropy = row_stats(logits, target, temperature, entropy=True)
    found = logits_gradient_(
        logits,
        target,
        logsumexp,
        up[0] if logp else None,
        temperature,
        entropy_n=own_entropy,
        grad_entropy_n=up[1] if entropy else None,
    )
    assert found.data_ptr() == logits.data_ptr()
    # Entropies near 10 nats are rounded to 1e-6, times a probability and an upstream gradient of up to 3.
    torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_reduced_in_float32(name, dtype):
    logits, target = logits_of(4, 5000, dtype)
    row_stats, logits_gradient_ = form(name)
    leaf, *wanted = truth(logits, target, 0.7)
    found = row_stats(logits, target, 0.7, entropy=True)
    for value, want in zip(found, wanted, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), want.detach(), rtol=0, atol=1e-5)
    wanted[1].sum().backward()
    gradient = logits_gradient_(logits, target, found[0], torch.ones(4, device=DEVICE), 0.7)
    assert gradient.dtype == dtype
    # One rounding, to the logits' own type.
    torch.testing.assert_close(gradient, leaf.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("name", FORMS)
def test_forbidden_and_extreme_tokens(name):
    inf = float("inf")
    rows = [[1e4, 0.0, 0.0], [0.0, 0.0, -inf], [5.0, -inf, -inf], [-1e4, -1e4, -1e4], [-inf, -inf, 2.0]]
    logits = torch.tensor(rows, device=DEVICE)
    target = torch.tensor([0, 1, 0, 2, 2], device=DEVICE)
    row_stats, logits_gradient_ = form(name)
    _, _, logp_n, entropy_n = truth(logits, target, 1.0)
    logsumexp, logp, entropy = row_stats(logits, target, 1.0, entropy=True)
    # Next to 1e4, float32 numbers are 1e-3 apart.
    torch.testing.assert_close(logp.double(), logp_n.detach(), rtol=0, atol=1e-3)
    torch.testing.assert_close(entropy.double(), entropy_n.detach(), rtol=0, atol=1e-3)
    ones = torch.ones(5, device=DEVICE)
    gradient = logits_gradient_(logits, target, logsumexp, ones, 1.0, entropy_n=entropy, grad_entropy_n=ones)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", FORMS)
def test_a_number_that_is_none_shows(name):
    logits, target = logits_of(3, 5000)
    logits[1, 4500] = float("nan")
    row_stats, _ = form(name)
    for value in row_stats(logits, target, 1.0, entropy=True):
        assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", FORMS)
def test_no_rows(name):
    row_stats, logits_gradient_ = form(name)
    logits, target = logits_of(0, 10)
    logsumexp, logp, _ = row_stats(logits, target, 1.0, entropy=True)
    assert logp.shape == (0,)
    assert logits_gradient_(logits, target, logsumexp, logp, 1.0).shape == (0, 10)
