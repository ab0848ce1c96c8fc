"""DAPO: GRPO's advantages, clipped higher, of groups that tell good from bad."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tandem.functional.advantages import group_normalised
from tandem.methods.base import Samples
from tandem.methods.knobs import Clip
from tandem.methods.tokens import TokenMethod
from tandem.types import Group


@dataclass(frozen=True, kw_only=True)
class DAPO(TokenMethod):
    """Decoupled clip and dynamic sampling policy optimization (arXiv:2503.14476, eq. 8 to 13).

    It has no KL, unless one is asked for.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "DAPO"
    about: ClassVar = "Improve a model against a reward with DAPO: groups of equal rewards are replaced by others."
    leads: ClassVar = ("reward", "passed_over", "entropy", "response_length", "eos_share")

    clip: Clip = Clip(clip_high=0.28)

    def keep(self, item: Any) -> bool:
        """Not a group with fewer than 2 rewards, or with equal ones before any punishment of length (eq. 11)."""
        judged = [r if r.judged is None else replace(r, reward=r.judged) for r in item.rollouts]
        (group,), _ = self.clipped_rewards([replace(item, rollouts=judged)])
        return len(set(group.rewards)) > 1

    def advantages(self, group: Group) -> list[float]:
        """One number for each usable rollout: its reward normalised in its group (eq. 9)."""
        return group_normalised(group.rewards)
