"""A batch divided over the ranks of a world, in equally many micro-batches on each."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tandem.parallel.world import World
from tandem.types import Batch, cut


@dataclass(frozen=True, kw_only=True)
class Share:
    """A micro-batch of this rank. ``units`` are its places in the batch; none where it only keeps others company."""

    batch: Batch
    units: list[int]


def shares(batch: Batch, token_budget: int, world: World) -> Iterator[Share]:
    """This rank's micro-batches, each of at most ``token_budget`` tokens (a longer unit stands alone).

    Under sharding every forward is a collective, so a rank with fewer micro-batches than another goes through its
    shortest unit again, with weight 0. Every rank computes the same division from the batch alone.
    """
    per, lengths = batch.segments_per_unit, batch.lengths
    sizes = [sum(lengths[unit * per : (unit + 1) * per]) for unit in range(batch.units)]
    plans = [
        [[units[i] for i in places] for places in cut([sizes[unit] for unit in units], token_budget)]
        for units in divide(sizes, world.size)
    ]
    for units in plans[world.rank]:
        yield Share(batch=batch if len(units) == batch.units else batch.select(units), units=units)
    shortest = min(range(batch.units), key=sizes.__getitem__)
    for _ in range(max(map(len, plans)) - len(plans[world.rank])):
        filler = batch.select([shortest])
        yield Share(batch=replace(filler, weight_T=torch.zeros_like(filler.weight_T)), units=[])


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
