"""Rows of a dataset as items: there at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from tandem.data.windows import Windows
from tandem.futures import Done, Future
from tandem.roles import Clock, Metrics
from tandem.types import Example, Ticket


@dataclass(frozen=True)
class AtOnce:
    """What is common to sources whose items are there at once (``tandem.roles.Source``)."""

    phase: str = field(default="data", init=False)
    busy_seconds: float = field(default=0.0, init=False)

    def wait(self, until: Callable[[], bool], clock: Clock, at_least: int = 0) -> None:
        """Nothing: all that was begun is done."""

    def look(self) -> None:
        """Nothing is under way."""

    def finish(self, items: Seq[Future[Any]], clock: Clock) -> list[Any]:
        """The items as they are."""
        return [item.result() for item in items]

    def kept(self, item: Future[Any]) -> None:
        """Nothing: it is there again whenever it is asked for."""

    def again(self, ticket: Ticket, kept: Mapping[str, Any]) -> None:
        """See ``kept``."""

    def cancel(self) -> None:
        """Nothing is under way."""

    def check(self, items: Seq[Any]) -> None:
        """Nothing: a row is there."""

    def metrics(self, items: Seq[Any]) -> Metrics:
        """No metrics: a row is as it is."""
        return {}


@dataclass(frozen=True)
class Tokenized(AtOnce):
    """A source of tokenized rows."""

    rows: Seq[Example]

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> list[Future[Any]]:
        """The tickets' rows."""
        return [Done(self.rows[ticket.row]) for ticket in tickets]


@dataclass(frozen=True)
class InWindows(AtOnce):
    """A source of windows of text: a ticket's number is that of its window."""

    windows: Windows

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> list[Future[Any]]:
        """The tickets' windows, read and tokenized now. Their numbers follow one another."""
        with clock("data"):
            return [Done(window) for window in self.windows.take(range(tickets[0].number, tickets[-1].number + 1))]
