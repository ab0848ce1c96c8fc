"""On-policy distillation: the student samples, and a teacher judges each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from tandem.batch import Batch
from tandem.functional.advantages import centred, gae
from tandem.keys import ABOVE_0, AT_LEAST_0, FROM_0_TO_1, needs
from tandem.lazy import torch
from tandem.methods.base import REFERENCE, TEACHER, Samples, spread
from tandem.methods.knobs import Clip
from tandem.methods.tokens import TokenMethod, sampled_kl
from tandem.roles import Metrics
from tandem.types import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OPD(TokenMethod):
    """Reverse-KL distillation on the student's own samples (arXiv:2306.13649 with lambda 1; arXiv:2306.08543).

    As in Thinking Machines' "On-Policy Distillation" (2025) the advantage of a token is the teacher's log-prob less
    the student's at that token alone, with ``teacher_discount=0``; with 1 those of all later tokens are added, which
    is MiniLLM's gradient (arXiv:2306.08543, eq. 2), without its division by length and mixture with the teacher.
    """

    reads: ClassVar = Samples(rewards="optional")
    title: ClassVar = "on-policy distillation"
    about: ClassVar = "Distil a teacher into a model on the model's own samples, alone or beside a reward."
    example: ClassVar = "--teacher runs/grpo/model"
    models: ClassVar = (TEACHER, REFERENCE)
    leads: ClassVar = ("teacher_kl", "reward", "entropy", "response_length", "eos_share")

    teacher_coef: float = field(default=1.0, metadata=ABOVE_0)
    """Weight of the teacher's log-prob less the student's, per nat, in each token's advantage."""
    teacher_discount: float = field(default=0.0, metadata=FROM_0_TO_1)
    """What each later token counts, per token between: 0 looks at a token alone, 1 adds up the rest of the answer."""
    reward_coef: float = field(default=0.0, metadata=AT_LEAST_0)
    """Weight of a sample's reward less the mean of its prompt's samples, in the advantage of each of its tokens."""
    reward_clip: float | None = field(default=None, metadata=needs(("reward_coef",)))
    """Rewards are clipped to ±reward_clip before their mean is taken. None: not clipped."""
    clip: Clip = Clip(dual_clip=3.0)

    @property
    def samples(self) -> Samples:
        return Samples(at_least=2) if self.reward_coef else self.reads

    def advantages(self, group: Group) -> list[float]:
        """The part of the reward: of each usable rollout, against the group's mean."""
        return [self.reward_coef * advantage for advantage in centred(group.rewards)]

    def credit(
        self, groups: Seq[Group], batch: Batch, cost_T: Tensor, state: dict[str, float]
    ) -> tuple[Tensor, dict[str, float], Metrics]:
        """The rewards' part, less the KL to the teacher.

        Metrics: ``teacher_kl``, the mean over tokens of the student's log-prob less the teacher's, and
        ``teacher_kl_per_sequence``, the mean over sequences of its sum, in nats.
        """
        k1_T, metrics = sampled_kl(batch, "teacher", "teacher_kl")
        if self.teacher_discount:
            nothing_T = torch.zeros_like(k1_T)
            k1_T, _ = gae(k1_T, nothing_T, batch.trainable_T, batch.bounds, gamma=self.teacher_discount, lam=1.0)
        advantage_T = spread([a for group in groups for a in self.advantages(group)], batch)
        return advantage_T - self.teacher_coef * k1_T - cost_T, state, metrics
