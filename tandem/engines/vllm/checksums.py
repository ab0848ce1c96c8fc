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
    the ranks have different copies of it, each rank's tensor stands by itself under ``where@rank``. Tensors that are
    not there in full are left out.
    """

    def __init__(self, ranks: Seq[Seq[Shard]], plan: Plan) -> None:
        regions: dict[tuple[str, str], dict[Region, dict[int, int]]] = {}
        for number, (rank, shard) in enumerate((r, shard) for r, shards in enumerate(ranks) for shard in shards):
            regions.setdefault((shard.part, shard.where), {}).setdefault(shard.region, {})[rank] = number
        sizes = {spec.name: prod(spec.shape) for spec in plan.tensors}
        self.held: list[Held] = []
        self.shards: list[list[list[int]]] = []
        """Of each of ``held``, for each region: the numbers of the shards that hold it, the rank's own first."""
        for (part, where), copies in regions.items():
            if sum(region.numel for region in copies) != sizes[part]:
                continue
            alone = all(len(numbers) == 1 for numbers in copies.values())
            for rank in range(1 if alone else len(ranks)):
                self.held.append((part, where if alone else f"{where}@{rank}"))
                self.shards.append([sorted(n.values(), key=lambda i: i != n.get(rank)) for n in copies.values()])

    def add_up(self, ranks: Seq[Seq[int | None]]) -> list[int | None]:
        """The sum of each of ``held`` from those of all ranks' shards, None for what cannot be told."""
        flat = [total for sums in ranks for total in sums]
        # Most tensors of one rank are one shard, and hundreds come with every push.
        return [flat[s[0][0]] if len(s) == len(s[0]) == 1 else _added(flat, s) for s in self.shards]


def _added(flat: Seq[int | None], regions: Seq[Seq[int]]) -> int | None:
    told = [next((total for n in numbers if (total := flat[n]) is not None), None) for numbers in regions]
    known = [total for total in told if total is not None]
    return sum(known) % MODULUS if len(known) == len(told) else None
