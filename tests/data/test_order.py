"""The order of the data is a function of position, and held-out content is held out everywhere."""

import pytest

from tandem.data.order import Order, content_hash


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
    assert len(order._epochs) <= 3


def test_content_hash_is_the_same_in_every_process_and_blind_to_key_order() -> None:
    # hashlib.blake2b(b'"2+2="', digest_size=8).hexdigest(), taken outside of the project
    assert content_hash("2+2=") == "c2565694b03a7009"
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash("a") != content_hash(["a"])
