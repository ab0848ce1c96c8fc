"""Online DPO: of a prompt's samples the best one is preferred to the worst."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from tandem.batch import Batch, Outputs, TokenLoss, filled
from tandem.methods.base import Estimate, Samples
from tandem.methods.dpo import PairMethod
from tandem.types import Group, PreferencePair, Sequence


@dataclass(frozen=True, kw_only=True)
class OnlineDPO(PairMethod):
    """DPO on the policy's own samples, judged as they come (arXiv:2402.04792).

    The best against the worst of K, and pairs of equal rewards without a gradient, are those of arXiv:2410.18252.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "Online DPO"
    about: ClassVar = "Improve a model against a reward with online DPO: a prompt's best sample against its worst."
    leads: ClassVar = ("reward", "accuracy", "reward_margin", "entropy", "response_length", "eos_share")

    def examples(self, group: Group) -> list[PreferencePair]:
        """The usable rollout with the highest reward against the one with the lowest; of equal ones the first.

        The pair's margin is the difference of their rewards. Nothing of a group with fewer than two usable ones.
        """
        usable, rewards = group.usable, group.rewards
        if len(usable) < 2:
            return []
        best, worst = (
            Sequence(
                token_ids=rollout.token_ids, trainable=rollout.trainable, untruncated_logp=rollout.untruncated_logp
            )
            for rollout in (usable[rewards.index(max(rewards))], usable[rewards.index(min(rewards))])
        )
        return [PreferencePair(chosen=best, rejected=worst, margin=max(rewards) - min(rewards))]

    def estimate(self, groups: Seq[Group], batch: Batch, state: dict[str, float]) -> Estimate:
        """``batch`` as it is. ``equal_reward_groups`` is the share of its pairs whose rewards are equal."""
        equal_S = filled(batch.margin_S, "margin_S") == 0
        return Estimate(batch=batch, state=state, metrics={"equal_reward_groups": equal_S.double().mean().item()})

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """See ``pair_loss``. Of pairs with equal rewards 0, and in ``accuracy`` wrong."""
        token_loss = self.pair_loss(out, batch)
        metrics_T = token_loss.metrics_T
        differ_T = batch.of_units((filled(batch.margin_S, "margin_S")[0::2] > 0).to(token_loss.loss_T.dtype))
        return TokenLoss(
            loss_T=token_loss.loss_T * differ_T, metrics_T=metrics_T | {"accuracy": metrics_T["accuracy"] * differ_T}
        )
