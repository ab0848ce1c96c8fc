"""A teacher's word on a chunk of a student's logits: the divergence and its gradient, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.functional.divergence import Divergence, divergence, with_tail
from tandem.kernels import products

BLOCK_BYTES = {"cuda": 1 << 27, "cpu": 1 << 20}
"""Logits of a block in float32, by device: some ten tensors of this size exist while its gradient is made."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """What a teacher says of N places: its last hidden states with its head, or its likeliest tokens with a tail."""

    ask: Divergence
    words: int
    """Rows of the vocabulary that have a token, in both models: rows beyond are padding, and left out."""
    state_ND: Tensor | None = None
    head: tuple[Tensor, Tensor | None] | None = None
    """Weight [V, D] and bias of the teacher's head."""
    top_logp_NK: Tensor | None = None
    """[N, K + 1], at the temperature asked for: of the K tokens, and of all others together."""
    top_id_NK: Tensor | None = None
    """int64 [N, K]"""

    def of(self, logits_nV: Tensor, rows: slice) -> Tensor:
        """The divergence of the student's logits in these rows of the N, [n], with gradient where enabled.

        In float32, or float64 where the logits are.
        """
        wide = torch.promote_types(logits_nV.dtype, torch.float32)
        student_nV = logits_nV[:, : self.words].to(wide) / self.ask.temperature
        if self.top_id_NK is not None and self.top_logp_NK is not None:
            student_nV = with_tail(student_nV, self.top_id_NK[rows])
            teacher_nV = self.top_logp_NK[rows].to(wide)
        else:
            assert self.state_ND is not None
            assert self.head is not None
            with torch.no_grad():
                weight_VD, bias_V = self.head
                teacher_nV = products.linear(self.state_ND[rows].to(weight_VD.dtype), weight_VD, bias_V)
                teacher_nV = (teacher_nV[:, : self.words].to(wide) / self.ask.temperature).log_softmax(-1)
            student_nV = student_nV.log_softmax(-1)
        return divergence(student_nV, teacher_nV, self.ask.kind, self.ask.beta)

    def values(self, logits_nV: Tensor, start: int) -> Tensor:
        """``of`` a chunk whose first row is ``start`` of the N, a block at a time, without a gradient."""
        with torch.no_grad():
            return torch.cat([self.of(logits_nV[b], _moved(b, start)) for b in _blocks(logits_nV)])

    def gradient(self, logits_nV: Tensor, start: int, grad_n: Tensor) -> Tensor:
        """The gradient of ``(grad * values).sum()`` by the chunk's logits, [n, V], a block at a time."""
        found_nV = torch.empty_like(logits_nV)
        for block in _blocks(logits_nV):
            with torch.enable_grad():
                leaf_bV = logits_nV[block].detach().requires_grad_()
                value_b = self.of(leaf_bV, _moved(block, start))
                found_nV[block] = torch.autograd.grad(value_b, leaf_bV, grad_n[block].to(value_b.dtype))[0]
        return found_nV


def _moved(block: slice, start: int) -> slice:
    return slice(block.start + start, block.stop + start)


def _blocks(logits_nV: Tensor) -> Iterator[slice]:
    rows, vocabulary = logits_nV.shape
    block = max(1, BLOCK_BYTES.get(logits_nV.device.type, BLOCK_BYTES["cpu"]) // (4 * vocabulary))
    return (slice(at, min(at + block, rows)) for at in range(0, max(1, rows), block))
