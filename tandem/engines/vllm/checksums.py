"""What vLLM's ranks made of the weights that they were sent: the whole tensors' checksums from every rank's regions."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from math import prod
from typing import NamedTuple

from tandem.engines.vllm.regions import Region
from tandem.sync.checksum import MODULUS
from tandem.sync.plan import Plan
from tandem.types import Held


class Shard(NamedTuple):
    """One rank's copy of a region of pushed tensor ``part``, inside its parameter ``where``."""

    part: str
    where: str
    region: Region


class Wholes:
    """The whole tensors that every tensor-parallel rank's shards make up: which sums belong together, found once.

    Regions add up; one that several ranks hold (norms; keys and values of fewer heads than ranks) counts once. Where
    the ranks' copies of it differ, each stands by itself under ``where@rank``. Tensors that are not there in full are
    left out.
    """

    def __init__(self, ranks: Seq[Seq[Shard]], plan: Plan) -> None:
        self.ranks, self.plan = ranks, plan
        regions: dict[tuple[str, str], dict[Region, dict[int, int]]] = {}
        for number, (rank, shard) in enumerate((r, shard) for r, shards in enumerate(ranks) for shard in shards):
            regions.setdefault((shard.part, shard.where), {}).setdefault(shard.region, {})[rank] = number
        sizes = {spec.name: prod(spec.shape) for spec in plan.tensors}
        self.alone: list[tuple[str, str, int]] = []
        """A tensor of which there is one shard, the parameter that it lies in, and the shard's number."""
        self.tensors: list[tuple[str, str, list[list[int]]]] = []
        """Another tensor, the parameter that it lies in, and for each rank the numbers of the shards that it is summed
        from: others' where the rank has no copy. Where that is the same for all ranks, it is there once."""
        for (part, where), copies in regions.items():
            if sum(region.numel for region in copies) == sizes[part]:
                first = [next(iter(numbers.values())) for numbers in copies.values()]
                ways = [[n.get(r, f) for n, f in zip(copies.values(), first, strict=True)] for r in range(len(ranks))]
                if any(way != first for way in ways):
                    self.tensors.append((part, where, ways))
                elif len(first) > 1:
                    self.tensors.append((part, where, [first]))
                else:
                    self.alone.append((part, where, first[0]))

    def held(self, ranks: Seq[Seq[int | None]]) -> list[Held]:
        """From the sums of all ranks' shards, None for those that cannot be told."""
        if any(None in sums for sums in ranks):
            told = [
                [shard for shard, total in zip(shards, sums, strict=True) if total is not None]
                for shards, sums in zip(self.ranks, ranks, strict=True)
            ]
            return Wholes(told, self.plan).held([[total for total in sums if total is not None] for sums in ranks])
        flat = [total for sums in ranks for total in sums if total is not None]
        found: list[Held] = [(part, where, flat[number]) for part, where, number in self.alone]
        for part, where, ways in self.tensors:
            totals = [sum([flat[number] for number in way]) % MODULUS for way in ways]
            if totals.count(totals[0]) == len(totals):
                found.append((part, where, totals[0]))
            else:
                found += [(part, f"{where}@{rank}", total) for rank, total in enumerate(totals)]
        return found
