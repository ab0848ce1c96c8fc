"""What a completion that never ended costs."""

from __future__ import annotations

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
