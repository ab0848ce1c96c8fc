"""What vLLM made of the weights that it was sent: which of its tensors hold what, and their checksums."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tandem.sync.checksum import Checked, Sums, add


@dataclass(frozen=True)
class Shard:
    """One rank's share of one tensor."""

    parts: dict[str, int]
    """Elements of each HF tensor that it was made from, in full."""
    loaded: int
    """Elements of them that this rank took."""
    sums: Sums


def combine(ranks: Seq[dict[str, Shard]]) -> dict[str, Checked]:
    """The whole tensors from every tensor-parallel rank's shards.

    A tensor that all ranks hold in full counts once, if they agree; where they do not, the ranks' sums stand under
    the names ``tensor@rank``. One of which some parts are sharded and others repeated (keys and values of fewer heads
    than ranks) cannot be added up and is left out.
    """
    found: dict[str, Checked] = {}
    for name in _names(ranks):
        shards = [rank[name] for rank in ranks if name in rank]
        sizes = {part: size for shard in shards for part, size in shard.parts.items()}
        parts, numel = tuple(sizes), sum(sizes.values())
        if all(shard.loaded == numel for shard in shards) and len(shards) == len(ranks):
            sums = [(*shard.sums[:2], numel) for shard in shards]
            if len(set(sums)) == 1:
                found[name] = Checked(parts, sums[0])
            else:
                found |= {f"{name}@{rank}": Checked(parts, each) for rank, each in enumerate(sums)}
        elif sum(shard.loaded for shard in shards) == numel:
            first, second, _ = add([shard.sums for shard in shards])
            found[name] = Checked(parts, (first, second, numel))
    return found


def _names(ranks: Iterable[dict[str, Shard]]) -> list[str]:
    return list(dict.fromkeys(name for rank in ranks for name in rank))
