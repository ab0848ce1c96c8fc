"""Several rewards into one number a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

from tandem.errors import UserError
from tandem.rewards.function import sample_in_words
from tandem.roles import Reward, RewardBatch

OVERLONG = "overlong"
"""The part of a reward that length has taken off (``tandem.rewards.shaping``): no reward's own."""
LARGEST_REWARD = 1e15
"""Rewards are squared and added up in float32, which ends at 3.4e38: those of a million samples stay below 1e36."""


def combine(
    rewards: Seq[Reward], weights: Seq[float], scores: Seq[Seq[float | None]], batch: RewardBatch
) -> tuple[list[float | None], list[dict[str, float]]]:
    """Per sample: the weighted sum of its rewards, and its parts by name, before their weights.

    ``scores`` are each reward's, one a sample. A reward that leaves a sample out (None) adds nothing to it; where all
    of them do, the total is None (TRL). Without any reward every total is 0. Parts are called as ``part_names`` says.
    Raises UserError for a score or a sum that is not a number or beyond ``LARGEST_REWARD``, with its sample, and
    ValueError where the numbers of rewards, weights or scores do not fit.
    """
    parts: list[dict[str, float]] = [{} for _ in batch.completions]
    totals: list[float | None] = [None if rewards else 0.0] * len(parts)
    for name, weight, its_scores in zip(part_names(rewards), weights, scores, strict=True):
        for i, (part, score) in enumerate(zip(parts, its_scores, strict=True)):
            if score is not None:
                part[name] = checked_score(name, score, batch, i)
                totals[i] = (totals[i] or 0.0) + weight * score
    for i, total in enumerate(totals):
        if total is not None:
            checked_score("weighted sum", total, batch, i)
    return totals, parts


def part_names(rewards: Seq[Reward]) -> list[str]:
    """What each reward's part is called: rewards that share a name are told apart as ``name``, ``name#2``, …."""
    seen = Counter({OVERLONG: 1})
    names = []
    for reward in rewards:
        seen[reward.name] += 1
        names.append(reward.name if seen[reward.name] == 1 else f"{reward.name}#{seen[reward.name]}")
    return names


def checked_score(name: str, score: float, batch: RewardBatch, index: int) -> float:
    """The score. Raises UserError where it is not a number or beyond ``LARGEST_REWARD``, and says of which sample."""
    if not abs(score) <= LARGEST_REWARD:
        raise UserError(
            f"reward {name!r} is {score} for {sample_in_words(batch, index)}; a reward must be a number from "
            f"{-LARGEST_REWARD:.0e} to {LARGEST_REWARD:.0e}"
        )
    return score
