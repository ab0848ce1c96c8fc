"""RLOO: the mean of the prompt's other samples is the baseline, and nothing is divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.functional.advantages import centred
from tandem.methods.base import Samples
from tandem.methods.knobs import ReferenceKL
from tandem.methods.tokens import TokenMethod
from tandem.types import Aggregation, Group


@dataclass(frozen=True, kw_only=True)
class RLOO(TokenMethod):
    """REINFORCE leave-one-out (arXiv:2402.14740): an answer as a whole is the action that is judged.

    The coefficient of the KL and the clip range are those of TRL's RLOOTrainer.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "RLOO"
    about: ClassVar = "Improve a model against a reward with RLOO: a sample against the mean of its prompt's others."

    aggregation: Aggregation = "constant"
    reference_kl: ReferenceKL = ReferenceKL(kl="reward", kl_coef=0.05)

    def advantages(self, group: Group) -> list[float]:
        """``r_i - mean of the others' r``, which is ``n / (n - 1) (r_i - mean(r))``. 0 for a sample that is alone."""
        others = len(group.rewards) - 1
        return [(others + 1) / others * deviation if others else 0.0 for deviation in centred(group.rewards)]
