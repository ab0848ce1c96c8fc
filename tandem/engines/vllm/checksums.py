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
    sum: int


def combine(ranks: Seq[Seq[Shard]], plan: Plan) -> list[Held]:
    """The whole tensors from every tensor-parallel rank's shards.

    Regions add up; one that several ranks hold (norms; keys and values of fewer heads than ranks) counts once. Where
    the ranks' copies of it differ, each stands by itself under ``where@rank``. Tensors that are not there in full are
    left out.
    """
    regions: dict[tuple[str, str], dict[Region, dict[int, int]]] = {}
    for rank, shards in enumerate(ranks):
        for part, where, region, total in shards:
            regions.setdefault((part, where), {}).setdefault(region, {})[rank] = total
    sizes = {spec.name: prod(spec.shape) for spec in plan.tensors}
    found: list[Held] = []
    for (part, where), copies in regions.items():
        if sum(region.numel for region in copies) != sizes[part]:
            continue
        if all(len(set(totals.values())) == 1 for totals in copies.values()):
            found.append(Held(part, where, sum(next(iter(totals.values())) for totals in copies.values()) % MODULUS))
            continue
        for rank in range(len(ranks)):
            mine = [totals.get(rank, next(iter(totals.values()))) for totals in copies.values()]
            found.append(Held(part, f"{where}@{rank}", sum(mine) % MODULUS))
    return found
