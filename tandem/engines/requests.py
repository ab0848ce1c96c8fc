"""What an engine is asked for, when each of its samples ends, and which weights drew their tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError
from tandem.types import Request, SamplingParams, StopReason, Versions


def joins_texts(tokenizer: Any) -> bool:
    """Whether the texts of two runs of tokens are that of both together, if the first ends with a whole character.

    So it is with byte-level tokenizers. Others strip spaces at the ends; and some tidy up the whole text, as BERT's do.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "ByteLevel":
        return False
    untidy = tokenizer.encode("a .", add_special_tokens=False)
    return str(tokenizer.decode(untidy)).endswith(" .")


def eos_ids(found: int | Seq[int] | None, tokenizer: Any) -> list[int]:
    """End-of-sequence ids: those ``found`` in a model's generation config, or its config, and the tokenizer's."""
    ids = [found] if isinstance(found, int) else list(found or ())
    own = tokenizer.eos_token_id
    return ids if own is None or own in ids else [*ids, own]


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


def stamp_version(versions: Versions, version: int, drawn: int) -> None:
    """Adds to a sample's versions that all tokens up to number ``drawn`` that have none yet came from ``version``."""
    new = drawn - sum(count for _, count in versions)
    if new > 0:
        if versions and versions[-1][0] == version:
            version, before = versions.pop()
            new += before
        versions.append((version, new))


def first_versions(versions: Versions, count: int) -> Versions:
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
