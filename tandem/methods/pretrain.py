"""Continued pre-training: the likelihood of plain text, which is read as it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.batch import Batch, Outputs, TokenLoss, filled
from tandem.methods.base import Method, Rows


@dataclass(frozen=True, kw_only=True)
class Pretrain(Method):
    """Maximum likelihood of every token of a corpus, in windows of one length: the loss of a token is ``-logp``."""

    reads: ClassVar = Rows("text")
    title: ClassVar = "pre-training"
    about: ClassVar = """Train a causal LM further on plain text of any size: it is read as it is needed.

    Rows: text. Documents are joined, each with its end of sequence, and cut into windows of --max-length tokens.
    Example: tandem pretrain --model ./base --data 'corpus/*.jsonl' --out runs/pretrain --steps 1000
    """
    learning_rate: ClassVar = 1e-5

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """``-logp_T``, in nats."""
        return TokenLoss(loss_T=-filled(out.logp_T, "out.logp_T"))
