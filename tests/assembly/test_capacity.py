"""Adapters that hold far less than the data say are said."""

from tandem.assembly.run import too_small


def test_it_is_said_where_the_data_say_more_than_twice_what_adapters_hold():
    assert too_small(1_000_000, 4_000_000.0) == ""
    line = too_small(1_000_000, 4_000_001.0)
    assert line.startswith("lora.rank: the adapters hold about 2 x 1M bits and the data say about 4M")
