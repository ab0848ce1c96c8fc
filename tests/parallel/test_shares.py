"""A batch divided over ranks: nothing twice, nothing missing, equally many micro-batches."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from tandem.batch import cut
from tandem.data.packing import pack, pack_pairs, stamp_weights
from tandem.parallel.shares import Sizes, divide, shares
from tandem.parallel.world import World
from tandem.types import PreferencePair, Sequence


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


def test_what_is_never_cut_has_the_tokens_of_the_largest_unit():
    rng = random.Random(1)
    prompts = [[2 + i] * 9 for i in range(4)]
    rows = [
        Sequence(token_ids=p + [1] * (n := rng.randrange(2, 30)), trainable=[False] * 9 + [True] * n)
        for p in prompts
        for _ in range(2)
    ]
    alike = [PreferencePair(chosen=a, rejected=b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    apart = [PreferencePair(chosen=a, rejected=b) for a, b in zip(rows[::2], rows[3::2], strict=False)]
    for batch in (pack(rows), pack_pairs(alike), pack_pairs(apart), pack(rows[:1]), pack_pairs([alike[0], *apart])):
        assert batch.largest_unit == max(Sizes(batch).alone)


@pytest.mark.parametrize("ranks", [1, 3])
def test_padding_counts_where_there_is_padding(ranks):
    lengths = [512, *random.Random(0).choices(range(2, 60), k=60)]
    rows = [Sequence(token_ids=[1] * n, trainable=[False] + [True] * (n - 1)) for n in lengths]
    batch = stamp_weights(pack(rows), "token")
    parts = [list(shares(batch, 512, World(rank=rank, size=ranks), padded=True)) for rank in range(ranks)]
    assert sorted(unit for part in parts for share in part for unit in share.units) == list(range(61))
    assert len({len(part) for part in parts}) == 1
    areas = [share.batch.segments * max(share.batch.lengths) for part in parts for share in part]
    assert max(areas) <= 512
    # In packed micro-batches, whose budget counts no padding, the same would be 12,000 and more.
    packed = next(share.batch for share in shares(batch, 2048, World()))
    assert packed.segments * max(packed.lengths) > 12_000
    pairs = [PreferencePair(chosen=rows[i], rejected=rows[i + 1]) for i in range(1, 11)]
    for share in shares(pack_pairs(pairs), 200, World(), padded=True):
        assert share.batch.segments * max(share.batch.lengths) <= 200


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


def chat_lengths(count, longest=4096, seed=0):
    """Log-normal, as the lengths of conversations are."""
    rng = random.Random(seed)
    return [min(longest, max(8, int(rng.lognormvariate(math.log(350), 1.0)))) for _ in range(count)]


def sequence(length, prompt, name):
    return Sequence(token_ids=[name] * prompt + [1] * (length - prompt), trainable=[i >= prompt for i in range(length)])


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kind", ["sequences", "pairs"])
@pytest.mark.parametrize("count", [96, 300])
def test_what_meets_costs_the_same_on_chat_lengths(ranks, kind, count):
    """Tokens and attention, of a whole step and of each round of micro-batches that ranks wait for one another in."""
    lengths = chat_lengths(count)
    if kind == "sequences":
        batch = pack([sequence(length, 4, i + 2) for i, length in enumerate(lengths)])
    else:
        prompts, others = (chat_lengths(count, 2048, seed) for seed in (1, 2))
        batch = pack_pairs([
            PreferencePair(chosen=sequence(p + a, p, i + 2), rejected=sequence(p + b, p, i + 2))
            for i, (p, a, b) in enumerate(zip(prompts, others, reversed(others), strict=True))
        ])  # fmt: skip
    sizes = Sizes(batch)
    plan = sizes.plan(ranks, 16384)
    assert sorted(unit for rank in plan for units in rank for unit in units) == list(range(count))
    assert all(sum(sizes.of(units)) <= 16384 for rank in plan for units in rank)
    tokens = [sum(sum(sizes.of(units)) for units in rank) for rank in plan]
    ideal = sum(sizes.cost(units) for rank in plan for units in rank) / ranks
    waited = sum(max(map(sizes.cost, meeting)) for meeting in zip(*plan, strict=True))
    assert max(tokens) * ranks < 1.03 * sum(tokens)
    assert waited < 1.03 * ideal
    # As many rounds as there must be, but for one that what does not fit may need.
    assert len(plan[0]) <= -(-sum(tokens) // (16384 * ranks)) + 1


def test_a_long_sequence_counts_for_its_attention():
    """Of equally many tokens, one sequence of 32768 costs more than 32 of 1024, and gets less beside it."""
    batch = pack([sequence(length, 1, i + 2) for i, length in enumerate([32768, *[1024] * 48])])
    long, short = sorted(Sizes(batch).plan(2, 65536), key=lambda rank: 0 not in rank[0])
    assert [sum(batch.lengths[unit] for unit in rank[0]) for rank in (long, short)] == [32768, 48 * 1024]


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
