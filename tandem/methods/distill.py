"""Knowledge distillation on a dataset: the student's distributions are brought to a frozen teacher's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tandem.batch import Asks, Batch, Outputs, TokenLoss, filled
from tandem.functional.divergence import Divergence, DivergenceKind
from tandem.keys import A_SHARE, ABOVE_0, AT_LEAST_0, must, needs
from tandem.methods.base import TEACHER, Method, Rows


@dataclass(frozen=True, kw_only=True)
class Distill(Method):
    """Distillation (arXiv:1503.02531) on the tokens of a dataset, with the divergences of GKD (arXiv:2306.13649)."""

    reads: ClassVar = Rows("demonstrations")
    title: ClassVar = "distillation"
    about: ClassVar = """Distil a teacher into a model on a dataset: its whole distribution at each token, or its top k.

    Rows: text, messages, or prompt and completion (strings or lists of messages), as in TRL.
    Example: tandem distill --model ./small --teacher ./large --data demos.jsonl --out runs/distill --steps 500
    """
    models: ClassVar = (TEACHER,)
    learning_rate: ClassVar = 2e-5
    leads: ClassVar = ("kd_loss", "sft_loss", "loss")

    divergence: DivergenceKind = "forward"
    """forward: KL(teacher || student), which covers all that the teacher does; reverse: KL(student || teacher), which
    avoids what it does not do; jsd: between the two."""
    beta: float = field(
        default=0.5, metadata=must("between 0 and 1, both left out", lambda x: 0 < x < 1) | needs(("divergence", "jsd"))
    )
    """Of jsd, between 0 and 1: the teacher's share of the mixture that both are compared with."""
    kd_coef: float = field(default=1.0, metadata=A_SHARE)
    """Weight of the divergence; that of the data's own tokens (SFT) is 1 less this."""
    kd_temperature: float = field(default=1.0, metadata=ABOVE_0)
    """Divides the logits of both models in the divergence."""
    teacher_top_k: int = field(default=0, metadata=AT_LEAST_0)
    """So many of the teacher's likeliest tokens are compared, and all others as one. 0: the whole vocabulary."""
    aggregation: Literal["token", "sequence"] = "token"
    """Which mean the loss is: over tokens, or over sequences of their token means."""

    @property
    def asks(self) -> Asks:
        return Asks(divergence=Divergence(kind=self.divergence, beta=self.beta, temperature=self.kd_temperature))

    def asks_of(self, role: str, temperature: float = 1.0) -> Asks:
        """The teacher is asked for what the divergence needs of it."""
        if role == "teacher":
            k = self.teacher_top_k
            return Asks(states=not k, top_k=k, temperature=self.kd_temperature)
        return super().asks_of(role, temperature)

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """``(1 - kd_coef) sft + kd_coef kd`` of each token, both metrics too (``sft_loss``, ``kd_loss``), in nats."""
        kd_T, sft_T = filled(out.divergence_T, "out.divergence_T"), -filled(out.logp_T, "out.logp_T")
        loss_T = self.kd_coef * kd_T
        if self.kd_coef < 1:
            loss_T = loss_T + (1 - self.kd_coef) * sft_T
        return TokenLoss(loss_T=loss_T, metrics_T={"kd_loss": kd_T.detach(), "sft_loss": sft_T.detach()})
