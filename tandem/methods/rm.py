"""Reward models: a scalar that prefers the answer a person preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tandem.batch import Batch, Outputs, TokenLoss
from tandem.functional.preference import reward_pair_loss
from tandem.methods.base import Method, Rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RewardModeling(Method):
    """Bradley-Terry on pairs (arXiv:2203.02155, eq. 1), with Llama 2's margin (arXiv:2307.09288, eq. 2)."""

    reads: ClassVar = Rows("preferences")
    title: ClassVar = "reward model"
    about: ClassVar = """Train a reward model on preference pairs.

    Rows: chosen and rejected, with prompt or with the prompt at the start of both (strings or lists of messages),
    as in TRL; an optional margin. The model gets one scalar head named 'score'.
    Example: tandem rm --model runs/sft/model --data pairs.jsonl --out runs/rm --steps 500
    """
    head: ClassVar = "scalar"
    pairwise: ClassVar = True
    learning_rate: ClassVar = 1e-5
    leads: ClassVar = ("accuracy", "loss", "score_gap")

    center_coef: float = 0.0
    """Weight of ``(chosen + rejected)^2``, which keeps scores around 0 (arXiv:2312.09244, eq. 2; 0.01 is usual)."""

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """One loss a pair, at the last token of its chosen segment (``Batch.of_units``).

        Metrics at the same tokens: ``accuracy`` (a tie counts as wrong), ``score_gap``, ``chosen_score``,
        ``rejected_score``.
        """
        score_S = batch.scores(out)
        chosen_P, rejected_P = score_S[0::2], score_S[1::2]
        margin_P: Tensor | float = 0.0 if batch.margin_S is None else batch.margin_S[0::2]
        loss_P = reward_pair_loss(chosen_P, rejected_P, margin_P)
        if self.center_coef:
            loss_P = loss_P + self.center_coef * (chosen_P + rejected_P).square()

        metrics = {
            "accuracy": (chosen_P > rejected_P).to(loss_P.dtype),
            "score_gap": chosen_P - rejected_P,
            "chosen_score": chosen_P,
            "rejected_score": rejected_P,
        }
        return batch.loss_of_units(loss_P, metrics)
