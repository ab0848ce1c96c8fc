"""GRPO: the other samples of the prompt are the baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tandem.functional.advantages import centred, group_normalised
from tandem.keys import AT_LEAST_0, needs
from tandem.methods.base import Samples
from tandem.methods.knobs import Clip
from tandem.methods.tokens import TokenMethod
from tandem.types import Group


@dataclass(frozen=True, kw_only=True)
class GRPO(TokenMethod):
    """Group relative policy optimization (arXiv:2402.03300, eq. 3) with today's defaults.

    The mean over tokens and no KL are DAPO's (arXiv:2503.14476), the bound on the ratio of negative advantages is that
    of dual-clip PPO (arXiv:1912.09729). Dr.GRPO (arXiv:2503.20783) is ``normalize="none"``, ``aggregation="constant"``.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "GRPO"
    about: ClassVar = "Improve a model against a reward with GRPO: the other samples of a prompt are the baseline."
    normalize: Literal["std", "none"] = "std"
    """Divide a group's centered rewards by their standard deviation (the paper), or leave them (Dr.GRPO)."""
    epsilon: float = field(default=1e-4, metadata=AT_LEAST_0 | needs(("normalize",)))
    """Added to that standard deviation."""
    clip: Clip = Clip(dual_clip=3.0)

    def advantages(self, group: Group) -> list[float]:
        """One number for each usable rollout: its reward against the group's. All 0 where the rewards are equal."""
        if self.normalize == "std":
            return group_normalised(group.rewards, self.epsilon)
        return centred(group.rewards)
