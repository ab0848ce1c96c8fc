"""A reward model as a reward: its score at the last token of prompt and completion."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence as Seq
from typing import Any

from tandem.data.packing import pack, pack_pairs
from tandem.data.tokenize import encode, judged_sequence, with_eos
from tandem.errors import UserError
from tandem.rewards.combine import checked_score
from tandem.roles import RewardBatch, Seat
from tandem.types import Limits, PreferencePair, Rollout, ScoreScale, Sequence, StopReason

log = logging.getLogger("tandem")
SCORED = 1024
"""The scale of a model's scores is that of 1,024 pairs, or of all where there are fewer."""
SCORED_AT_ONCE = 64
"""Pairs that are scored in one call."""


class RewardModel:
    """A model with a scalar head that has read prompt and completion.

    It reads an answer as reward models are trained: one that ended, at a stop string too, is its text and then one
    end-of-sequence token; one that was cut off by its length has no end to be judged at. ``tokenizer`` is the reward
    model's own. ``reads_ids``: the policy has the same one, and the sampled token ids are read as they are; otherwise
    the text is, through the reward model's own chat template for conversations.
    """

    name = "reward_model"

    def __init__(
        self,
        scorer: Seat,
        tokenizer: Any,
        *,
        reads_ids: bool,
        scale: ScoreScale | None = None,
        limits: Limits | None = None,
        token_budget: int | None = None,
    ) -> None:
        """``scale``: scores are less its mean, and divided by its standard deviation. ``limits``: of the model, where
        nothing has looked at the length of what it reads before. ``token_budget``: tokens of its micro-batches, above
        which it is said once that it has read more."""
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.reads_ids = reads_ids
        self.scale = scale
        self.token_budget = token_budget
        self.positions, self.whose = (limits.positions, limits.whose) if limits else (None, "")

    def score(self, batch: RewardBatch) -> list[float | None]:
        """One score a rollout, in reward units of the model (a logit of preference), or in standard deviations.

        Raises UserError where the model has no scalar head, and where a score is no finite number or a text goes beyond
        the model's positions, with its sample.
        """
        if self.reads_ids:
            sequences = [self._read_ids(r) for r in batch.rollouts]
        else:
            samples = zip(batch.prompts, batch.completions, batch.rollouts, strict=True)
            sequences = [self._read_text(prompt, completion, r.stop) for prompt, completion, r in samples]
        for sequence, completion in zip(sequences, batch.completions, strict=True):
            if self.positions is not None and len(sequence.token_ids) > self.positions:
                raise UserError(
                    f"{self.name}: {len(sequence.token_ids)} tokens, more than the {self.positions} positions of "
                    f"{self.whose}: the completion {completion!r:.40} and its prompt"
                )
        read = pack(sequences)
        if self.token_budget is not None and read.largest_unit > self.token_budget:
            log.warning(
                "%s: token_budget: a sequence of %d tokens is more than %d and goes through whole, so memory follows "
                "the longest, not the budget", self.name, read.largest_unit, self.token_budget,
            )  # fmt: skip
            self.token_budget = None
        out = self.scorer.call("score", read)
        if out.scalar_T is None:
            raise UserError(f"{self.name}: the model has no scalar head")
        score_S = read.scores(out)
        if self.scale is not None:
            score_S = (score_S - self.scale.score_mean) / self.scale.score_std
        return [checked_score(self.name, score, batch, i) for i, score in enumerate(score_S.tolist())]

    def _read_ids(self, rollout: Rollout) -> Sequence:
        if rollout.stop == "length":
            return Sequence(token_ids=rollout.token_ids, trainable=rollout.trainable)
        answer = _before_stop(rollout, self.tokenizer) if rollout.stop == "stop_string" else rollout.completion_ids
        prompt = rollout.token_ids[: rollout.prompt_length]
        return with_eos([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), self.tokenizer)

    def _read_text(self, prompt: Any, completion: Any, stop: StopReason) -> Sequence:
        sequence = judged_sequence(prompt, completion, self.tokenizer)
        if stop == "length":
            return Sequence(token_ids=sequence.token_ids[:-1], trainable=sequence.trainable[:-1])
        return sequence


def score_scale(scorer: Seat, rows: Seq[PreferencePair]) -> ScoreScale | None:
    """Mean and standard deviation of a model's scores of both answers of these pairs.

    None where all are equal, or one is no number.
    """
    scores: list[float] = []
    for start in range(0, len(rows), SCORED_AT_ONCE):
        batch = pack_pairs(rows[start : start + SCORED_AT_ONCE])
        scores += batch.scores(scorer.call("score", batch)).tolist()
    if len(set(scores)) < 2 or not all(map(math.isfinite, scores)):
        return None
    return ScoreScale(statistics.fmean(scores), statistics.pstdev(scores))


def _before_stop(rollout: Rollout, tokenizer: Any) -> list[int]:
    """The completion's tokens up to its stop string, which may begin inside of one: that one's text is encoded anew."""
    kept = rollout.completion_ids
    while not rollout.completion.startswith(text := tokenizer.decode(kept, skip_special_tokens=True)):
        kept = kept[:-1]
    rest = rollout.completion[len(text) :]
    return [*kept, *(encode(rest, tokenizer, special_tokens=False) if rest else [])]
