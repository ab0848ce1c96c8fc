"""Estimates of a KL divergence from sampled tokens, and the controller of its coefficient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


KLEstimator = Literal["k1", "k2", "k3", "ratio_k3"]
MAX_EXPONENT = 20.0
"""Beyond it, exp(x) is of no use to a loss: 4.9e8, and inf above 88 in float32."""


def kl_estimate(logp_T: Tensor, reference_logp_T: Tensor, kind: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats, for tokens sampled from the policy. [T], not clamped.

    J. Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), with ``x = logp - reference_logp``:

    - ``k1 = x``: unbiased, of either sign. Its gradient as a loss is 0 in expectation: use it in the reward.
    - ``k2 = x^2 / 2``: biased, low variance.
    - ``k3 = exp(-x) - 1 + x``: unbiased, never negative.

    The value of an estimate says nothing of its gradient: see ``kl_loss``.

    Where the reference finds a token exp(20) times likelier than the policy does, k3 goes on along its tangent:
    finite, and still with the gradient that pulls the policy back, which a clamp would take away.
    """
    log_ratio_T = logp_T - reference_logp_T
    if kind == "k1":
        return log_ratio_T
    if kind == "k2":
        return log_ratio_T.square() / 2
    if kind == "k3":
        exponent_T = (-log_ratio_T).clamp(max=MAX_EXPONENT)
        beyond_T = -log_ratio_T - exponent_T
        return exponent_T.expm1() + exponent_T.exp() * beyond_T + log_ratio_T
    raise ValueError(f"no estimate {kind!r} of a KL: k1, k2 or k3")


def kl_loss(logp_T: Tensor, reference_logp_T: Tensor, ratio_T: Tensor, kind: KLEstimator) -> Tensor:
    """A KL to the reference to be differentiated, in nats, [T], for tokens sampled with probability ``p / ratio``.

    With ``x = logp - reference_logp``, and in expectation over the samples:

    - ``ratio_k3 = ratio k3``: the gradient of KL(policy || reference), whatever the ratio (arXiv:2512.02556; TRL's
      default since July 2026).
    - ``k3``: the gradient of KL(reference || policy), the other direction, while the ratio is 1 (GRPO's penalty,
      arXiv:2402.03300, eq. 4).
    - ``k2``: the gradient of KL(policy || reference) while the ratio is 1.
    - ``k1``: none while the ratio is 1. It is the value alone that is right.

    The two parts of ``ratio k3``'s gradient, ``ratio k3`` and ``ratio (1 - exp(-x))``, add up to ``ratio x``. It is
    differentiated as that: at x = -15 the parts are so large that in float32 nothing is left of their sum.
    """
    if kind != "ratio_k3":
        return kl_estimate(logp_T, reference_logp_T, kind)
    slope_T = ratio_T * (logp_T - reference_logp_T).detach()
    value_T = ratio_T.detach() * kl_estimate(logp_T.detach(), reference_logp_T, "k3")
    return value_T + (slope_T - slope_T.detach())


def adaptive_kl_coef(coef: float, kl: float, *, target: float, samples: int, horizon: float) -> float:
    """The next KL coefficient: ``coef (1 + clip(kl / target - 1, -0.2, 0.2) min(samples / horizon, 1))``.

    Ziegler et al., arXiv:1909.08593, section 2.2, with their gain ``K = samples / horizon``, here at most 1: a step
    changes the coefficient by a fifth at most, and never its sign. ``kl`` and ``target`` are in nats per sequence,
    ``samples`` and ``horizon`` in sequences.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * min(samples / horizon, 1.0))
