"""A reward model as a reward: its score at the last token of prompt and completion."""

from __future__ import annotations

from typing import Any

from tandem.data.packing import pack
from tandem.data.tokenize import sft_sequence
from tandem.errors import UserError
from tandem.roles import RewardBatch, Scorer
from tandem.types import Sequence, StopReason


class RewardModel:
    """A model with a scalar head that has read prompt and completion.

    ``tokenizer`` is the reward model's own where that differs from the policy's: it then reads the text, through its
    own chat template for conversations. None: it reads the sampled token ids as they are.
    """

    def __init__(self, scorer: Scorer, *, tokenizer: Any = None, name: str = "reward_model") -> None:
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.name = name

    def score(self, batch: RewardBatch) -> list[float | None]:
        """One score a rollout, in reward units of the model (a logit of preference)."""
        if self.tokenizer is None:
            sequences = [Sequence(token_ids=r.token_ids, trainable=r.trainable) for r in batch.rollouts]
        else:
            samples = zip(batch.prompts, batch.completions, batch.rollouts, strict=True)
            sequences = [self._read(prompt, completion, r.stop) for prompt, completion, r in samples]
        score_S = self.scorer.score(pack(sequences)).score_S
        if score_S is None:
            raise UserError(f"{self.name}: the model has no scalar head")
        return list(score_S.tolist())

    def _read(self, prompt: Any, completion: Any, stop: StopReason) -> Sequence:
        sequence = sft_sequence({"prompt": prompt, "completion": completion}, self.tokenizer)
        if stop == "length":
            # It was cut off, so it has no end of sequence to be judged at.
            return Sequence(token_ids=sequence.token_ids[:-1], trainable=sequence.trainable[:-1])
        return sequence


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return a.get_vocab() == b.get_vocab()


def require_same_tokenizer(policy_tokenizer: Any, other_tokenizer: Any, *, policy: str, other: str) -> None:
    """Raises UserError where two models would read the same token ids differently."""
    if same_tokenizer(policy_tokenizer, other_tokenizer):
        return
    mine, theirs = policy_tokenizer.get_vocab(), other_tokenizer.get_vocab()
    differing = next(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    raise UserError(
        f"{other} and {policy} have different tokenizers (token {differing!r} is {theirs.get(differing)} there and "
        f"{mine.get(differing)} here); start both from the same base model"
    )
