"""Results that may still be on their way. Imports nothing, so that every room can give and take them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


class Future(Protocol[Result]):
    """The result of a call that has begun."""

    def done(self) -> bool:
        """Whether ``result`` returns, or raises, without waiting."""
        ...

    def result(self) -> Result:
        """Waits for the call to end. Returns what it returned, or raises what it raised, each time it is asked."""
        ...


class Begun(Future[Result], Protocol):
    """The result of a call that is made elsewhere, of which nothing is known here until somebody looks."""

    @property
    def settled(self) -> bool:
        """Whether it had ended when somebody last looked."""
        ...

    def look(self, *, wait: bool = False) -> None:
        """Takes what has come, whichever calls it is of. ``wait``: until something has, unless this one is settled."""
        ...


@runtime_checkable
class Awaited(Future[Result], Protocol):
    """The result of a call that can be waited for for a while."""

    def wait(self, seconds: float) -> None:
        """Returns when the call has ended, or after so long."""
        ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """The result of a call that was made at once."""

    value: T
    settled: bool = field(default=True, init=False)

    def done(self) -> bool:
        return True

    def result(self) -> T:
        return self.value

    def look(self, *, wait: bool = False) -> None:
        """Nothing: it has come."""


@dataclass
class Later(Generic[T]):
    """The result of a call that whoever first asks for it makes; who asks after it failed makes it again."""

    make: Callable[[], T]
    made: Done[T] | None = None

    @property
    def settled(self) -> bool:
        return self.made is not None

    def done(self) -> bool:
        return self.made is not None

    def look(self, *, wait: bool = False) -> None:
        """Makes the call, if it is to be waited for."""
        if wait:
            self.result()

    def result(self) -> T:
        if self.made is None:
            self.made = Done(self.make())
        return self.made.value


@dataclass
class Driven(Generic[T]):
    """The result of a call that goes on only while somebody waits: ``wait`` returns once its argument is true."""

    future: Future[T]
    wait: Callable[[Callable[[], bool]], object]

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> T:
        if not self.future.done():
            self.wait(self.future.done)
        return self.future.result()


def wait_all(futures: Seq[Future[T]]) -> list[T]:
    """Waits until every call has ended. Returns the results in order.

    Raises the error of the first of them, in the given order, that failed, whichever failed first. An interrupt ends
    the wait at once.
    """
    results: list[T] = []
    errors: list[Exception] = []
    for future in futures:
        try:
            results.append(future.result())
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results
