"""A batch divided over the ranks of a world, in equally many micro-batches on each."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tandem.batch import Batch, cut
from tandem.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Share:
    """A micro-batch of this rank. ``units`` are its places in the batch; none where it only keeps others company."""

    batch: Batch
    units: list[int]


def shares(batch: Batch, token_budget: int, world: World) -> Iterator[Share]:
    """This rank's micro-batches, each of at most ``token_budget`` tokens (a longer unit stands alone).

    A prefix that goes through a model once is counted once, and units that share one go to the same rank where that
    leaves no rank with more to do. Under sharding every forward is a collective, so a rank with fewer micro-batches
    than another goes through its shortest unit again, with weight 0. Every rank computes the same division from the
    batch alone.
    """
    sizes = Sizes(batch)
    plans = [sizes.cut(units, token_budget) for units in sizes.divide(world.size)]
    everything = list(range(batch.units))
    for units in plans[world.rank]:
        yield Share(batch=batch if units == everything else batch.select(units), units=units)
    shortest = min(everything, key=sizes.alone.__getitem__)
    for _ in range(max(map(len, plans)) - len(plans[world.rank])):
        filler = batch.select([shortest])
        yield Share(batch=replace(filler, weight_T=torch.zeros_like(filler.weight_T)), units=[])


class Sizes:
    """How many tokens of a batch's units go through a model, next to units that begin alike and without them.

    A family is the units whose first segments are one group (``Batch.group_S``); its units are kept side by side.
    """

    def __init__(self, batch: Batch) -> None:
        per, lengths = batch.segments_per_unit, batch.lengths
        if batch.group_S is None or batch.prefix_S is None:
            groups, prefixes = list(range(batch.segments)), [0] * batch.segments
        else:
            groups, prefixes = batch.group_S.tolist(), batch.prefix_S.tolist()
        self.family: list[int] = []
        self.alone: list[int] = []
        self.after: list[int] = []
        """Behind another of its family, where it drops the prefix of the first segment too."""
        numbers: dict[int, int] = {}
        for first in range(0, batch.segments, per):
            alike = [s for s in range(first, first + per) if groups[s] == groups[first]]
            total = sum(lengths[first : first + per])
            self.family.append(numbers.setdefault(groups[first], len(numbers)))
            self.after.append(total - sum(prefixes[s] for s in alike))
            self.alone.append(self.after[-1] + prefixes[first])

    def of(self, units: list[int]) -> list[int]:
        """What each of these adds to those before it."""
        before = [None, *(self.family[unit] for unit in units)]
        return [self.after[u] if self.family[u] == b else self.alone[u] for u, b in zip(units, before, strict=False)]

    def divide(self, parts: int) -> list[list[int]]:
        """Units in ``parts`` lists of nearly equal sizes: families whole, unless cutting them makes the largest less.

        Families come in the order of their first units, the units of one in ascending order.
        """
        families: list[list[int]] = [[] for _ in set(self.family)]
        for unit, family in enumerate(self.family):
            families[family].append(unit)
        sums = [sum(self.of(family)) for family in families]
        together = [[unit for i in part for unit in families[i]] for part in divide(sums, parts)]
        apart = [sorted(part, key=self.family.__getitem__) for part in divide(self.alone, parts)]
        return min(together, apart, key=lambda division: max(sum(self.of(part)) for part in division))

    def cut(self, units: list[int], token_budget: int) -> list[list[int]]:
        """Consecutive units in lists of at most ``token_budget`` tokens (a longer one stands alone)."""
        sizes = [self.alone[unit] for unit in units]
        return [[units[i] for i in places] for places in cut(sizes, token_budget, self.of(units))]


def divide(sizes: list[int], parts: int) -> list[list[int]]:
    """Indices of ``sizes`` in ``parts`` lists of nearly equal sums, each in ascending order.

    Largest first, each to the part with the least so far (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
    """
    if parts == 1:
        return [list(range(len(sizes)))]
    heap = [(0, part) for part in range(parts)]
    divided: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, part = heapq.heappop(heap)
        divided[part].append(index)
        heapq.heappush(heap, (load + sizes[index], part))
    return [sorted(indices) for indices in divided]
