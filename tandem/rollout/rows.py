"""Rows of a dataset as items: there at once."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from tandem.data.windows import Windows
from tandem.futures import Done, Future
from tandem.roles import Clock, Metrics
from tandem.types import Example, Sequence, Ticket


@dataclass(frozen=True)
class Tokenized:
    """A source of tokenized rows (``tandem.roles.Source``)."""

    rows: Seq[Example]
    phase: str = field(default="data", init=False)

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> Future[list[Any]]:
        """The tickets' rows."""
        return Done([self.rows[ticket.row] for ticket in tickets])

    def check(self, items: Seq[Any]) -> None:
        """Nothing: a row is there."""

    def metrics(self, items: Seq[Any]) -> Metrics:
        """None: a row is as it is."""
        return {}


@dataclass(frozen=True)
class InWindows:
    """A source of windows of text (``tandem.roles.Source``): a ticket's number is that of its window."""

    windows: Windows
    phase: str = field(default="data", init=False)

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> Future[list[Any]]:
        """The tickets' windows, read and tokenized now. Their numbers follow one another."""
        with clock("data"):
            found = self.windows.take(range(tickets[0].number, tickets[-1].number + 1))
        return Done([window_sequence(ids) for ids in found])

    def check(self, items: Seq[Any]) -> None:
        """Nothing: a window is there."""

    def metrics(self, items: Seq[Any]) -> Metrics:
        """None: a window is as it is."""
        return {}


def window_sequence(ids: list[int]) -> Sequence:
    """A window whose first token only gives the next ones their context."""
    return Sequence(token_ids=ids, trainable=[False] + [True] * (len(ids) - 1))
