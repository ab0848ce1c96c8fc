from concurrent.futures import Future as Promise

import pytest

from tandem.futures import Done, wait_all


class Failing:
    """A call that failed, which writes down that it has been waited for."""

    def __init__(self, name: str, waited: list[str]) -> None:
        self.name, self.waited = name, waited

    def done(self) -> bool:
        return True

    def result(self) -> int:
        self.waited.append(self.name)
        raise ValueError(self.name)


def test_results_come_as_they_were_given():
    assert wait_all([Done("b"), Done("a")]) == ["b", "a"]
    assert wait_all([]) == []


def test_all_are_waited_for_and_the_first_given_speaks():
    """Though the last one failed first: what a run says does not depend on who was quicker."""
    waited: list[str] = []
    last: Promise[int] = Promise()
    last.set_exception(ValueError("last"))
    with pytest.raises(ValueError, match=r"^first$"):
        wait_all([Done(0), Failing("first", waited), Failing("second", waited), last])
    assert waited == ["first", "second"]


def test_an_interrupt_does_not_wait_for_the_rest():
    waited: list[str] = []

    class Interrupted(Failing):
        def result(self) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait_all([Interrupted("one", waited), Failing("two", waited)])
    assert waited == []
