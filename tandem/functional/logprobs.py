"""Token log-probabilities and entropies, without ever holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def chunked_logprobs(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    entropy: bool = True,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and the entropy of its distribution, in nats, ``chunk_tokens`` rows at a time.

    ``logp_n = z_n[target_n] - logsumexp(z_n)`` and ``H_n = -sum_v p_nv log p_nv`` with ``z = head(hidden) /
    temperature``: the distribution that tokens are drawn from at that temperature.

    ``head`` maps [n, D] to logits [n, V]; ``target_N`` is int64. Both results are [N], in float32 (float64 where the
    head's logits are). With gradients enabled and more than one chunk, each chunk's logits are computed again in
    the backward pass, so that no more than one chunk [chunk_tokens, V] of them exists. The entropy is None unless
    asked for, and detached unless ``entropy_grad``. Raises ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: log-probabilities need a positive one")
    hidden_chunks, target_chunks = hidden_ND.split(chunk_tokens), target_N.split(chunk_tokens)
    recompute = torch.is_grad_enabled() and len(hidden_chunks) > 1

    def one_chunk(hidden_nD: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor]:
        logits_nV = head(hidden_nD)
        # Out of place: the backward pass of the head or of an entropy bonus may still need the logits.
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)) / temperature
        logsumexp_n = logits_nV.logsumexp(-1)
        logp_n = logits_nV.gather(-1, target_n[:, None]).squeeze(-1) - logsumexp_n
        if not entropy:
            return logp_n, torch.zeros_like(logp_n)
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            return logp_n, _entropy(logits_nV - logsumexp_n[:, None])

    parts = [
        checkpoint(one_chunk, h, t, use_reentrant=False) if recompute else one_chunk(h, t)
        for h, t in zip(hidden_chunks, target_chunks, strict=True)
    ]
    logp_N = torch.cat([logp_n for logp_n, _ in parts])
    return logp_N, torch.cat([entropy_n for _, entropy_n in parts]) if entropy else None


def _entropy(logp_nV: Tensor) -> Tensor:
    """Entropy [n] in nats. The floor makes a forbidden token (log-prob -inf, probability 0) count 0, not NaN."""
    return -(logp_nV.exp() * logp_nV.clamp(min=torch.finfo(logp_nV.dtype).min)).sum(-1)
