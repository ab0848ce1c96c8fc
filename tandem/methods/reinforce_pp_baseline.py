"""REINFORCE++ with a baseline: each sample against its prompt's mean, whitened over all tokens of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.functional.advantages import centred
from tandem.methods.base import Samples
from tandem.methods.knobs import ReferenceKL
from tandem.methods.reinforce_pp import ReinforcePP
from tandem.types import Group


@dataclass(frozen=True, kw_only=True)
class ReinforcePPBaseline(ReinforcePP):
    """REINFORCE++-baseline (arXiv:2501.03262): GRPO's baseline, with the spread of the whole step instead of a group's.

    A KL is a loss of its own.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "REINFORCE++-baseline"
    about: ClassVar = "Improve a model against a reward with REINFORCE++ and the mean of a prompt's samples."

    reference_kl: ReferenceKL = ReferenceKL()

    def advantages(self, group: Group) -> list[float]:
        """Rewards less the group's mean."""
        return centred(group.rewards)
