"""REINFORCE++: rewards and each token's KL added up, and whitened over all tokens of the step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from tandem.batch import Batch
from tandem.functional.advantages import gae, whiten
from tandem.functional.rounding import rounding_of
from tandem.keys import FROM_0_TO_1
from tandem.lazy import torch
from tandem.methods.base import Samples, at_last_trainable
from tandem.methods.knobs import ReferenceKL
from tandem.methods.tokens import TokenMethod, kl_size
from tandem.roles import Metrics
from tandem.types import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(TokenMethod):
    """REINFORCE++ (arXiv:2501.03262): PPO's token rewards, clipping and whitening, without its critic."""

    reads: ClassVar = Samples()
    title: ClassVar = "REINFORCE++"
    about: ClassVar = "Improve a model against a reward with REINFORCE++: rewards whitened over the step, no critic."
    example: ClassVar = "--reward-model runs/rm/model"

    reference_kl: ReferenceKL = ReferenceKL(kl="reward", kl_coef=0.01)
    reward_clip: float | None = 10.0
    gamma: float = field(default=1.0, metadata=FROM_0_TO_1)
    """Discount per trainable token."""

    def credit(
        self, groups: Seq[Group], batch: Batch, cost_T: Tensor, state: dict[str, float]
    ) -> tuple[Tensor, dict[str, float], Metrics]:
        """The discounted sum of each token's reward and those after it, whitened over all tokens of the step.

        ``advantages`` says what a sample's reward is, given at its last token. Metrics: ``return_mean`` and
        ``return_std``, of the sums.
        """
        reward_S = torch.tensor([a for group in groups for a in self.advantages(group)], dtype=cost_T.dtype)
        trainable_T, zero_T = batch.trainable_T, torch.zeros_like(cost_T)

        def added_up(x_T: Tensor) -> Tensor:
            return gae(x_T, zero_T, trainable_T, batch.bounds, self.gamma, 1.0)[0]

        return_T = added_up(at_last_trainable(reward_S, batch) - cost_T)
        size_T = added_up(kl_size(self.reference_kl, batch, state))
        return_N = return_T[trainable_T]
        metrics = {"return_mean": return_N.mean().item(), "return_std": return_N.std(correction=0).item()}
        floor = rounding_of(return_N, size_T[trainable_T])
        return whiten(return_T, trainable_T, floor), state, metrics

    def advantages(self, group: Group) -> list[float]:
        """The rewards as they are."""
        return group.rewards
