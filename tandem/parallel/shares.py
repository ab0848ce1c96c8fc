"""A batch divided over the ranks of a world, in equally many micro-batches on each."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from tandem.batch import Batch, cut
from tandem.parallel.world import World

SHORT = 40_000
"""Attention costs as much as all else in a sequence of 40,000 tokens: parameters by width and layers, which is 23,000
for models of 0.5B, 36,000 for 1.5B and 76,000 for 7B."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A micro-batch of this rank. ``units`` are its places in the batch; none where it only keeps others company."""

    batch: Batch
    units: list[int]


def shares(
    batch: Batch, token_budget: int, world: World, *, padded: bool = False, whole: bool = False
) -> Iterator[Share]:
    """This rank's micro-batches, each of at most ``token_budget`` tokens (a longer unit stands alone).

    Where sequences are ``padded`` side by side, padding counts, and those of similar lengths go together.

    Under sharding every forward is a collective, so all ranks have equally many, and those that meet cost nearly the
    same; a rank that has nothing for one of them goes through the shortest unit again, with weight 0. A prefix that
    goes through a model once is counted once (each time, where ``whole`` segments go through some of its layers), and
    units that share one go together where that leaves no rank with more to do. Every rank computes the same division
    from the batch alone.
    """
    sizes = Sizes(batch, whole=whole)
    everything = list(range(batch.units))
    shortest = min(everything, key=sizes.alone.__getitem__)
    plan = sizes.plan_padded(world.size, token_budget) if padded else sizes.plan(world.size, token_budget)
    for units in plan[world.rank]:
        if units:
            yield Share(batch=batch if units == everything else batch.select(units), units=units)
        else:
            filler = batch.select([shortest])
            nothing_S = None if filler.share_S is None else torch.zeros_like(filler.share_S)
            yield Share(batch=replace(filler, weight_T=torch.zeros_like(filler.weight_T), share_S=nothing_S), units=[])


class Sizes:
    """How many tokens of a batch's units go through a model, next to units that begin alike and without them.

    A family is the units whose first segments are one group (``Batch.group_S``); its units are kept side by side.
    """

    def __init__(self, batch: Batch, *, whole: bool = False) -> None:
        per, lengths = batch.segments_per_unit, batch.lengths
        if batch.group_S is None or batch.prefix_S is None:
            groups, prefixes = list(range(batch.segments)), [0] * batch.segments
        else:
            groups, prefixes = batch.group_S.tolist(), [0] * batch.segments if whole else batch.prefix_S.tolist()
        self.family: list[int] = []
        self.alone: list[int] = []
        self.after: list[int] = []
        """Behind another of its family, where it drops the prefix of the first segment too."""
        self.attention: list[float] = []
        """What attention costs beside all else, in tokens."""
        self.padded = [per * max(lengths[first : first + per]) for first in range(0, batch.segments, per)]
        """Where its segments are padded to the longest of them."""
        numbers: dict[int, int] = {}
        for first in range(0, batch.segments, per):
            alike = [s for s in range(first, first + per) if groups[s] == groups[first]]
            total = sum(lengths[first : first + per])
            self.family.append(numbers.setdefault(groups[first], len(numbers)))
            self.after.append(total - sum(prefixes[s] for s in alike))
            self.alone.append(self.after[-1] + prefixes[first])
            self.attention.append(sum(length * length for length in lengths[first : first + per]) / SHORT)

    def of(self, units: list[int]) -> list[int]:
        """What each of these adds to those before it."""
        before = [None, *(self.family[unit] for unit in units)]
        return [self.after[u] if self.family[u] == b else self.alone[u] for u, b in zip(units, before, strict=False)]

    def plan(self, ranks: int, token_budget: int) -> list[list[list[int]]]:
        """For each rank its micro-batches, equally many: units in ascending order, those of a family side by side.

        Families stay whole (cut where they are longer than the budget), unless single units make less work.
        """
        families: list[list[int]] = [[] for _ in set(self.family)]
        for unit, family in enumerate(self.family):
            families[family].append(unit)
        if ranks == 1:
            return [self.cut([unit for family in families for unit in family], token_budget)]
        whole = [chunk for family in families for chunk in self.cut(family, token_budget)]
        plans = [
            self._spread(items, ranks, token_budget) for items in (whole, [[unit] for unit in range(len(self.family))])
        ]
        return min(plans, key=lambda plan: sum(max(map(self.cost, meeting)) for meeting in zip(*plan, strict=True)))

    def plan_padded(self, ranks: int, token_budget: int) -> list[list[list[int]]]:
        """As ``plan``, where all segments of a micro-batch are padded to its longest one."""
        most = min(token_budget, -(-sum(self.padded) // ranks))
        chunks: list[list[int]] = []
        for unit in sorted(range(len(self.padded)), key=self.padded.__getitem__):
            # Ascending, so that this one is the longest so far.
            if not chunks or (len(chunks[-1]) + 1) * self.padded[unit] > most:
                chunks.append([])
            chunks[-1].append(unit)
        # Those that meet cost about the same.
        chunks.sort(key=lambda chunk: len(chunk) * self.padded[chunk[-1]], reverse=True)
        chunks += [[] for _ in range(-len(chunks) % ranks)]
        return [[sorted(chunk) for chunk in chunks[rank::ranks]] for rank in range(ranks)]

    def cost(self, units: list[int]) -> float:
        """The work of a micro-batch, in tokens of a short sequence: attention to a long one costs more."""
        return sum(self.of(units)) + sum(self.attention[unit] for unit in units)

    def _spread(self, items: list[list[int]], ranks: int, token_budget: int) -> list[list[list[int]]]:
        """Items in micro-batches of nearly equal cost, as few as there is room in, and those dealt out to ranks."""
        tokens = [sum(self.of(item)) for item in items]
        costs = [self.cost(item) for item in items]
        rounds = -(-sum(tokens) // (ranks * token_budget))
        while (bins := _fill(tokens, costs, ranks * rounds, token_budget)) is None:
            rounds += 1
        made = [sorted((u for i in one for u in items[i]), key=lambda u: (self.family[u], u)) for one in bins]
        made.sort(key=self.cost, reverse=True)
        plan: list[list[list[int]]] = [[] for _ in range(ranks)]
        loads = [0.0] * ranks
        for first in range(0, len(made), ranks):
            # Those that meet cost about the same; the largest of them goes to the rank with the least so far.
            for one, rank in zip(made[first : first + ranks], sorted(range(ranks), key=loads.__getitem__), strict=True):
                plan[rank].append(one)
                loads[rank] += self.cost(one)
        return plan

    def cut(self, units: list[int], token_budget: int) -> list[list[int]]:
        """Consecutive units in lists of at most ``token_budget`` tokens (a longer one stands alone)."""
        sizes = [self.alone[unit] for unit in units]
        return [[units[i] for i in places] for places in cut(sizes, token_budget, self.of(units))]


def _fill(tokens: list[int], costs: list[float], bins: int, token_budget: int) -> list[list[int]] | None:
    """Items in ``bins`` lists, the costliest first, each into the cheapest list that has room; None where none has."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    room = [token_budget] * bins
    heap = [(0.0, i) for i in range(bins)]
    for item in sorted(range(len(tokens)), key=lambda i: -costs[i]):
        passed = []
        while heap and filled[heap[0][1]] and room[heap[0][1]] < tokens[item]:
            passed.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, place = heap[0]
        heapq.heapreplace(heap, (cost + costs[item], place))
        filled[place].append(item)
        room[place] -= tokens[item]
        for one in passed:
            heapq.heappush(heap, one)
    return filled


def divide(sizes: list[int], parts: int, loads: Seq[int] = ()) -> list[list[int]]:
    """Indices of ``sizes`` in ``parts`` lists of nearly equal sums, each in ascending order.

    ``loads`` are what the parts have already, and are part of the sums; nothing, where they are not given.
    Largest first, each to the part with the least so far (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
    """
    if parts == 1:
        return [list(range(len(sizes)))]
    heap = [(load, part) for part, load in enumerate(loads or [0] * parts)]
    heapq.heapify(heap)
    divided: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, part = heapq.heappop(heap)
        divided[part].append(index)
        heapq.heappush(heap, (load + sizes[index], part))
    return [sorted(indices) for indices in divided]
