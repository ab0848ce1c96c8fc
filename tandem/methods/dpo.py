"""DPO: preference pairs train the policy itself, which is its own reward model against a frozen reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from tandem.batch import Batch, Outputs, TokenLoss, filled, send
from tandem.functional.preference import PreferenceLoss, preference_loss
from tandem.functional.segments import segment_sum
from tandem.keys import ABOVE_0, AT_LEAST_0, must
from tandem.lazy import torch
from tandem.methods.base import Method, Need, Rows

if TYPE_CHECKING:
    from torch import Tensor

PAIR_REFERENCE = Need(
    role="reference",
    doc="Folder of the frozen reference that answers are compared with. None: the model as it was at the start.",
)


AnswerLogp = Literal["auto", "sum", "mean"]
"""How the log-probs of an answer's tokens become one number."""


@dataclass(frozen=True, kw_only=True)
class PairMethod(Method):
    """A method whose loss is one number a preference pair: what the policy prefers against what a reference does."""

    models: ClassVar = (PAIR_REFERENCE,)
    pairwise: ClassVar = True

    beta: float = field(default=0.1, metadata=ABOVE_0)
    """How strongly the policy is held to the reference: an answer's implicit reward is beta log(policy / reference)."""
    loss_type: PreferenceLoss = "sigmoid"
    """sigmoid: the log-likelihood of the preferences; ipo: the squared distance of the margin to 1 / (2 beta); hinge:
    what the margin lacks to 1 / beta (SLiC); apo_zero: chosen answers up and rejected ones down, each for itself."""
    answer_logp: AnswerLogp = "auto"
    """An answer's log(policy / reference) is the sum over its tokens, or their mean. auto: the mean with ipo, the sum
    with the others."""

    def pair_loss(
        self, out: Outputs, batch: Batch, *, label_smoothing: float = 0.0, sft_coef: float = 0.0
    ) -> TokenLoss:
        """One loss a pair, at the last token of its chosen segment (``Batch.of_units``): see ``preference_loss``.

        With ``auto`` an answer's log(policy / reference) is the sum over its tokens, or with ``ipo`` their mean, so
        that 1 / (2 beta) is asked of long and short answers alike (TRL's convention, from IPO's authors; OpenRLHF's is
        the sum).

        Metrics at the same tokens: ``accuracy`` (a tie counts as wrong), ``chosen_reward``, ``rejected_reward`` (beta
        log(policy / reference)) and ``reward_margin``, their difference; ``chosen_logp`` and ``rejected_logp``, sums
        over the answers' tokens; and where the forward gave it, ``entropy``, nats a token. With ``sft_coef`` also
        ``sft_loss``, nats a token.
        """
        logp_T = filled(out.logp_T, "out.logp_T")
        logp_S, ratio_S = of_answers(batch, logp_T), of_answers(batch, logp_T - batch.logp_by("reference"))
        length_S = of_answers(batch, torch.ones_like(logp_T)).clamp(min=1)
        if self.answer_logp == "mean" or (self.answer_logp == "auto" and self.loss_type == "ipo"):
            ratio_S = ratio_S / length_S
        x_P = ratio_S[0::2] - ratio_S[1::2]
        loss_P = preference_loss(ratio_S[0::2], ratio_S[1::2], self.beta, self.loss_type, label_smoothing)
        metrics = {
            "accuracy": (x_P > 0).to(x_P.dtype),
            "reward_margin": self.beta * x_P,
            "chosen_reward": self.beta * ratio_S[0::2],
            "rejected_reward": self.beta * ratio_S[1::2],
            "chosen_logp": logp_S[0::2],
            "rejected_logp": logp_S[1::2],
        }
        if sft_coef:
            metrics["sft_loss"] = -(logp_S / length_S)[0::2]
            loss_P = loss_P + sft_coef * metrics["sft_loss"]
        if out.entropy_T is not None:
            entropy_S = of_answers(batch, out.entropy_T) / length_S
            metrics["entropy"] = (entropy_S[0::2] + entropy_S[1::2]) / 2
        return batch.loss_of_units(loss_P, metrics)


@dataclass(frozen=True, kw_only=True)
class DPO(PairMethod):
    """Direct preference optimization (arXiv:2305.18290, eq. 7), with the losses of IPO, SLiC and APO as choices.

    The likelihood of the chosen answer beside it (``sft_coef``) is that of iterative RPO (arXiv:2404.19733).
    """

    reads: ClassVar = Rows("preferences")
    title: ClassVar = "DPO"
    about: ClassVar = """Improve a model on preference pairs with DPO: no reward model, and nothing is sampled.

    Rows: chosen and rejected, with prompt or with the prompt at the start of both (strings or lists of messages),
    as in TRL.
    Example: tandem dpo --model runs/sft/model --data pairs.jsonl --out runs/dpo --steps 500
    """
    leads: ClassVar = ("accuracy", "loss", "reward_margin")

    label_smoothing: float = field(default=0.0, metadata=must("from 0 to below 0.5", lambda x: 0 <= x < 0.5))
    """Share of preferences that are taken to be the wrong way round, below 0.5 (conservative DPO)."""
    sft_coef: float = field(default=0.0, metadata=AT_LEAST_0)
    """Weight of the chosen answer's negative log-likelihood, a mean over its tokens, beside the loss of the pair."""

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """See ``pair_loss``."""
        return self.pair_loss(out, batch, label_smoothing=self.label_smoothing, sft_coef=self.sft_coef)


def of_answers(batch: Batch, x_T: Tensor) -> Tensor:
    """[S]: the sum of a number over each segment's trainable tokens."""
    return segment_sum(torch.where(batch.trainable_T, x_T, 0.0), send(batch.bounds, x_T.device))
