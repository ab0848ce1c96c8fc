"""KL estimators and the adaptive coefficient against OpenRLHF, and exact KL between two distributions."""

import pytest
import torch

from tandem.functional.kl import adaptive_kl_coef, kl_estimate, kl_loss

LOGP = torch.tensor([-0.5, -1.2, -0.3, -2.0, -0.9, -0.1], dtype=torch.float64)
REFERENCE = torch.tensor([-0.7, -1.0, -0.3, -1.2, -1.6, -1.9], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.2, -0.2, 0.0, -0.8, 0.7, 1.8]),
        ("k2", [0.02, 0.02, 0.0, 0.32, 0.245, 1.62]),
        ("k3", [0.01873076, 0.02140272, 0.0, 0.42554092, 0.19658530, 0.96529883]),
    ],
)
def test_golden_from_openrlhf(kind, expected):
    # OpenRLHF 0.11.2 models/utils.compute_approx_kl, which computes in float32: hence 1e-7.
    assert kl_estimate(LOGP, REFERENCE, kind).tolist() == pytest.approx(expected, abs=1e-7)


def test_k1_and_k3_are_unbiased_and_k2_nearly_so():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, generator=g, dtype=torch.float64) * 0.3 for _ in range(2))
    p, q = p.log_softmax(0), q.log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    mean = {kind: (p.exp() * kl_estimate(p, q, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean["k3"], exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean["k2"], exact, rtol=0.1, atol=0)
    assert (kl_estimate(p, q, "k3") >= 0).all()


def test_k3_stays_finite_and_keeps_its_gradient_far_away():
    logp = torch.tensor([-15.0, -21.0, -100.0, -1000.0], requires_grad=True)
    k3 = kl_estimate(logp, torch.zeros(4), "k3")
    (gradient,) = torch.autograd.grad(k3.sum(), logp)
    # Inside: 1 - exp(-x). Beyond 20: the tangent, so still the gradient at 20. A clamp would give 0.
    expected = 1 - torch.tensor([15.0, 20.0, 20.0, 20.0]).exp()
    assert torch.isfinite(k3).all()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
    assert (k3.diff() > 0).all()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradcheck(kind):
    logp = torch.tensor([-0.5, -1.2, -0.3, 0.4, -22.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.7, -1.0, -0.9, -3.0, -0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, reference, kind), (logp,))


@pytest.mark.parametrize("off_policy", [False, True])
def test_each_kl_loss_descends_its_direction(off_policy):
    """In exact expectation over tokens drawn from the policy, or from another distribution."""
    g = torch.Generator().manual_seed(0)
    theta, r, other = torch.randn(3, 9, generator=g, dtype=torch.float64)
    theta.requires_grad_()
    logp, reference = theta.log_softmax(0), r.log_softmax(0)
    drawn = other.log_softmax(0) if off_policy else logp.detach()
    reverse = (logp.exp() * (logp - reference)).sum()
    forward = (reference.exp() * (reference - logp)).sum()

    def gradient(of):
        return torch.autograd.grad(of, theta, retain_graph=True)[0]

    got = {k: (drawn.exp() * kl_loss(logp, reference, (logp - drawn).exp(), k)).sum() for k in ("ratio_k3", "k3", "k2")}
    torch.testing.assert_close(got["ratio_k3"], reverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(got["ratio_k3"]), gradient(reverse), rtol=0, atol=1e-12)
    if not off_policy:
        torch.testing.assert_close(gradient(got["k2"]), gradient(reverse), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient(got["k3"]), gradient(forward), rtol=0, atol=1e-12)


def test_the_weighted_k3_keeps_its_gradient_far_away():
    # ratio (logp - reference), in float32 too, where the derivative of the product has nothing left of it at -15.
    reference = torch.tensor([0.0, 0.0, 0.0, -3.0])
    logp = torch.tensor([-1.0, -15.0, -40.0, -0.1], requires_grad=True)
    kl = kl_loss(logp, reference, (logp - logp.detach()).exp() * 2, "ratio_k3")
    (gradient,) = torch.autograd.grad(kl.sum(), logp)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, -30.0, -80.0, 5.8]))
    assert torch.equal(kl.detach(), 2 * kl_estimate(logp.detach(), reference, "k3"))


def test_unknown_kind():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(LOGP, REFERENCE, "k4")


def test_adaptive_coefficient_golden_from_openrlhf():
    # OpenRLHF 0.11.2 kl_controller.AdaptiveKLController(0.05, target=6, horizon=10000), three updates in turn.
    coef = 0.05
    for kl, samples, expected in [
        (9.0, 256, 0.050256),
        (5.7, 256, 0.050191672320000005),
        (0.1, 512, 0.0496777095954432),
    ]:
        coef = adaptive_kl_coef(coef, kl, target=6.0, samples=samples, horizon=10000)
        assert coef == pytest.approx(expected, rel=1e-12)


def test_the_coefficient_never_turns_negative():
    # 60,000 sequences against a horizon of 10,000: without a bound 1 - 0.2 * 6.
    assert adaptive_kl_coef(0.05, 0.0, target=6.0, samples=60_000, horizon=10_000) == pytest.approx(0.04)
    assert adaptive_kl_coef(0.05, 99.0, target=6.0, samples=60_000, horizon=10_000) == pytest.approx(0.06)
