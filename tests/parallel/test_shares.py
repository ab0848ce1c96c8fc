"""A batch divided over ranks: nothing twice, nothing missing, equally many micro-batches."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from tandem.batch import cut
from tandem.data.packing import pack, stamp_weights
from tandem.parallel.shares import divide, shares
from tandem.parallel.world import World
from tandem.types import Sequence


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_every_unit_once_and_equal_counts(ranks, count):
    rng = random.Random(count)
    rows = []
    for _ in range(count):
        length = rng.randrange(2, 30)
        rows.append(Sequence(token_ids=[1] * length, trainable=[False] + [True] * (length - 1)))
    batch = stamp_weights(pack(rows), "token")
    parts = [list(shares(batch, 40, World(rank=rank, size=ranks))) for rank in range(ranks)]
    assert sorted(unit for part in parts for share in part for unit in share.units) == list(range(count))
    assert len({len(part) for part in parts}) == 1
    for share in (share for part in parts for share in part):
        assert share.batch.tokens <= 40
        if not share.units:
            assert not share.batch.weight_T.any()
    total = sum(share.batch.weight_T.sum() for part in parts for share in part)
    torch.testing.assert_close(total, batch.weight_T.sum())


def test_samples_of_a_prompt_stay_on_a_rank_where_that_is_no_more_work():
    def batch_of(groups):
        rows = []
        for number, count in enumerate(groups):
            prompt = [number + 2] * 20
            rows += [Sequence(token_ids=[*prompt, 1], trainable=[False] * 20 + [True]) for _ in range(count)]
        return stamp_weights(pack(rows), "token")

    def work(batch, ranks):
        """For each rank: the samples of each prompt."""
        parts = [shares(batch, 10_000, World(rank=rank, size=ranks)) for rank in range(ranks)]
        return [Counter(share.batch.token_ids_T[share.batch.bounds[:-1]].tolist()) for [share] in parts]

    eight = batch_of([8, 8, 8, 8])
    shuffled = eight.select(random.Random(0).sample(range(32), 32))
    for batch in (eight, shuffled):
        assert sorted(sorted(samples.values()) for samples in work(batch, 2)) == [[8, 8], [8, 8]]
    # A prompt on one rank would leave the other idle.
    assert [sum(samples.values()) for samples in work(batch_of([8]), 2)] == [4, 4]


def test_divide_balances_what_differs():
    rng = random.Random(0)
    sizes = [rng.randrange(1, 1000) for _ in range(200)]
    parts = divide(sizes, 4)
    sums = [sum(sizes[i] for i in part) for part in parts]
    assert sorted(i for part in parts for i in part) == list(range(200))
    assert max(sums) - min(sums) < max(sizes) / 10
    assert parts == divide(sizes, 4)


def test_cut_keeps_to_the_budget_unless_one_alone_is_larger():
    assert cut([3, 3, 3, 10, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert cut([], 6) == []
    assert cut([3, 3, 3, 3], 6, following=[3, 1, 2, 3]) == [[0, 1, 2], [3]]
