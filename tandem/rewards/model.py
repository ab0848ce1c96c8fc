"""A reward model as a reward: its score at the last token of prompt and completion."""

from __future__ import annotations

from typing import Any

from tandem.data.packing import pack
from tandem.errors import UserError
from tandem.roles import RewardBatch, Scorer
from tandem.types import Sequence


class RewardModel:
    """Judges the sampled token ids themselves, so the policy and the reward model must share their tokenizer."""

    def __init__(self, scorer: Scorer, *, name: str = "reward_model") -> None:
        self.scorer = scorer
        self.name = name

    def score(self, batch: RewardBatch) -> list[float | None]:
        """One score a rollout, in reward units of the model (a logit of preference)."""
        packed = pack([Sequence(token_ids=r.token_ids, trainable=r.trainable) for r in batch.rollouts])
        score_S = self.scorer.score(packed).score_S
        if score_S is None:
            raise UserError(f"{self.name}: the model has no scalar head")
        return list(score_S.tolist())


def require_same_tokenizer(policy_tokenizer: Any, other_tokenizer: Any, *, policy: str, other: str) -> None:
    """Raises UserError where two models would read the same token ids differently."""
    mine, theirs = policy_tokenizer.get_vocab(), other_tokenizer.get_vocab()
    if mine == theirs:
        return
    differing = next(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    raise UserError(
        f"{other} and {policy} have different tokenizers (token {differing!r} is {theirs.get(differing)} there and "
        f"{mine.get(differing)} here); train the reward model from the same base model"
    )
