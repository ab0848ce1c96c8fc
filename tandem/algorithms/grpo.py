"""GRPO: the other samples of the prompt are the baseline."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Literal

from tandem.algorithms.clipped import add_kl_loss, clipped_surrogate, sampled_kl
from tandem.errors import expect
from tandem.functional.advantages import centred, group_normalised
from tandem.roles import Algorithm, Estimate, Metrics
from tandem.types import Aggregation, Batch, Group, Outputs, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GRPO(Algorithm):
    """Group relative policy optimization (arXiv:2402.03300, eq. 3), and Dr.GRPO (arXiv:2503.20783) by its knobs.

    Dr.GRPO is ``normalize="none"``, ``aggregation="constant"``, ``kl_coef=0``.
    """

    aggregation: Aggregation = "sequence"
    """Mean over sequences of their token means (the paper), over tokens (DAPO), or over a fixed length (Dr.GRPO)."""
    normalize: Literal["std", "none"] = "std"
    """Divide a group's centered rewards by their standard deviation (the paper), or leave them (Dr.GRPO)."""
    epsilon: float = 1e-4
    """Added to that standard deviation."""
    clip_low: float = 0.2
    """The policy ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The policy ratio is clipped from above at 1 + clip_high."""
    kl_coef: float = 0.04
    """Coefficient of the KL loss (k3) to the reference, per nat. 0: no reference is needed."""

    def __post_init__(self) -> None:
        expect(self, "from 0 to 1", lambda x: 0 <= x <= 1, "clip_low")
        expect(self, "0 or more", lambda x: x >= 0, "clip_high", "kl_coef", "epsilon")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef != 0

    def advantages(self, group: Group) -> list[float]:
        """One number for each usable rollout: its reward against the group's. All 0 where the rewards are equal."""
        if self.normalize == "std":
            return group_normalised(group.rewards, self.epsilon)
        return centred(group.rewards)

    def estimate(self, groups: Seq[Group], batch: Batch, state: dict[str, float]) -> Estimate:
        """Fills ``advantage_T`` and ``kl_coef``. ``equal_reward_groups`` is the share of groups that teach nothing."""
        estimate = super().estimate(groups, replace(batch, kl_coef=self.kl_coef), state)
        judged = [group.rewards for group in groups if group.rewards]
        metrics: Metrics = {"equal_reward_groups": sum(len(set(r)) == 1 for r in judged) / len(judged)}
        if self.needs_reference:
            metrics |= sampled_kl(batch)[1]
        return replace(estimate, metrics=metrics)

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """Clipped surrogate plus ``kl_coef * k3``."""
        token_loss = clipped_surrogate(out, batch, low=self.clip_low, high=self.clip_high)
        return add_kl_loss(token_loss, out, batch) if self.needs_reference else token_loss
