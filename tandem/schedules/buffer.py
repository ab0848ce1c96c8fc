"""The tickets of a run that are open: how many may be, and which of them a step may take.

Windowed first-in-first-out (arXiv:2605.26494): a ticket may be passed by younger ones, so that nobody waits for the
longest, but only by those less than a window behind it. Nothing is thrown away, whatever its length or its age.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from tandem.futures import Future
from tandem.types import Ticket


@dataclass(eq=False)
class Place:
    """A ticket that is open, with its item."""

    ticket: Ticket
    item: Future[Any]
    admitted: int
    """Steps that the run had done when it was begun: its item is made with the weights after these, or with newer."""
    made: Any = None
    """The item itself, once a step has taken it."""
    _done: bool = False

    @property
    def number(self) -> int:
        return self.ticket.number

    @property
    def done(self) -> bool:
        """Whether the item is there."""
        self._done = self._done or self.item.done()
        return self._done


@dataclass(kw_only=True)
class Buffer:
    """At most ``(max_lag + 1) * items_per_step`` places, oldest ticket first.

    A place is taken from when its ticket is begun until the weights that were trained on its item are in. Where the
    oldest ticket that is not done has number o, a step may take those that are done and whose number is below
    o + ``reach``, oldest first.

    So an item is trained on at most ``bound`` steps after it was begun, with P items a step: whatever is trained on
    between has an older ticket, and there are at most ``(max_lag + 1) * P - 1`` of these, or one of the ``reach - 1``
    next ones; and floor(((max_lag + 1) * P - 1 + reach - 1) / P) = max_lag + ceil((reach - 1) / P).
    """

    items_per_step: int
    max_lag: int = 0
    window: float = 1.0
    """``reach`` as a share of all places."""
    open: list[Place] = field(default_factory=list)
    """Places of tickets that no step has taken."""
    taken: list[Place] = field(default_factory=list)
    """Places that the step in progress has taken, oldest first."""
    passed: list[Place] = field(default_factory=list)
    """Places that it took and whose items the method did not keep: there is room for others."""

    @property
    def size(self) -> int:
        """All places."""
        return (self.max_lag + 1) * self.items_per_step

    @property
    def reach(self) -> int:
        """Numbers of tickets in the window."""
        return max(1, math.ceil(Fraction(str(self.window)) * self.size))

    @property
    def bound(self) -> int:
        """Most steps between those that an item was begun after and those that it is trained on after."""
        return self.max_lag + math.ceil((self.reach - 1) / self.items_per_step)

    def room(self, steps_left: int) -> int:
        """How many tickets may be begun now, with ``steps_left`` steps to come, the one in progress included.

        None that the rest of the run cannot need, unless its method passes more over.
        """
        wanted = steps_left * self.items_per_step
        return max(0, min(self.size, wanted) - len(self.open) - len(self.taken))

    def add(self, place: Place) -> None:
        """A ticket has been begun."""
        insort(self.open, place, key=lambda one: one.number)

    def within_reach(self, count: int) -> list[Place]:
        """Up to ``count`` tickets that may be taken now, oldest first."""
        found: list[Place] = []
        end = math.inf
        for place in self.open:
            if len(found) == count or place.number >= end:
                break
            if place.done:
                found.append(place)
            elif end == math.inf:
                end = place.number + self.reach
        return found

    def ready(self, count: int) -> bool:
        """Whether ``count`` tickets may be taken; or must be, since no others are open."""
        return len(self.open) == count or len(self.within_reach(count)) == count

    def missing(self, count: int) -> int:
        """How many more must at least be done before ``count`` may be taken."""
        return max(0, count - sum(place.done for place in self.open))

    def take(self, count: int, step: int) -> list[Place]:
        """Takes ``count`` tickets, which are ``ready``, for the step after ``step`` steps of the run."""
        found = list(self.open) if len(self.open) == count else self.within_reach(count)
        late = [place for place in found if step - place.admitted > self.bound]
        assert not late, f"tickets {[place.number for place in late]} are more than {self.bound} steps behind"
        gone = set(found)
        self.open = [place for place in self.open if place not in gone]
        self.taken = sorted([*self.taken, *found], key=lambda place: place.number)
        return found

    def pass_over(self, place: Place) -> None:
        """One that was taken is not trained on: its place is free."""
        self.taken.remove(place)
        self.passed.append(place)

    def trained(self) -> None:
        """The step in progress has been trained, and the weights are in."""
        self.taken, self.passed = [], []

    def untrained(self, below: int) -> list[Place]:
        """All that no finished step has trained on or passed over, of tickets with a smaller number."""
        places: Seq[Place] = [*self.open, *self.taken, *self.passed]
        return sorted((place for place in places if place.number < below), key=lambda place: place.number)
