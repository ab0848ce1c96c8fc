"""CISPO: every token learns, with an importance weight that is clipped and not differentiated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.batch import Batch, Outputs, TokenLoss
from tandem.errors import UserError
from tandem.functional.advantages import group_normalised
from tandem.functional.policy import clipped_weight_loss
from tandem.methods.base import Samples
from tandem.methods.knobs import Clip
from tandem.methods.tokens import TokenMethod, clipped_surrogate
from tandem.types import Group


@dataclass(frozen=True, kw_only=True)
class CISPO(TokenMethod):
    """Clipped importance-sampling weight policy optimization (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5).

    It has no KL, unless one is asked for. A token that PPO's clipping would leave without a gradient keeps it here,
    only its weight is bounded: at 5, as in ScaleRL (arXiv:2510.13786), and from below not at all.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "CISPO"
    about: ClassVar = "Improve a model against a reward with CISPO: every token learns, with a weight that is bounded."

    clip: Clip = Clip(clip_low=1.0, clip_high=4.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip.dual_clip is not None and self.clip.dual_clip >= 1 + self.clip.clip_high:
            raise UserError(
                f"dual_clip: {self.clip.dual_clip:g} has no effect, since no weight is above 1 + clip_high, "
                f"{1 + self.clip.clip_high:g}; give less, or leave it out"
            )

    def advantages(self, group: Group) -> list[float]:
        """One number for each usable rollout: its reward, normalised in its group."""
        return group_normalised(group.rewards)

    def surrogate(self, out: Outputs, batch: Batch) -> TokenLoss:
        """The clipped weight, not differentiated, times the advantage, times the log-prob (eq. 4)."""
        return clipped_surrogate(out, batch, self.clip, clipped_weight_loss)
