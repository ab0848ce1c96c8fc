"""Knobs that several methods share: each a frozen dataclass that is a field of theirs, flat on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tandem.errors import UserError, expect, needs
from tandem.functional.kl import KLLoss

KLPlace = Literal["reward", "loss", "none"]
"""Where the KL to the reference counts: in the reward, as a loss of its own, or nowhere."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Bounds of the policy ratio."""

    clip_low: float = 0.2
    """The policy ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The policy ratio is clipped from above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound, above 1, on the ratio where the advantage is negative. None: no bound."""

    def __post_init__(self) -> None:
        expect(self, "from 0 to 1", lambda x: 0 <= x <= 1, "clip_low")
        expect(self, "0 or more", lambda x: x >= 0, "clip_high")
        expect(self, "more than 1", lambda x: x > 1, "dual_clip")


@dataclass(frozen=True, kw_only=True)
class ReferenceKL:
    """The KL to the reference: where it counts, how much, and how it is estimated."""

    kl: KLPlace = field(default="loss", metadata=needs(("kl_coef",)))
    """Where the KL to the reference counts: in the reward, as a loss of its own, or nowhere."""
    kl_coef: float = field(default=0.0, metadata=needs(("kl",)))
    """Coefficient of the KL, per nat, in units of rewards or, of a loss, of advantages; the first one if kl_target is
    set. 0: no reference is needed."""
    kl_estimator: KLLoss = field(default="ratio_k3", metadata=needs(("kl", "loss"), ("kl_coef",)))
    """What the KL loss is: ratio_k3 and k2 lead to KL(policy || reference), k3 to KL(reference || policy)."""
    kl_target: float | None = field(default=None, metadata=needs(("kl",)))
    """KL in nats per sequence towards which the coefficient is steered. None: the coefficient stays."""
    kl_horizon: int = field(default=10000, metadata=needs(("kl_target",)))
    """Sequences over which the steering acts: larger is slower."""

    def __post_init__(self) -> None:
        expect(self, "0 or more", lambda x: x >= 0, "kl_coef")
        expect(self, "more than 0", lambda x: x > 0, "kl_target", "kl_horizon")
        if self.kl_target is not None and not self.counts:
            raise UserError(
                f"kl_target: there is no KL to steer with kl {self.kl!r} and kl_coef {self.kl_coef}; use kl 'reward' "
                "or 'loss', and a coefficient above 0 to start from"
            )

    @property
    def counts(self) -> bool:
        """Whether a reference is needed: nothing is computed for a KL that counts nowhere."""
        return self.kl != "none" and self.kl_coef != 0
