"""One sample on its way: what was asked for, the tokens so far, and when it ends."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tandem.errors import UserError
from tandem.types import Completion, Request, SamplingParams, StopReason, Versions

AHEAD = 16
"""Fewer tokens are not worth decoding before their sample has ended."""


def joins_texts(tokenizer: Any) -> bool:
    """Whether the texts of two runs of tokens are that of both together, if the first ends with a whole character.

    So it is with byte-level tokenizers. Others strip spaces at the ends; and some tidy up the whole text, as BERT's do.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "ByteLevel":
        return False
    untidy = tokenizer.encode("a .", add_special_tokens=False)
    return str(tokenizer.decode(untidy)).endswith(" .")


class StopRule:
    """When the completions of one request end: at end-of-sequence and stop ids, at stop strings, at the length.

    A stop string is looked for only after tokens that could end one, in the last few tokens; what is found there is
    confirmed on the whole text. A stop string that is a special token by itself is one of the stop ids.
    """

    def __init__(self, sampling: SamplingParams, eos_ids: Seq[int], tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.max_new_tokens = sampling.max_new_tokens
        special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids = frozenset((*eos_ids, *sampling.stop_token_ids, *(special[s] for s in sampling.stop if s in special)))
        self.strings = tuple(s for s in sampling.stop if s not in special)
        self.joins = joins_texts(tokenizer)
        # A character may take four tokens of one byte each.
        self.window = 4 * max((len(s) for s in self.strings), default=0) + 8
        self._may_end: dict[int, bool] = {}

    def check(self, token_ids: list[int]) -> StopReason | None:
        """Why the completion ends after its last token, or None."""
        if token_ids[-1] in self.ids:
            return "eos"
        if self.strings and self._may_end_string(token_ids[-1]):
            tail = self.decode(token_ids[-self.window :])
            if any(s in tail for s in self.strings) and self.cut(text := self.decode(token_ids)) != text:
                return "stop_string"
        return "length" if len(token_ids) >= self.max_new_tokens else None

    def cut(self, text: str) -> str:
        """``text`` up to the first stop string in it."""
        return text[: min((at for s in self.strings if (at := text.find(s)) >= 0), default=len(text))]

    def decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _may_end_string(self, token: int) -> bool:
        if token not in self._may_end:
            piece = self.decode([token])
            # Incomplete characters decode to the replacement character, and some decoders strip outer spaces.
            unsure = not piece or "\ufffd" in piece or any(s[-1].isspace() for s in self.strings)
            self._may_end[token] = unsure or any(s[-1] in piece for s in self.strings)
        return self._may_end[token]


@dataclass(frozen=True, eq=False)
class Asked:
    """A request that can be sampled: what its samples share."""

    number: int
    """Its place in its call, for messages."""
    request: Request
    rule: StopRule


def take_requests(
    requests: Seq[Request], check: Callable[[int, Request], None], rule: Callable[[SamplingParams], StopRule]
) -> list[Asked]:
    """Every request with its ``rule``, one for those that are sampled alike. ``check`` raises where one is wrong."""
    rules: dict[SamplingParams, StopRule] = {}
    for number, request in enumerate(requests):
        check(number, request)
        if request.sampling not in rules:
            rules[request.sampling] = rule(request.sampling)
    return [Asked(number, request, rules[request.sampling]) for number, request in enumerate(requests)]


@dataclass(eq=False)
class Sample:
    """One sample of a request in the live engine: what it is, what it has drawn, and where it decodes."""

    asked: Asked
    index: int
    """Its place among the samples of its request."""
    name: int = 0
    """What the engine's core knows it by."""
    versions: Versions = field(default_factory=list)
    """Of the tokens that it had drawn when the weights last changed."""
    token_ids: list[int] = field(default_factory=list)
    behaviour_logp: list[float] = field(default_factory=list)
    untruncated_logp: list[float] = field(default_factory=list)
    stop: StopReason | None = None
    error: UserError | None = None
    """Why it ended, where its stop is ``error``."""
    text: str = ""
    """Of its first ``decoded`` tokens."""
    decoded: int = 0
    kind: int = 0
    """The number of its sampling parameters among those that are sampled now (``live.draws.Kinds``)."""
    row: int | None = None
    """Where it decodes, in the paged cache."""
    pages: list[int] = field(default_factory=list)
    """Those that hold its keys and values there, in order."""
    ahead: int = 0
    """Steps that are enqueued for it and whose results are not read yet."""

    @cached_property
    def prompt_length(self) -> int:
        return len(self.asked.request.prompt_ids)

    @cached_property
    def limit(self) -> int:
        """Most tokens that it may become, its prompt included."""
        return self.prompt_length + self.asked.rule.max_new_tokens

    @cached_property
    def seed(self) -> int:
        """Of its stream of draws: a signed number of the same 64 bits as the one asked for."""
        return (self.asked.request.seeds[self.index] + (1 << 63)) % (1 << 64) - (1 << 63)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last one drawn."""
        return self.prompt_length + len(self.token_ids) - 1

    def add(self, token: int, behaviour_logp: float, untruncated_logp: float) -> bool:
        """Takes its next token. Returns whether it ends there: with an error, where the logits were not finite."""
        if untruncated_logp != untruncated_logp:
            self.fail(
                f"the model's logits are not finite at new token {len(self.token_ids)}; its weights are damaged or its "
                "number format overflows"
            )
            return True
        self.token_ids.append(token)
        self.behaviour_logp.append(behaviour_logp)
        self.untruncated_logp.append(untruncated_logp)
        self.stop = self.asked.rule.check(self.token_ids)
        return self.stop is not None

    def extend(
        self, tokens: list[int], behaviour_logp: list[float], untruncated_logp: list[float], *, finite: bool
    ) -> bool:
        """Takes its next tokens, up to where it ends. Returns whether it ended. ``finite``: all log-probs are.

        Only the last may be a stop id, or the one that makes it long enough.
        """
        if self.asked.rule.strings or not finite:
            return any(self.add(*drawn) for drawn in zip(tokens, behaviour_logp, untruncated_logp, strict=True))
        self.token_ids += tokens
        self.behaviour_logp += behaviour_logp
        self.untruncated_logp += untruncated_logp
        self.stop = self.asked.rule.check(self.token_ids)
        return self.stop is not None

    def fail(self, why: str) -> None:
        """Ends it with an error that names it."""
        self.stop = "error"
        self.error = UserError(f"request {self.asked.number}, sample {self.index}: {why}")

    def decode_ahead(self) -> None:
        """Turns into text what it has drawn, where that stays as it is whatever follows, and there is enough of it."""
        if self.asked.rule.joins and len(self.token_ids) - self.decoded >= AHEAD:
            piece = self.asked.rule.decode(self.token_ids[self.decoded :])
            # The last character may be incomplete.
            if not piece.endswith("\ufffd"):
                self.text += piece
                self.decoded = len(self.token_ids)

    def stamp(self, version: int) -> None:
        """What it has drawn since it was last stamped came from the weights of that version."""
        stamp(self.versions, version, len(self.token_ids))

    def completion(self, version: int) -> Completion:
        """What it has become, ``version`` being that of the weights at its end."""
        assert self.stop is not None
        self.stamp(version)
        text = self.text + self.asked.rule.decode(self.token_ids[self.decoded :])
        return Completion(
            token_ids=self.token_ids,
            behaviour_logp=self.behaviour_logp,
            untruncated_logp=self.untruncated_logp,
            stop=self.stop,
            text=self.asked.rule.cut(text) if self.stop == "stop_string" else text,
            versions=self.versions or [(version, 0)],
        )


def stamp(versions: Versions, version: int, drawn: int) -> None:
    """Adds to a sample's versions that all tokens up to number ``drawn`` that have none yet came from ``version``."""
    new = drawn - sum(count for _, count in versions)
    if new > 0:
        if versions and versions[-1][0] == version:
            version, before = versions.pop()
            new += before
        versions.append((version, new))


def first(versions: Versions, count: int) -> Versions:
    """The versions of the first tokens of a sample."""
    found: Versions = []
    for version, run in versions:
        found.append((version, min(run, count)))
        count -= found[-1][1]
    return [entry for entry in found if entry[1]] or versions[:1]


DRAWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("a whole number, at least 1", lambda count: operator.index(count) >= 1),
    "temperature": ("0 (greedy) or more", lambda temperature: 0 <= temperature < math.inf),
    "top_k": ("a whole number, 0 (off) or more", lambda count: operator.index(count) >= 0),
    "top_p": ("above 0 and at most 1 (off)", lambda share: 0 < share <= 1),
    "min_p": ("from 0 (off) to 1", lambda share: 0 <= share <= 1),
    "stop": ("strings that are not empty", lambda texts: all(isinstance(text, str) and text for text in texts)),
    "stop_token_ids": ("whole numbers", lambda ids: all(operator.index(i) >= 0 for i in ids)),
}
"""By the name of each of ``SamplingParams``, what it must be."""


def check_request(number: int, request: Request, *, vocabulary: int, limit: int | None, limit_name: str) -> None:
    """Raises UserError where a request cannot be sampled."""
    prompt, sampling = request.prompt_ids, request.sampling
    if not prompt:
        raise UserError(f"request {number}: the prompt is empty; give it at least one token")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        position, token = next((p, t) for p, t in enumerate(prompt) if not 0 <= t < vocabulary)
        raise UserError(
            f"request {number}: token id {token} at position {position} is outside the model's vocabulary of "
            f"{vocabulary}; is the tokenizer another model's?"
        )
    for name, (right, valid) in DRAWN.items():
        value = getattr(sampling, name)
        try:
            holds = valid(value)
        except TypeError:  # a text, say, where a number is wanted
            holds = False
        if not holds:
            raise UserError(f"request {number}: {name} is {value!r}; it must be {right}")
    total = len(prompt) + sampling.max_new_tokens
    if limit is not None and total > limit:
        raise UserError(
            f"request {number}: a prompt of {len(prompt)} tokens and max_new_tokens {sampling.max_new_tokens} make "
            f"{total}, above {limit_name} of {limit}; shorten the prompt or lower max_new_tokens"
        )
