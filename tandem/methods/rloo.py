"""RLOO: the mean of the prompt's other samples is the baseline, and nothing is divided."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import ClassVar

from tandem.batch import Batch, Outputs, TokenLoss
from tandem.errors import expect, needs
from tandem.functional.advantages import centred
from tandem.functional.kl import KLLoss
from tandem.methods.base import REFERENCE, Estimate, Method, Need, Samples
from tandem.methods.clipped import (
    SAMPLED_LEADS,
    KLPlace,
    charge_kl,
    check_clipped,
    clipped_with_kl,
    uses_kl,
)
from tandem.types import Aggregation, Group


@dataclass(frozen=True, kw_only=True)
class RLOO(Method):
    """REINFORCE leave-one-out (arXiv:2402.14740): an answer as a whole is the action that is judged.

    The coefficient of the KL and the clip range are those of TRL's RLOOTrainer.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "RLOO"
    about: ClassVar = """Improve a model against a reward with RLOO: a sample against the mean of its prompt's others.

    Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.
    Example: tandem rloo --model runs/sft/model --reward check.py:right --data prompts.jsonl --out runs/rloo
    --steps 200
    """
    models: ClassVar = (REFERENCE,)
    leads: ClassVar = SAMPLED_LEADS

    aggregation: Aggregation = field(default="constant", metadata=needs(("part", "losses of tokens")))
    """Which mean the loss is: over tokens, over sequences of their token means, or per sequence over a fixed length."""
    clip_low: float = 0.2
    """The policy ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The policy ratio is clipped from above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound, above 1, on the ratio where the advantage is negative. None: no bound."""
    kl: KLPlace = "reward"
    """Where the KL to the reference counts: in each sample's reward (k1), as a loss, or nowhere."""
    kl_coef: float = field(default=0.05, metadata=needs(("kl",)))
    """Coefficient of the KL, per nat, in units of rewards. 0: no reference is needed."""
    kl_estimator: KLLoss = field(default="ratio_k3", metadata=needs(("kl", "loss"), ("kl_coef",)))
    """What the KL loss is: ratio_k3 and k2 lead to KL(policy || reference), k3 to KL(reference || policy)."""

    def __post_init__(self) -> None:
        check_clipped(self)
        expect(self, "0 or more", lambda x: x >= 0, "kl_coef")

    def needs(self) -> tuple[Need, ...]:
        return self.models if uses_kl(self) else ()

    def advantages(self, group: Group) -> list[float]:
        """``r_i - mean of the others' r``, which is ``n / (n - 1) (r_i - mean(r))``. 0 for a sample that is alone."""
        others = len(group.rewards) - 1
        return [(others + 1) / others * deviation if others else 0.0 for deviation in centred(group.rewards)]

    def estimate(self, groups: Seq[Group], batch: Batch, state: dict[str, float]) -> Estimate:
        """Fills ``advantage_T`` and ``state``; metrics are those of ``charge_kl``."""
        groups, batch, metrics = charge_kl(self, groups, batch)
        return replace(super().estimate(groups, batch, state), metrics=metrics)

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """Clipped surrogate, plus the KL where ``kl="loss"``. While the ratio is 1, its gradient is REINFORCE's."""
        return clipped_with_kl(self, out, batch)
