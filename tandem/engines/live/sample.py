"""One sample on its way through the live engine: the tokens so far, and where it decodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from tandem.engines.requests import Asked, stamp_version
from tandem.errors import UserError
from tandem.types import Completion, StopReason, Versions

AHEAD = 16
"""Fewer tokens are not worth decoding before their sample has ended."""


@dataclass(eq=False)
class Sample:
    """One sample of a request: what it is, what it has drawn, and where it decodes."""

    asked: Asked
    index: int
    """Its place among the samples of its request."""
    name: int = 0
    """What the engine's core knows it by."""
    versions: Versions = field(default_factory=list)
    """The versions of the tokens that it had drawn when the weights last changed."""
    token_ids: list[int] = field(default_factory=list)
    behaviour_logp: list[float] = field(default_factory=list)
    untruncated_logp: list[float] = field(default_factory=list)
    stop: StopReason | None = None
    error: UserError | None = None
    """Why it ended, where its stop is ``error``."""
    text: str = ""
    """The text of its first ``decoded`` tokens."""
    decoded: int = 0
    kind: int = 0
    """The number of its sampling parameters among those that are sampled now (``live.draws.Kinds``)."""
    row: int | None = None
    """Where it decodes, in the paged cache."""
    pages: list[int] = field(default_factory=list)
    """The pages there that hold its keys and values, in order."""
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
        stamp_version(self.versions, version, len(self.token_ids))

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
