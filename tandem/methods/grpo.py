"""GRPO: the other samples of the prompt are the baseline."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from tandem.batch import Batch, Outputs, TokenLoss
from tandem.errors import expect, needs
from tandem.functional.advantages import centred, group_normalised
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
from tandem.types import Group


@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """Group relative policy optimization (arXiv:2402.03300, eq. 3) with today's defaults.

    The mean over tokens and no KL are DAPO's (arXiv:2503.14476), the bound on the ratio of negative advantages is that
    of dual-clip PPO (arXiv:1912.09729). Dr.GRPO (arXiv:2503.20783) is ``normalize="none"``, ``aggregation="constant"``.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "GRPO"
    about: ClassVar = """Improve a model against a reward with GRPO: the other samples of a prompt are the baseline.

    Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.
    Example: tandem grpo --model runs/sft/model --reward check.py:right --data prompts.jsonl --out runs/grpo
    --steps 200
    """
    models: ClassVar = (REFERENCE,)
    leads: ClassVar = SAMPLED_LEADS

    normalize: Literal["std", "none"] = "std"
    """Divide a group's centered rewards by their standard deviation (the paper), or leave them (Dr.GRPO)."""
    epsilon: float = field(default=1e-4, metadata=needs(("normalize",)))
    """Added to that standard deviation."""
    clip_low: float = 0.2
    """The policy ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The policy ratio is clipped from above at 1 + clip_high."""
    dual_clip: float | None = 3.0
    """Bound, above 1, on the ratio where the advantage is negative. None: no bound."""
    kl: KLPlace = field(default="loss", metadata=needs(("kl_coef",)))
    """Where the KL to the reference counts: in each sample's reward (k1), as a loss, or nowhere."""
    kl_coef: float = field(default=0.0, metadata=needs(("kl",)))
    """Coefficient of the KL, per nat, in units of rewards or, of a loss, of advantages. 0: no reference is needed."""
    kl_estimator: KLLoss = field(default="ratio_k3", metadata=needs(("kl", "loss"), ("kl_coef",)))
    """What the KL loss is: ratio_k3 and k2 lead to KL(policy || reference), k3 to KL(reference || policy)."""

    def __post_init__(self) -> None:
        check_clipped(self)
        expect(self, "0 or more", lambda x: x >= 0, "kl_coef", "epsilon")

    def needs(self) -> tuple[Need, ...]:
        return self.models if uses_kl(self) else ()

    def advantages(self, group: Group) -> list[float]:
        """One number for each usable rollout: its reward against the group's. All 0 where the rewards are equal."""
        if self.normalize == "std":
            return group_normalised(group.rewards, self.epsilon)
        return centred(group.rewards)

    def estimate(self, groups: Seq[Group], batch: Batch, state: dict[str, float]) -> Estimate:
        """Fills ``advantage_T`` and ``state``; metrics are those of ``charge_kl``."""
        groups, batch, metrics = charge_kl(self, groups, batch)
        return replace(super().estimate(groups, batch, state), metrics=metrics)

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """Clipped surrogate, plus the KL where ``kl="loss"``."""
        return clipped_with_kl(self, out, batch)
