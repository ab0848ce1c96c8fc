"""Dr.GRPO: GRPO without its two divisions, by a group's standard deviation and by a sample's length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.functional.advantages import centred
from tandem.methods.base import Samples
from tandem.methods.tokens import TokenMethod
from tandem.types import Aggregation, Group


@dataclass(frozen=True, kw_only=True)
class DrGRPO(TokenMethod):
    """GRPO done right (arXiv:2503.20783): with neither division a step is one along the gradient of the mean reward."""

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "Dr.GRPO"
    about: ClassVar = "Improve a model against a reward with Dr.GRPO: GRPO that divides by no spread and no length."

    aggregation: Aggregation = "constant"

    def advantages(self, group: Group) -> list[float]:
        """One number for each usable rollout: its reward less the group's mean (section 3)."""
        return centred(group.rewards)
