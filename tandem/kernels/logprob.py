"""Log-prob, entropy and their gradient from a chunk of logits, which is read once and never copied.

Each operation is plain torch and a Triton kernel that does the same; CUDA tensors take the kernel where Triton is
installed. ``z = logits / temperature``, ``p = softmax(z)``, all in nats. Inside the kernels everything is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.kernels.available import on_triton

CPU_BLOCK_BYTES = 1 << 20
"""On a CPU rows go through in blocks of about so much, which stay in its cache from one operation to the next."""


class HeadShape(NamedTuple):
    """How logits follow from the product of a head and a hidden state: ``cap * tanh(scale * product / cap)``."""

    scale: float = 1.0
    """As Granite (one over ``logits_scaling``), Cohere (``logit_scale``) and Falcon-H1 (``lm_head_multiplier``)."""
    cap: float | None = None
    """None: they are not bent. As Gemma 2 (``final_logit_softcapping``)."""

    def of(self, product_nV: Tensor, *, in_place: bool = False) -> Tensor:
        """Logits of products, in the products' type."""
        if self == PLAIN:
            return product_nV
        if self.cap is None:
            return product_nV.mul_(self.scale) if in_place else product_nV * self.scale
        if in_place:
            return product_nV.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return torch.tanh(product_nV * (self.scale / self.cap)) * self.cap

    def slope(self, logits_nV: Tensor) -> Tensor | float:
        """What the gradient by logits is multiplied with to be the gradient by products."""
        if self.cap is None:
            return self.scale
        return (logits_nV / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


PLAIN = HeadShape()


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
    wide = torch.promote_types(logits_nV.dtype, torch.float32)
    logsumexp_n, logp_n = (torch.empty_like(target_n, dtype=wide) for _ in range(2))
    entropy_n = torch.empty_like(logp_n) if entropy else None
    for rows in _blocks(logits_nV):
        z_bV = logits_nV[rows].to(wide) / temperature
        logsumexp_n[rows] = z_bV.logsumexp(-1)
        logp_n[rows] = z_bV.gather(-1, target_n[rows, None]).squeeze(-1) - logsumexp_n[rows]
        if entropy_n is not None:
            entropy_n[rows] = entropy_of(z_bV.sub_(logsumexp_n[rows, None]))
    return logsumexp_n, logp_n, entropy_n


def _blocks(logits_nV: Tensor) -> Iterator[slice]:
    """Rows by ``CPU_BLOCK_BYTES``; all of them at once on a GPU."""
    rows, vocabulary = logits_nV.shape
    block = max(1, rows)
    if logits_nV.device.type == "cpu":
        block = max(1, CPU_BLOCK_BYTES // (vocabulary * logits_nV.element_size()))
    return (slice(start, start + block) for start in range(0, rows, block))


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
    for rows in _blocks(logits_nV):
        logp_bV = (logits_nV[rows].to(logsumexp_n.dtype) / temperature).sub_(logsumexp_n[rows, None])
        grad_bV = torch.zeros_like(logp_bV)
        if grad_logp_n is not None:
            grad_bV = logp_bV.exp().mul_(-grad_logp_n[rows, None])
            grad_bV.scatter_add_(1, target_n[rows, None], grad_logp_n[rows, None])
        if grad_entropy_n is not None:
            assert entropy_n is not None
            slope_bV = logp_bV.clamp(min=torch.finfo(logp_bV.dtype).min).add_(entropy_n[rows, None]).mul_(logp_bV.exp())
            grad_bV -= slope_bV.mul_(grad_entropy_n[rows, None])
        logits_nV[rows] = grad_bV.div_(temperature)
    return logits_nV
