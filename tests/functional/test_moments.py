"""Running moments against the standard library's over all the numbers at once."""

import random
import statistics

import pytest

from tandem.functional.moments import Moments, merge, moments


def test_merging_equals_all_at_once():
    rng = random.Random(0)
    # A large mean and a small spread: sums of squares in one pass would lose every digit.
    parts = [[1e6 + rng.gauss(0, 1e-2) for _ in range(n)] for n in (5, 1, 40, 2)]
    seen = Moments()
    for part in parts:
        seen = merge(seen, moments(part))
    everything = [x for part in parts for x in part]
    assert seen.count == 48
    assert seen.mean == pytest.approx(statistics.fmean(everything), rel=1e-14)
    assert seen.std == pytest.approx(statistics.stdev(everything), rel=1e-6)


def test_nothing_and_one():
    assert merge(Moments(), Moments()) == moments([]) == Moments()
    assert merge(Moments(), moments([2.0])) == moments([2.0])
    assert moments([2.0]).std == 0.0
