"""Supervised fine-tuning: the likelihood of demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tandem.batch import Batch, Outputs, TokenLoss, filled
from tandem.methods.base import Method, Rows


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """Maximum likelihood of the trainable tokens: the loss of a token is ``-logp``, in nats."""

    reads: ClassVar = Rows("demonstrations")
    title: ClassVar = "SFT"
    about: ClassVar = """Fine-tune a causal LM on demonstrations.

    Rows: text, messages, or prompt and completion (strings or lists of messages), as in TRL.
    Example: tandem sft --model ./base --data demos.jsonl --out runs/sft --steps 500
    """
    learning_rate: ClassVar = 2e-5

    aggregation: Literal["token", "sequence"] = "token"
    """Which mean the loss is: over tokens, or over sequences of their token means."""

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """``-logp_T``. Metrics: ``entropy``, where the forward gave it."""
        metrics_T = {} if out.entropy_T is None else {"entropy": out.entropy_T.detach()}
        return TokenLoss(loss_T=-filled(out.logp_T, "out.logp_T"), metrics_T=metrics_T)
