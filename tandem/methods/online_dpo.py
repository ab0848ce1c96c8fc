"""Online DPO: of a prompt's samples the best one is preferred to the worst."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from tandem.batch import Batch, Outputs, TokenLoss, filled
from tandem.errors import expect
from tandem.functional.preference import PreferenceLoss
from tandem.methods.base import Estimate, Method, Samples
from tandem.methods.dpo import PAIR_REFERENCE, AnswerLogp, policy_pair_loss
from tandem.types import Group, PreferencePair, Sequence


@dataclass(frozen=True, kw_only=True)
class OnlineDPO(Method):
    """DPO on the policy's own samples, judged as they come (arXiv:2402.04792).

    The best against the worst of K, and pairs of equal rewards without a gradient, are those of arXiv:2410.18252.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "Online DPO"
    about: ClassVar = """Improve a model against a reward with online DPO: a prompt's best sample against its worst.

    Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.
    Example: tandem online-dpo --model runs/sft/model --reward check.py:right --data prompts.jsonl
    --out runs/online-dpo --steps 200
    """
    models: ClassVar = (PAIR_REFERENCE,)
    pairwise: ClassVar = True
    leads: ClassVar = ("reward", "accuracy", "reward_margin", "entropy", "response_length", "eos_share")

    beta: float = 0.1
    """How strongly the policy is held to the reference: an answer's implicit reward is beta log(policy / reference)."""
    loss_type: PreferenceLoss = "sigmoid"
    """sigmoid: the log-likelihood of the preferences; ipo: the squared distance of the margin to 1 / (2 beta); hinge:
    what the margin lacks to 1 / beta (SLiC); apo_zero: chosen answers up and rejected ones down, each for itself."""
    answer_logp: AnswerLogp = "auto"
    """An answer's log(policy / reference) is the sum over its tokens, or their mean. auto: the mean with ipo, the sum
    with the others."""

    def __post_init__(self) -> None:
        expect(self, "more than 0", lambda x: x > 0, "beta")

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
        """See ``policy_pair_loss``. Of pairs with equal rewards 0, and in ``accuracy`` wrong."""
        token_loss = policy_pair_loss(
            out, batch, beta=self.beta, loss_type=self.loss_type, answer_logp=self.answer_logp
        )
        metrics_T = token_loss.metrics_T
        differ_T = batch.of_units((filled(batch.margin_S, "margin_S")[0::2] > 0).to(token_loss.loss_T.dtype))
        return TokenLoss(
            loss_T=token_loss.loss_T * differ_T,
            metrics_T=metrics_T | {"accuracy": metrics_T["accuracy"] * differ_T},
        )
