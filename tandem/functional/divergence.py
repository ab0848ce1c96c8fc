"""How far a student's distribution over the next token is from a teacher's, over the vocabulary or a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

DivergenceKind = Literal["forward", "reverse", "jsd"]


def divergence(student_logp_nV: Tensor, teacher_logp_nV: Tensor, kind: DivergenceKind, beta: float = 0.5) -> Tensor:
    """Divergence of each row's two distributions, [n], in nats, from their log-probs, [n, V] both.

    With student p, teacher q and the mixture ``m = (1 - beta) p + beta q``:

    - ``forward``: ``KL(q || p) = sum_v q_v (log q_v - log p_v)``
    - ``reverse``: ``KL(p || q)``
    - ``jsd``: ``beta KL(q || m) + (1 - beta) KL(p || m)``, with beta between 0 and 1 (GKD, arXiv:2306.13649, eq. 1).
      It is 0 at both ends; divided by beta it goes to the forward KL as beta goes to 0, and divided by ``1 - beta`` to
      the reverse one at the other end. TRL's ``beta`` 0 is ``forward``, its 1 is ``reverse``.

    A token of probability 0 on the side that weighs counts 0.
    """
    if kind == "forward":
        return _kl(teacher_logp_nV, student_logp_nV)
    if kind == "reverse":
        return _kl(student_logp_nV, teacher_logp_nV)
    weights = student_logp_nV.new_tensor([1 - beta, beta]).log()
    mixture_nV = torch.logaddexp(student_logp_nV + weights[0], teacher_logp_nV + weights[1])
    return beta * _kl(teacher_logp_nV, mixture_nV) + (1 - beta) * _kl(student_logp_nV, mixture_nV)


def _kl(of_nV: Tensor, to_nV: Tensor) -> Tensor:
    lowest = torch.finfo(of_nV.dtype).min
    return (of_nV.exp() * (of_nV.clamp(min=lowest) - to_nV.clamp(min=lowest))).sum(-1)


def with_tail(logits_nV: Tensor, id_nK: Tensor) -> Tensor:
    """Log-probs of K tokens of each row, and of all its other tokens together, [n, K + 1]."""
    rest_nV = logits_nV.scatter(-1, id_nK, -torch.inf)
    parts_nK = torch.cat([logits_nV.gather(-1, id_nK), rest_nV.logsumexp(-1, keepdim=True)], dim=-1)
    return parts_nK - logits_nV.logsumexp(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Which divergence a student's forward is asked for."""

    teacher: str = "teacher"
    """The role that has seen the batch (``Batch.seen``)."""
    kind: DivergenceKind = "forward"
    beta: float = 0.5
    """The teacher's share of the mixture of ``jsd``."""
    temperature: float = 1.0
    """Divides the logits of both."""
