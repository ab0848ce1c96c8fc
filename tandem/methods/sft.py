"""Supervised fine-tuning: the likelihood of demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.batch import Batch, Outputs, TokenLoss
from tandem.functional.fields import required
from tandem.roles import Objective


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Maximum likelihood of the trainable tokens: the loss of a token is ``-logp``, in nats."""

    aggregation: Literal["token", "sequence"] = "token"
    """Which mean the loss is: over tokens, or over sequences of their token means."""

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """``-logp_T``. Metrics: ``entropy``, where the forward gave it."""
        metrics_T = {} if out.entropy_T is None else {"entropy": out.entropy_T.detach()}
        return TokenLoss(loss_T=-required(out.logp_T, "out.logp_T"), metrics_T=metrics_T)
