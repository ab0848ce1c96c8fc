"""What a completion that never ended costs, and one that is about to be too long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.types import StopReason

MissingEos = Literal["none", "replace", "subtract"]
"""Leave the reward alone; replace it (arXiv:2410.18252: by -1, in chat -10); subtract from it (TRL)."""


def shape_reward(reward: float | None, stop: StopReason, *, missing_eos: MissingEos, penalty: float) -> float | None:
    """The reward after the missing-EOS rule, which touches only samples cut off by their length.

    ``penalty``, in reward units, is what is taken off for ``subtract``; ``replace`` takes it off a reward of 0. A
    sample that was left out (None) stays out.
    """
    if reward is None or stop != "length" or missing_eos == "none":
        return reward
    if missing_eos == "replace":
        return -penalty
    if missing_eos == "subtract":
        return reward - penalty
    raise ValueError(f"unknown missing_eos {missing_eos!r}: none, replace or subtract")


@dataclass(frozen=True)
class Overlong:
    """A punishment of length that rises linearly (DAPO, arXiv:2503.14476, eq. 13)."""

    length: int
    """Sampled tokens at which it is whole."""
    buffer: int
    """The last tokens before that, over which it rises from 0."""
    penalty: float
    """The whole of it, in reward units."""

    def cost(self, tokens: int) -> float:
        """What a sample of so many sampled tokens loses, from 0 to ``penalty``."""
        return self.penalty * min(max((tokens - (self.length - self.buffer)) / self.buffer, 0.0), 1.0)
