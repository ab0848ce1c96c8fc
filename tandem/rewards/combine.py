"""Several rewards into one number a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

from tandem.roles import Reward, RewardBatch


def judge(
    rewards: Seq[Reward], weights: Seq[float], batch: RewardBatch
) -> tuple[list[float | None], list[dict[str, float]]]:
    """Per sample: the weighted sum of its rewards, and its parts by name, before their weights.

    A reward that leaves a sample out (None) adds nothing to it; where all of them do, the total is None (TRL).
    Rewards that share a name are told apart as ``name``, ``name#2``, …. Raises ValueError where the numbers of
    rewards, weights or scores do not fit.
    """
    parts: list[dict[str, float]] = [{} for _ in batch.completions]
    totals: list[float | None] = [None] * len(parts)
    seen: Counter[str] = Counter()
    for reward, weight in zip(rewards, weights, strict=True):
        seen[reward.name] += 1
        name = reward.name if seen[reward.name] == 1 else f"{reward.name}#{seen[reward.name]}"
        for i, (part, score) in enumerate(zip(parts, reward.score(batch), strict=True)):
            if score is not None:
                part[name] = score
                totals[i] = (totals[i] or 0.0) + weight * score
    return totals, parts
