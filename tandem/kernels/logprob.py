"""Log-prob, entropy and their gradient from a chunk of logits, which is read once and never copied.

Each operation is plain torch and a Triton kernel that does the same; CUDA tensors take the kernel where Triton is
installed. ``z = logits / temperature``, ``p = softmax(z)``, all in nats. Inside the kernels everything is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.available import on_triton


def row_stats(
    logits_nV: Tensor, target_n: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``logsumexp(z)``, ``z[target] - logsumexp(z)`` and, if asked, ``-sum_v p_v log p_v``, each [n].

    ``target_n`` is int64. Results are float32, or float64 where the logits are.
    """
    if _on_kernel(logits_nV):
        from tandem.kernels import logprob_triton

        return logprob_triton.row_stats(logits_nV, target_n, temperature, entropy=entropy)
    return row_stats_torch(logits_nV, target_n, temperature, entropy=entropy)


def logits_gradient_(
    logits_nV: Tensor,
    target_n: Tensor,
    logsumexp_n: Tensor,
    grad_logp_n: Tensor | None,
    temperature: float,
    *,
    entropy_n: Tensor | None = None,
    grad_entropy_n: Tensor | None = None,
) -> Tensor:
    """Turns logits into the gradient of ``(grad_logp * logp + grad_entropy * entropy).sum()``, in place. [n, V].

    ``d logp / d z_v = [v = target] - p_v`` and ``d H / d z_v = -p_v (log p_v + H)``. Gradients of None count as 0.
    """
    run = logits_gradient_torch_
    if _on_kernel(logits_nV):
        from tandem.kernels import logprob_triton

        run = logprob_triton.logits_gradient_
    return run(
        logits_nV, target_n, logsumexp_n, grad_logp_n, temperature, entropy_n=entropy_n, grad_entropy_n=grad_entropy_n
    )


def _on_kernel(logits_nV: Tensor) -> bool:
    return on_triton(logits_nV) and logits_nV.dtype != torch.float64


def row_stats_torch(
    logits_nV: Tensor, target_n: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``row_stats`` in plain torch."""
    z_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)) / temperature
    logsumexp_n = z_nV.logsumexp(-1)
    logp_n = z_nV.gather(-1, target_n[:, None]).squeeze(-1) - logsumexp_n
    if not entropy:
        return logsumexp_n, logp_n, None
    return logsumexp_n, logp_n, entropy_of(z_nV.sub_(logsumexp_n[:, None]))


def entropy_of(logp_nV: Tensor) -> Tensor:
    """Entropy [n] in nats. The floor makes a forbidden token (log-prob -inf, probability 0) count 0, not NaN."""
    return -(logp_nV.exp() * logp_nV.clamp(min=torch.finfo(logp_nV.dtype).min)).sum(-1)


def logits_gradient_torch_(
    logits_nV: Tensor,
    target_n: Tensor,
    logsumexp_n: Tensor,
    grad_logp_n: Tensor | None,
    temperature: float,
    *,
    entropy_n: Tensor | None = None,
    grad_entropy_n: Tensor | None = None,
) -> Tensor:
    """``logits_gradient_`` in plain torch."""
    logp_nV = (logits_nV.to(logsumexp_n.dtype) / temperature).sub_(logsumexp_n[:, None])
    grad_nV = torch.zeros_like(logp_nV)
    if grad_logp_n is not None:
        grad_nV = logp_nV.exp().mul_(-grad_logp_n[:, None])
        grad_nV.scatter_add_(1, target_n[:, None], grad_logp_n[:, None])
    if grad_entropy_n is not None:
        assert entropy_n is not None
        slope_nV = logp_nV.clamp(min=torch.finfo(logp_nV.dtype).min).add_(entropy_n[:, None]).mul_(logp_nV.exp())
        grad_nV -= slope_nV.mul_(grad_entropy_n[:, None])
    return logits_nV.copy_(grad_nV.div_(temperature))
