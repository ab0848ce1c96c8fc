"""The order of the data is a function of position, and held-out content is held out everywhere."""

from collections import Counter
from fractions import Fraction

import pytest

from tandem.data.order import InTurn, Order, content_hash


def steps(size: int, count: int) -> list[range]:
    """Positions of ``count`` steps of ``size`` items."""
    return [range(first, first + size) for first in range(0, size * count, size)]


@pytest.mark.parametrize("size", [1, 3, 7, 16, 50])
def test_every_epoch_has_every_item_once_whatever_a_step_takes(size) -> None:
    n, epochs = 16, 5
    order = Order(n, seed=3)
    stream = [i for positions in steps(size, -(-n * epochs // size)) for i in order.take(positions)]
    permutations = [stream[e * n : (e + 1) * n] for e in range(epochs)]
    assert all(sorted(p) == list(range(n)) for p in permutations)
    assert len({tuple(p) for p in permutations}) == epochs


def test_resuming_is_a_slice_of_the_unbroken_stream() -> None:
    unbroken = Order(10, seed=1)
    batches = [unbroken.take(positions) for positions in steps(4, 20)]
    assert [Order(10, seed=1).take(positions) for positions in steps(4, 20)] == batches
    assert [unbroken.take(positions) for positions in reversed(steps(4, 20))] == batches[::-1]
    assert [Order(10, seed=1).item(k) for k in range(80)] == [i for batch in batches for i in batch]


def test_the_seed_seeds_the_order() -> None:
    assert Order(100, seed=0).take(range(100)) != Order(100, seed=1).take(range(100))


def test_no_items_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        Order(0, seed=0)


def test_memory_stays_at_the_current_epochs() -> None:
    order = Order(4, seed=0)
    for positions in steps(3, 50):
        order.take(positions)
    assert len(order._epochs[0].drawn) <= 3


MIXTURES = [
    ([5, 7], [Fraction("0.4"), Fraction("0.6")], 5),
    ([3, 50, 4], [1, 1, 1], 3),
    ([4, 9, 2], [Fraction("0.7"), Fraction("0.299"), Fraction("0.001")], 1000),
]


@pytest.mark.parametrize(("sizes", "weights", "period"), MIXTURES)
def test_shares_are_exact_wherever_one_looks(sizes, weights, period) -> None:
    """In whole periods exactly; in any other stretch but for two items."""
    order = Order(sizes, seed=0, weights=weights)
    whole = [float(share) for share in order.shares]
    turns = [order.turn(k)[0] for k in range(3 * period)]
    counts = Counter(turns)
    assert [counts[i] for i in range(len(sizes))] == [3 * period * share for share in order.shares]
    for first, length in ((0, 7), (1, 2), (period // 2, period // 2 + 1), (2 * period - 1, 11)):
        stretch = Counter(order.turn(k)[0] for k in range(first, first + length))
        assert all(abs(stretch[i] - share * length) < 2 for i, share in enumerate(whole))


@pytest.mark.parametrize(("sizes", "weights", "period"), MIXTURES[:2])
def test_every_source_s_epoch_has_every_item_of_it_once(sizes, weights, period) -> None:
    order = Order(sizes, seed=3, weights=weights)
    stream = order.take(range(40 * period))
    first = 0
    for size in sizes:
        own = [i - first for i in stream if first <= i < first + size]
        epochs = [own[e * size : (e + 1) * size] for e in range(len(own) // size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) / 3 or not epochs
        first += size
    assert set(stream) <= set(range(sum(sizes)))


def test_a_mixture_is_a_function_of_the_position() -> None:
    """Resumed anywhere, in any order, with steps of any size, however far: the same rows."""
    sizes, weights, _ = MIXTURES[2]
    unbroken = [row for step in steps(7, 60) for row in Order(sizes, 1, weights).take(step)]
    again = Order(sizes, 1, weights)
    assert [again.item(k) for k in reversed(range(420))] == unbroken[::-1]
    assert [Order(sizes, 1, weights).item(k) for k in range(300, 420)] == unbroken[300:]
    tickets = Order(sizes, 1, weights).tickets(range(14, 21), per_step=7)
    assert [(t.number, t.row, t.step, t.place) for t in tickets] == [(k, unbroken[k], 3, k - 14) for k in range(14, 21)]
    far = [again.turn(k) for k in range(10**12, 10**12 + 1000)]
    assert Counter(source for source, _ in far) == {0: 700, 1: 299, 2: 1}
    for source in range(3):
        own = [place for s, place in far if s == source]
        assert own == list(range(own[0], own[0] + len(own)))


def test_scaled_weights_are_the_same_mixture_and_a_single_source_is_none() -> None:
    assert Order([4, 9], 1, [2, 3]).take(range(50)) == Order([4, 9], 1, [Fraction("0.4"), Fraction("0.6")]).take(
        range(50)
    )
    assert Order([9], 1, [5]).take(range(50)) == Order(9, 1).take(range(50))
    for weights in ([1], [1, 0], [1, -1]):
        with pytest.raises(ValueError, match="as many weights above 0"):
            Order([4, 9], 1, weights)


def test_what_has_an_order_of_its_own_comes_in_it_a_step_after_the_other() -> None:
    found = [(t.number, t.row, t.step, t.place) for t in InTurn().tickets([0, 2, 3, 7], 3)]
    assert found == [(0, 0, 1, 0), (2, 2, 1, 2), (3, 3, 2, 0), (7, 7, 3, 1)]


def test_content_hash_is_the_same_in_every_process_and_blind_to_key_order() -> None:
    # hashlib.blake2b(b'"2+2="', digest_size=8).hexdigest(), taken outside of the project
    assert content_hash("2+2=") == "c2565694b03a7009"
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash("a") != content_hash(["a"])
