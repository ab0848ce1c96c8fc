"""Which rows come when, and which are held out: pure functions of position and content, so that any run resumes."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

import torch

from tandem.seeds import derive_seed
from tandem.types import Ticket

T = TypeVar("T")


class Order:
    """An endless shuffled stream over ``n`` items: every epoch is a permutation of its own, drawn from ``seed``.

    Item ``k`` depends on ``n``, ``seed`` and ``k`` alone, and it knows no steps: a run counts the items that it was
    handed, from 0, and to resume is to go on counting. No epoch drops its tail: positions that reach past the end go on
    into the next epoch.

    >>> order = Order(5, seed=0)
    >>> sorted(order.take(range(0, 5)))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"an order needs at least one item, got {n}")
        self.n = n
        self.seed = seed
        self._epochs: dict[int, list[int]] = {}

    def item(self, position: int) -> int:
        """Index of the item at ``position`` (from 0) of the stream."""
        return self._permutation(position // self.n)[position % self.n]

    def take(self, positions: range) -> list[int]:
        """Indices of the items at these positions."""
        return [self.item(position) for position in positions]

    def tickets(self, positions: range, per_step: int) -> list[Ticket]:
        """Those of these positions, for a run of ``per_step`` items a step."""
        return [Ticket(number=k, row=self.item(k), step=k // per_step + 1, place=k % per_step) for k in positions]

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            kept = {e: p for e, p in self._epochs.items() if abs(e - epoch) == 1}  # a step may straddle two epochs
            self._epochs = kept | {epoch: torch.randperm(self.n, generator=generator).tolist()}
        return self._epochs[epoch]


def content_hash(content: Any) -> str:
    """16 hexadecimal digits that depend on the content alone (text, messages, any JSON value)."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
