"""Which rows come when, and which are held out: pure functions of position and content, so that any run resumes."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch

from tandem.seeds import derive_seed
from tandem.types import Ticket


class Order:
    """An endless shuffled stream over items: every epoch is a permutation of its own, drawn from ``seed``.

    Item ``k`` depends on the sizes, the weights, ``seed`` and ``k`` alone, and the stream knows no steps: a run counts
    the items that it was handed, from 0, and to resume is to go on counting. No epoch drops its tail: positions that
    reach past the end go on into the next epoch.

    Of several sources with ``weights``, each is gone through in epochs of its own, and its items come at even
    distances: its ``j``-th at ``(j + 1/2) / w``, with ``w`` its share of the weights (Webster's method of
    apportionment). Any stretch of positions has its share of each source but for one or two items.

    >>> order = Order(5, seed=0)
    >>> sorted(order.take(range(0, 5)))
    [0, 1, 2, 3, 4]
    >>> [item // 10 for item in Order([10, 10], seed=0, weights=[1, 3]).take(range(8))]
    [1, 0, 1, 1, 1, 0, 1, 1]
    """

    def __init__(self, sizes: int | Seq[int], seed: int, weights: Seq[Fraction | int] = (1,)) -> None:
        """``sizes`` of the sources, whose items are numbered one after the other, and a weight above 0 for each."""
        self.sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        if len(self.sizes) != len(weights) or not all(weight > 0 for weight in weights):
            raise ValueError(f"{len(self.sizes)} sources need as many weights above 0, got {list(weights)}")
        self.shares = [Fraction(weight) / Fraction(sum(weights)) for weight in weights]
        several = len(self.sizes) > 1
        self._epochs = [
            Epochs(n, derive_seed(seed, "source", i) if several else seed) for i, n in enumerate(self.sizes)
        ]
        self._first = list(accumulate(self.sizes, initial=0))

    def item(self, position: int) -> int:
        """Index of the item at ``position`` (from 0) of the stream."""
        source, place = self.turn(position)
        return self._first[source] + self._epochs[source].item(place)

    def take(self, positions: range) -> list[int]:
        """Indices of the items at these positions."""
        return [self.item(position) for position in positions]

    def tickets(self, positions: Iterable[int], per_step: int) -> list[Ticket]:
        """The tickets at these positions, in a run of ``per_step`` items a step."""
        return [Ticket(number=k, row=self.item(k), step=k // per_step + 1, place=k % per_step) for k in positions]

    def turn(self, position: int) -> tuple[int, int]:
        """Whose turn it is at ``position``: the number of a source, and how many times it has had its turn before."""
        if len(self.shares) == 1:
            return 0, position
        # Up to this time at most ``position`` turns are over, as each source's count is at most 1/2 from its share.
        time = max(position - len(self.shares), 0)
        counts = [int(share * time + Fraction(1, 2)) for share in self.shares]
        due = [
            ((count + Fraction(1, 2)) / share, i)
            for i, (count, share) in enumerate(zip(counts, self.shares, strict=True))
        ]
        heapq.heapify(due)
        for _ in range(position - sum(counts)):
            _, i = due[0]
            counts[i] += 1
            heapq.heapreplace(due, ((counts[i] + Fraction(1, 2)) / self.shares[i], i))
        return due[0][1], counts[due[0][1]]


class InTurn:
    """The stream of items that have an order of their own: one after the other, for ever."""

    def tickets(self, positions: Iterable[int], per_step: int) -> list[Ticket]:
        """The tickets at these positions, in a run of ``per_step`` items a step."""
        return [Ticket(number=k, row=k, step=k // per_step + 1, place=k % per_step) for k in positions]


class Epochs:
    """An endless stream over ``n`` items of one source, in permutations drawn from ``seed``."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"an order needs at least one item, got {n}")
        self.n = n
        self.seed = seed
        self.drawn: dict[int, list[int]] = {}

    def item(self, position: int) -> int:
        """Index of the item at ``position`` (from 0) of the stream."""
        return self._permutation(position // self.n)[position % self.n]

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self.drawn:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            kept = {e: p for e, p in self.drawn.items() if abs(e - epoch) == 1}  # a step may straddle two epochs
            self.drawn = kept | {epoch: torch.randperm(self.n, generator=generator).tolist()}
        return self.drawn[epoch]


def content_hash(content: Any) -> str:
    """16 hexadecimal digits that depend on the content alone (text, messages, any JSON value)."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
