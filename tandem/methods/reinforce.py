"""REINFORCE: rewards less a baseline that is one number for all prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from tandem.batch import Batch
from tandem.functional.advantages import centred
from tandem.functional.segments import segment_sum
from tandem.keys import must, needs
from tandem.methods.base import Samples, spread
from tandem.methods.knobs import ReferenceKL
from tandem.methods.tokens import TokenMethod
from tandem.roles import Metrics
from tandem.types import Aggregation, Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class REINFORCE(TokenMethod):
    """REINFORCE (Williams 1992, Machine Learning 8, eq. 5), a whole answer being one action (arXiv:2402.14740)."""

    reads: ClassVar = Samples()
    title: ClassVar = "REINFORCE"
    about: ClassVar = "Improve a model against a reward with REINFORCE: no critic, no groups, one baseline for all."
    example: ClassVar = "--reward-model runs/rm/model"

    aggregation: Aggregation = "constant"
    reference_kl: ReferenceKL = ReferenceKL(kl="reward", kl_coef=0.05)
    baseline: Literal["batch", "running", "none"] = "batch"
    """What comes off each reward: the mean of the step's, a moving mean of the steps before it, or nothing."""
    baseline_decay: float = field(
        default=0.9, metadata=must("at least 0 and less than 1", lambda x: 0 <= x < 1) | needs(("baseline", "running"))
    )
    """running: how much of the moving mean stays after a step."""

    def initial_state(self) -> dict[str, float]:
        """The KL coefficient, where the KL counts, and the moving mean with the weight that it has gathered."""
        moving = {"baseline": 0.0, "baseline_weight": 0.0} if self.baseline == "running" else {}
        return super().initial_state() | moving

    def credit(
        self, groups: Seq[Group], batch: Batch, cost_T: Tensor, state: dict[str, float]
    ) -> tuple[Tensor, dict[str, float], Metrics]:
        """Each sample's reward, less its cost, less the baseline, which is the metric ``baseline``.

        The first step of ``baseline="running"`` has no steps before it, and takes its own mean.
        """
        given = [reward for group in groups for reward in group.rewards]
        costs = segment_sum(cost_T, batch.bounds).tolist()
        rewards = [reward - cost for reward, cost in zip(given, costs, strict=True)]
        if self.baseline == "none":
            return spread(rewards, batch), state, {}
        mean = statistics.fmean(rewards)
        if self.baseline == "batch":
            return spread(centred(rewards), batch), state, {"baseline": mean}
        # The moving mean begins at 0, and what it lacks for that is made up for by its weight, as in Adam.
        moving, weight = state["baseline"], state["baseline_weight"]
        baseline = moving / weight if weight > 0 else mean
        kept = self.baseline_decay
        state = state | {"baseline": kept * moving + (1 - kept) * mean, "baseline_weight": kept * weight + (1 - kept)}
        return spread([reward - baseline for reward in rewards], batch), state, {"baseline": baseline}
