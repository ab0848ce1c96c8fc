"""The data that travels between the rooms, as plain Python: nothing here knows torch (tensors: ``tandem.batch``)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

StopReason = Literal["eos", "length", "stop_string", "tool", "error"]
Aggregation = Literal["token", "sequence", "constant"]
"""Which mean a loss is: see ``tandem.data.packing.stamp_weights``."""
CORRECTION_BIAS = "e_score_correction_bias"
"""What models call the biases [E] by which a router picks among E experts: buffers, which no gradient moves."""
Message = dict[str, Any]
"""One chat turn, ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model can read. None: without a limit."""

    positions: int | None = None
    """Tokens of a whole sequence."""
    vocabulary: int | None = None
    """Rows of its embedding: token ids are below it."""
    turning: int | None = None
    """Tokens up to which what it says of a token does not depend on how long the sequence becomes (LongRoPE)."""
    whose: str = "the model"
    """The folder or hub name that has these limits, for messages."""

    @property
    def sampling(self) -> Limits:
        """Those of sequences that it samples: what it said of a token when it drew it is what it says of it later."""
        if self.turning is None:
            return self
        return replace(self, positions=self.turning, whose=f"{self.whose} before its LongRoPE turns")


Held = tuple[str, str]
"""An engine's copy of a pushed tensor: the tensor's name, and that of the engine's own parameter that it lies in."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Logits are divided by ``temperature`` first, then truncated.

    ``temperature=0`` is greedy. ``top_k=0``, ``top_p=1`` and ``min_p=0`` truncate nothing. Sampling stops after
    ``max_new_tokens`` tokens, at the tokenizer's end-of-sequence id, at any of ``stop_token_ids`` or once the
    decoded completion contains one of ``stop`` (the text ends before it, its tokens are kept).
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to sample ``len(seeds)`` times. Sample ``i`` depends on ``seeds[i]`` and the prompt alone."""

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: SamplingParams


Versions = list[tuple[int, int]]
"""Which weights drew the tokens of a sample, in order: optimizer steps that they had seen, and how many tokens in a row
came from them. Never empty: 0 tokens came from some version, too."""


class Drawn:
    """Tokens that were drawn from weights of some versions."""

    versions: Versions

    @property
    def version_min(self) -> int:
        """Optimizer steps that the oldest weights behind any of its tokens had seen."""
        return min(version for version, _ in self.versions)

    @property
    def version_max(self) -> int:
        """As ``version_min``, of the newest weights."""
        return max(version for version, _ in self.versions)


@dataclass(kw_only=True)
class Completion(Drawn):
    """What an engine returns for one sample: the sampled tokens (a stop token included) and their log-probs.

    ``behaviour_logp`` is under the distribution that each token was drawn from (temperature and truncation);
    ``untruncated_logp`` at the same temperature but without top-k, top-p and min-p: what a trainer computes.
    """

    token_ids: list[int]
    behaviour_logp: list[float]
    untruncated_logp: list[float]
    stop: StopReason
    text: str = ""
    versions: Versions = field(default_factory=lambda: [(0, 0)])
    error: str | None = None


Ended = tuple[int, int, Completion]
"""A sample that has ended: the place of its request among those submitted together, its own place there, the sample."""
Watch = Callable[[Seq[Ended]], None]
"""Told of samples as they end, and with none of them in between, in the thread that steps the engine. It must not ask
the engine for anything; what it raises ends the requests that it watches."""


@dataclass(kw_only=True)
class Rollout(Drawn):
    """One sampled sequence, prompt and completion. All lists are as long as ``token_ids``.

    Worked example: a prompt of two tokens answered with ``7`` and the end-of-sequence token ``1``::

        Rollout(prompt_id="p0", sample_index=0, token_ids=[5, 6, 7, 1], prompt_length=2,
                trainable=[False, False, True, True], behaviour_logp=[0, 0, -0.7, -0.1],
                untruncated_logp=[0, 0, -0.7, -0.1], stop="eos", reward=1.0)
    """

    prompt_id: str
    sample_index: int
    token_ids: list[int]
    prompt_length: int
    trainable: list[bool]
    """False on the prompt and on tool output."""
    behaviour_logp: list[float]
    """Under the distribution the token was drawn from, in nats; 0 where not trainable."""
    untruncated_logp: list[float]
    """At the sampling temperature without truncation, in nats: what ratios are taken against."""
    stop: StopReason
    completion: str = ""
    versions: Versions = field(default_factory=lambda: [(0, 0)])
    """The versions that drew its sampled tokens, in order."""
    reward: float | None = None
    """None: a reward function left the sample out. It enters no baseline."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    judged: float | None = None
    """Its reward before its length took anything off, where the run punishes length."""
    advantages: Seq[float] | None = None
    """The advantage of each token, as the loss gets it: an ``array``, of which ``list`` makes what JSON takes. None
    where it was not trained on."""
    error: str | None = None

    @classmethod
    def of_answer(
        cls, prompt_id: str, number: int, stop: StopReason, text: str = "", ids: Seq[int] = (), **judged: Any
    ) -> Rollout:
        """An answer that is there already: of its prompt's tokens and of its log-probs there is nothing."""
        return cls(
            prompt_id=prompt_id,
            sample_index=number,
            token_ids=list(ids),
            prompt_length=0,
            trainable=[True] * len(ids),
            behaviour_logp=[],
            untruncated_logp=[],
            stop=stop,
            completion=text,
            **judged,
        )

    @property
    def completion_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def advantage(self) -> float | None:
        """The mean over its trainable tokens; None where it was not trained on."""
        if self.advantages is None:
            return None
        trained = [a for a, trainable in zip(self.advantages, self.trainable, strict=True) if trainable]
        return sum(trained) / max(len(trained), 1)

    @property
    def usable(self) -> bool:
        """Whether it may be trained on: it ended without an error and has a reward."""
        return self.stop != "error" and self.reward is not None


class Judgement(NamedTuple):
    """What one call of a reward gives."""

    scores: list[float | None]
    """One a sample; None leaves it out."""
    counts: dict[str, int]
    """What the reward has counted beside them, by name."""


@dataclass(kw_only=True)
class Prompt:
    """One row of an online dataset, tokenized. ``columns`` are the row's other fields, handed to reward functions."""

    prompt_id: str
    prompt: str | list[Message]
    token_ids: tuple[int, ...]
    columns: dict[str, Any] = field(default_factory=dict)

    def answered(self, text: str) -> str | list[Message]:
        """An answer as it stands beside the prompt: text, or the assistant's message where that is messages (TRL)."""
        return text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """One item of a run, on its way from the dataset to a trainer: a pure function of its number."""

    number: int
    """Its place in the run's stream of items, from 0."""
    row: int
    """Its row of the dataset."""
    step: int
    """The step that its random draws are named after: the one that trains on it, where every item is kept."""
    place: int
    """Among the tickets of that step."""


@dataclass(kw_only=True)
class Group:
    """The rollouts of one prompt."""

    prompt: Prompt
    rollouts: list[Rollout]

    @property
    def usable(self) -> list[Rollout]:
        return [rollout for rollout in self.rollouts if rollout.usable]

    @property
    def rewards(self) -> list[float]:
        """Rewards of the usable rollouts, in their order."""
        return [rollout.reward for rollout in self.rollouts if rollout.usable and rollout.reward is not None]


@dataclass(kw_only=True)
class Sequence:
    """One tokenized sequence for an offline method, or a sampled one of a pair. Lists are as long as ``token_ids``."""

    token_ids: list[int]
    trainable: list[bool]
    untruncated_logp: list[float] | None = None
    """As ``Rollout``'s; None where it was not sampled."""

    @classmethod
    def read(cls, token_ids: Seq[int]) -> Sequence:
        """One of which all tokens are trainable but the first, which only gives the others their context."""
        return cls(token_ids=list(token_ids), trainable=[False] + [True] * (len(token_ids) - 1))


@dataclass(kw_only=True)
class PreferencePair:
    """A tokenized preference: two full sequences (prompt and answer) of the same prompt."""

    chosen: Sequence
    rejected: Sequence
    margin: float = 0.0


class ScoreScale(NamedTuple):
    """The scale of a reward model's scores of many rows. The names are those in its config."""

    score_mean: float
    score_std: float


@dataclass(kw_only=True)
class LabelledAnswer:
    """A tokenized answer after its prompt, and whether it is a desirable one."""

    answer: Sequence
    desirable: bool


@dataclass(kw_only=True)
class Solution:
    """A tokenized answer in steps, each judged: ``text`` is trainable at the last token of each step."""

    text: Sequence
    labels: list[float]
    """One for each step: from 0 (wrong) to 1 (right)."""
    prompt_length: int
    """Tokens before the first step."""


Example = Rollout | Sequence | PreferencePair | LabelledAnswer | Solution
"""What a batch is packed of."""
