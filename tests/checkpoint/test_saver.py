from __future__ import annotations

import pytest

from tandem.checkpoint.saver import SaveEvery
from tandem.errors import UserError


def test_steps() -> None:
    every = SaveEvery.parse("3")
    assert every.enabled
    assert [step for step in range(1, 10) if every.due(step)] == [3, 6, 9]


def test_minutes_of_the_clock() -> None:
    now = 1000.0
    every = SaveEvery.parse("10m", clock=lambda: now)
    due = []
    for step in range(1, 41):
        now += 60.5
        if every.due(step):
            due.append(step)
    # Ten steps take 605 s: due at the first step after 600 s, then 600 s after that one.
    assert due == [10, 20, 30, 40]


@pytest.mark.parametrize("text", ["0", "0m"])
def test_never(text: str) -> None:
    every = SaveEvery.parse(text, clock=lambda: 0.0)
    assert not every.enabled
    assert not any(every.due(step) for step in range(1, 100))


@pytest.mark.parametrize("text", ["", "m", "-1", "10s", "1.5m", "ten"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="save_every: expected"):
        SaveEvery.parse(text)
