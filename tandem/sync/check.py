"""The truth check: whether engines hold the trainer's parameters after a push, and compute what it computes."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, Literal

from tandem.errors import RunFailure
from tandem.roles import Seat
from tandem.sync.checksum import Sums
from tandem.types import Held

log = logging.getLogger("tandem")
Rows = Seq[Seq[float]]
"""A number, in nats, of each token but the first of each sequence."""
ROUNDING = {"float32": 3e-4, "bfloat16": 0.04}
"""Nats for a model of one layer. Measured with vLLM's CPU kernels on models of trained size, of two layers and of 26:
in float32 1e-6 and 2e-6 for Llama and 6e-4 for Gemma 2 (soft caps), in bfloat16 0.02, and 0.03 to 0.08."""
FIRST_PROBES = 2
"""The first 2 pushes are probed: an engine may load the first in another way than those that follow."""
PROBE_EVERY = 256
PROBE_TOKENS = (11, 7) * 4
FAR = 4
"""How many times the bound log-probs must move when an engine is tried with adapters that count for something."""
SMALLEST, LARGEST = 2.0**-12, 2.0**12
"""Bounds of the numbers that these adapters may have."""
BEYOND = 32
"""Tokens behind a limit of the model that show whether it is kept."""


class WeightMismatch(RunFailure):
    """An engine does not hold the weights that were pushed to it, or computes something else with them."""


class TruthCheck:
    """Every push: the checksums of all tensors. The first two and every 256th: the log-probs of a fixed probe as well.

    ``dtype`` is the engines', ``vocabulary`` that of the probe's tokens, ``layers`` are the model's. Without a
    ``trainer`` there is no probe. The first one goes past ``limit``, the furthest that the model's config names, as of
    a window (0: there is none). Where it is not ``on`` nothing is compared.
    """

    def __init__(
        self,
        trainer: Seat | None,
        engines: Seat,
        *,
        count: int,
        dtype: Literal["float32", "bfloat16"],
        vocabulary: int = 0,
        layers: int = 1,
        limit: int = 0,
        on: bool = True,
    ) -> None:
        self.trainer, self.engines, self.count, self.on = trainer, engines, count, on
        self.bound, self.probe = logp_bound(dtype, layers), Probe(vocabulary, limit)
        self.pushes = 0
        self.sums: Sums = {}
        """The checksums of the last push."""
        self.held: list[list[Held]] = []
        """What each engine's checksums are of, the same from the first push over its link to the last."""
        self.truth: tuple[Rows, Rows] | None = None
        """The trainer's log-probs of the probe and how far rounding may move them, until the engines' have been
        compared with them."""
        self.untried = on and trainer is not None
        """Whether there has been no ``trial`` yet."""

    @contextmanager
    def trial(self) -> Iterator[None]:
        """With other adapters in the trainer, for a push that shows whether engines compute with them.

        New ones begin at nothing, and after a step are so little that nobody would miss them. These are as small as can
        be, but move the log-probs of the probe by 4 times the bound.
        """
        assert self.trainer is not None, "what engines give is compared with what it gives"
        probe = self.probe.sequences(0)[: len(PROBE_TOKENS)]

        def stirred(size: float) -> list[list[float]]:
            self.trainer.call("stir", size)  # type: ignore[union-attr]
            return self.trainer.call("logprobs", probe)  # type: ignore[union-attr]

        try:
            without, size = stirred(0.0), SMALLEST
            rounding = self.trainer.call("rounding", probe)
            while not mean_gap(without, stirred(size), rounding) >= FAR * self.bound:
                if (size := 2 * size) > LARGEST:
                    raise WeightMismatch(
                        "weight sync: whatever the adapters' B is, the log-probs of a probe are as without them: "
                        "nothing shows whether engines compute with them"
                    )
            yield
            self.untried = False
        finally:
            self.trainer.call("unpark")
            self.trainer.call("stir", None)

    def compare(self, version: int, sums: Sums, found: Seq[Seq[int | None]]) -> None:
        """Each engine's checksums with the trainer's. Takes the trainer's side of the probe where it is its turn.

        Raises WeightMismatch, naming the parameter.
        """
        if not self.on:
            return
        self.sums = sums
        if self.pushes == 0:
            self.held = self._of_each("held")
            warn_of_unseen(sums, self.held[0], found[0])
        self._compare(version, found)
        if self.trainer is not None and self.probe.due(self.pushes):
            sequences = self.probe.sequences(self.pushes)
            self.truth = self.trainer.call("logprobs", sequences), self.trainer.call("rounding", sequences)
        self.pushes += 1

    def prove(self, version: int) -> None:
        """Compares the engines' log-probs of the probe with the trainer's, where this push has taken them."""
        if self.truth is None:
            return
        (truth, rounding), self.truth = self.truth, None
        for engine, found in enumerate(self._of_each("logprobs", self.probe.sequences(self.pushes - 1))):
            if far := self.probe.too_far(truth, found, self.bound, rounding):
                # It may have lost since what it held when it was pushed.
                self._compare(version, self._of_each("checksums"))
                raise WeightMismatch(
                    f"weight sync: after push {version} engine {engine} gives a probe log-probs that differ from the "
                    f"trainer's by {far}, though every tensor that can be compared is the same: it computes something "
                    "else with them"
                )

    def _compare(self, version: int, found: Seq[Seq[int | None]]) -> None:
        for engine, (held, totals) in enumerate(zip(self.held, found, strict=True)):
            require_equal(f"after push {version} engine {engine}", self.sums, held, totals)

    def _of_each(self, verb: str, *arguments: Any) -> list[Any]:
        return self.engines.submit_each(verb, [arguments] * self.count).result()


def logp_bound(dtype: Literal["float32", "bfloat16"], layers: int) -> float:
    """Largest ``mean_gap`` in nats. A wrong tensor is whole nats off.

    Each layer adds its rounding to what goes on to the next, none like another's: they add up as random steps do, by
    the root of their number.
    """
    return float(f"{ROUNDING[dtype] * max(layers, 1) ** 0.5:.2g}")


class Probe:
    """Fixed tokens whose log-probs a trainer and an engine are to agree on."""

    def __init__(self, vocabulary: int, limit: int) -> None:
        self.vocabulary, self.limit = vocabulary, limit

    def due(self, pushes: int) -> bool:
        """Whether they are to agree after a push, with so many before it."""
        return pushes < FIRST_PROBES or pushes % PROBE_EVERY == 0

    def sequences(self, pushes: int) -> list[list[int]]:
        """The tokens of each. Past the limit goes one after the first push: how an engine computes does not change."""
        rng = random.Random(0)
        past = (self.limit + BEYOND,) if self.limit and not pushes else ()
        return [[rng.randrange(self.vocabulary) for _ in range(n)] for n in (*PROBE_TOKENS, *past)]

    def too_far(self, truth: Rows, found: Rows, bound: float, rounding: Rows) -> str:
        """How far the log-probs are from the truth (``mean_gap``), where that is more than ``bound``; else nothing.

        On average over the short sequences, and over what is behind the limit: many tokens before it are right.
        """
        given = (truth, found, rounding)
        short = mean_gap(*(rows[: len(PROBE_TOKENS)] for rows in given))
        if not short <= bound:
            return f"{short:.3g} nats on average (bound {bound})"
        behind = [[row[self.limit :] for row in rows[len(PROBE_TOKENS) :]] for rows in given]
        if len(truth) > len(PROBE_TOKENS) and not (gap := mean_gap(*behind)) <= bound:
            return (
                f"{gap:.3g} nats on average (bound {bound}) behind {self.limit} tokens, a limit that its config names "
                "(window, chunk or position scale)"
            )
        return ""


def mean_gap(truth: Rows, found: Rows, rounding: Rows) -> float:
    """Mean over all tokens of the absolute difference, in nats, less what ``rounding`` may make of the token's.

    That is 0 but for models with experts in 16 bits: where rounding swaps two experts that are almost equal for a
    token, its log-prob jumps by up to whole nats in a right engine too, and a few of those are more than the bound.
    The median over tokens would not see one expert that is wrong, nor the routers' picks what experts compute.
    """
    rows = zip(truth, found, rounding, strict=True)
    # NaN stays NaN, and is beyond any bound.
    gaps = [max(abs(a - b) - far, 0.0) for row in rows for a, b, far in zip(*row, strict=True)]
    return sum(gaps) / len(gaps)


def require_equal(who: str, sums: Sums, held: Seq[Held], found: Seq[int | None]) -> None:
    """Raises WeightMismatch, naming the parameter, where an engine's copy of a tensor is not the trainer's.

    ``found`` are the checksums of what is ``held``, None for those that the engine cannot tell.
    """
    for (part, where), total in zip(held, found, strict=True):
        if total is not None and total != sums[part]:
            inside = "" if where == part else f" in its {where}"
            raise WeightMismatch(
                f"weight sync: {who} does not hold the trainer's {part}{inside}: checksum {total:08x}, the trainer's "
                f"is {sums[part]:08x}"
            )


def warn_of_unseen(sums: Sums, held: Seq[Held], found: Seq[int | None]) -> None:
    """Says so where an engine cannot tell what it holds of some tensors."""
    seen = {part for (part, _), total in zip(held, found, strict=True) if total is not None}
    unseen = [name for name in sums if name not in seen]
    if unseen:
        log.warning(
            "truth check: %d of %d tensors cannot be compared by checksum on this engine (such as %s), "
            "so the probe alone speaks for them",
            len(unseen), len(sums), unseen[0],
        )  # fmt: skip
