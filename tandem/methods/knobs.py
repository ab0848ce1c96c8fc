"""Knobs that several methods share: each a frozen dataclass that is a field of theirs, flat on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tandem.errors import UserError
from tandem.functional.corrections import BOUNDS, Rule
from tandem.functional.kl import KLEstimator
from tandem.keys import ABOVE_0, AT_LEAST_0, FROM_0_TO_1, INFINITE, Checked, must, needs

KLPlace = Literal["reward", "loss", "none"]
"""Where the KL to the reference counts: in the reward, as a loss of its own, or nowhere."""


RATIOS = needs(("part", "ratios other than 1"))
"""Keys of bounds on the policy ratio, which is 1 where one step is taken against the trainer's own log-probs."""


@dataclass(frozen=True, kw_only=True)
class Clip(Checked):
    """Bounds of the policy ratio."""

    clip_low: float = field(default=0.2, metadata=FROM_0_TO_1 | RATIOS)
    """The policy ratio is clipped from below at 1 - clip_low."""
    clip_high: float = field(default=0.2, metadata=AT_LEAST_0 | RATIOS)
    """The policy ratio is clipped from above at 1 + clip_high."""
    dual_clip: float | None = field(default=None, metadata=must("more than 1", lambda x: x > 1) | RATIOS)
    """Bound, above 1, on the ratio where the advantage is negative. None: no bound."""


@dataclass(frozen=True, kw_only=True)
class ReferenceKL(Checked):
    """The KL to the reference: where it counts, how much, and how it is estimated."""

    kl: KLPlace = field(default="loss", metadata=needs(("kl_coef",)))
    """Where the KL to the reference counts: in the reward, as a loss of its own, or nowhere."""
    kl_coef: float = field(default=0.0, metadata=AT_LEAST_0 | needs(("kl",)))
    """Coefficient of the KL, per nat, in units of rewards or, of a loss, of advantages; the first one if kl_target is
    set. 0: no reference is needed."""
    kl_estimator: KLEstimator | None = field(default=None, metadata=needs(("kl",), ("kl_coef",)))
    """What estimates it. In the reward: k1, k2, k3, of which k1 leads to KL(policy || reference). As a loss: ratio_k3
    and k2, which lead there, and k3, to KL(reference || policy). None: k1 in the reward, ratio_k3 as a loss."""
    kl_target: float | None = field(default=None, metadata=ABOVE_0 | needs(("kl",)))
    """KL in nats per sequence towards which the coefficient is steered. None: the coefficient stays."""
    kl_horizon: int = field(default=10000, metadata=ABOVE_0 | needs(("kl_target",)))
    """Sequences over which the steering acts: larger is slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kl, self.kl_estimator) == ("loss", "k1"):
            raise UserError(
                "kl_estimator: k1 has no gradient in expectation, so as a loss it would add noise alone; give k2, k3 "
                "or ratio_k3, or kl 'reward'"
            )
        if (self.kl, self.kl_estimator) == ("reward", "ratio_k3"):
            raise UserError("kl_estimator: ratio_k3 is a loss; in the reward give k1, k2 or k3, or kl 'loss'")
        if self.kl_target is not None and not self.counts:
            raise UserError(
                f"kl_target: there is no KL to steer with kl {self.kl!r} and kl_coef {self.kl_coef}; use kl 'reward' "
                "or 'loss', and a coefficient above 0 to start from"
            )

    @property
    def counts(self) -> bool:
        """Whether a reference is needed: nothing is computed for a KL that counts nowhere."""
        return self.kl != "none" and self.kl_coef != 0

    @property
    def estimator(self) -> KLEstimator:
        """The one that is given, or the one that is exact where the KL counts."""
        return self.kl_estimator or ("k1" if self.kl == "reward" else "ratio_k3")


@dataclass(frozen=True, kw_only=True)
class Correction(Checked):
    """What makes up for a sampler whose probabilities are not the trainer's."""

    correction: Literal[Rule, "none"] = field(default="none", metadata=needs(("old_logp", "trainer")))
    """Weights by the trainer's probability over the sampler's: cut off for each token (token_tis) or each sequence
    (sequence_tis), or with tokens (decoupled, icepop, gap) or sequences (geo) of other probabilities left out."""
    correction_low: float | None = field(default=None, metadata=AT_LEAST_0 | needs(("correction", *BOUNDS)))
    """Its bound on that ratio from below. None: 0.2 (icepop), 0.99 (geo), 0 (all others)."""
    correction_high: float | None = field(default=None, metadata=ABOVE_0 | needs(("correction", *BOUNDS)) | INFINITE)
    """Its bound from above; .inf: none. None: 2 (token_tis, sequence_tis), 1.01 (geo), 5 (all others)."""
    correction_gap: float = field(
        default=0.3, metadata=must("more than 0 and less than 1", lambda x: 0 < x < 1) | needs(("correction", "gap"))
    )
    """gap: how far the two probabilities of a token may be apart. The bounds cut its weights off."""
    uncorrected: bool = field(
        default=False, metadata=needs(("max_lag",), ("old_logp", "trainer"), ("correction", "none"))
    )
    """Train on samples of older weights as if the newest had drawn them: old_logp trainer, max_lag above 0 and no
    correction are refused without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction in BOUNDS and not self.bounds[0] < self.bounds[1]:
            raise UserError(
                f"correction_low: expected less than correction_high, {self.bounds[1]}, got {self.bounds[0]}"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds that are given, or the rule's usual ones."""
        low, high = BOUNDS.get(self.correction, (0.0, math.inf))
        given = self.correction_low, self.correction_high
        return (low if given[0] is None else given[0], high if given[1] is None else given[1])
