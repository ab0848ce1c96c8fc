"""Callers that share one core: who steps it, what an error of one costs the others, and what an interrupt leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tandem.engines.stepper import Stepper
from tandem.errors import Cancelled, UserError

PATIENCE_S = 20.0


class Counting:
    """A job is the number of steps that it takes, and its result the names of all that were in the last of them."""

    def __init__(self) -> None:
        self.jobs: dict[int, int] = {}
        self.steps = 0
        self.sampled_tokens = 0
        self.before: Callable[[], None] = lambda: None

    def add(self, name: int, job: int) -> None:
        if job > 1000:
            raise ValueError("too long")
        self.jobs[name] = job

    def step(self) -> dict[int, list[int] | Exception]:
        self.before()
        self.steps += 1
        beside = sorted(self.jobs)
        for name in self.jobs:
            self.jobs[name] -= 1
        ended = [name for name, left in self.jobs.items() if left == 0]
        bad = [name for name, left in self.jobs.items() if left < 0]
        for name in (*ended, *bad):
            del self.jobs[name]
        return dict.fromkeys(ended, beside) | {name: UserError(f"job {name}") for name in bad}

    def abort(self, names: list[int]) -> None:
        for name in names:
            self.jobs.pop(name, None)

    def renew(self, version: int) -> None: ...


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_result_is_stepped_for_no_longer_than_it_takes():
    stepper = Stepper(core := Counting())
    slow, quick, nothing = stepper.submit([[5, 3], [2], []])
    assert not quick.done()
    assert nothing.result() == []
    assert core.steps == 0
    assert quick.result() == quick.result() == [[0, 1, 2]]
    assert (core.steps, stepper.ended, stepper.unfinished, slow.done()) == (2, 1, 2, False)
    (late,) = stepper.submit([[1]])
    assert slow.result() == [[0], [0, 1, 3]]
    assert (late.done(), late.result(), core.steps, stepper.ended) == (True, [[0, 1, 3]], 5, 4)
    stepper.submit([[1]])
    assert stepper.ended == 0


def test_a_call_is_told_between_steps_of_what_ends_in_it():
    stepper = Stepper(core := Counting())
    heard: list[list[tuple[int, int]]] = []
    late = []

    def watch(ended):
        if not heard:
            late.extend(stepper.submit([[1]]))  # nobody holds the lock
        assert not any((quick, slow)[part].done() for part, _, _ in ended), "it is told before anyone has the result"
        heard.append([(part, index) for part, index, _ in ended])

    quick, slow = stepper.submit([[2], [4, 2]], watch)
    (other,) = stepper.submit([[6]])
    slow.result()
    assert heard == [[], [(0, 0), (1, 1)], [], [(1, 0)]]
    assert other.result()
    assert len(heard) == 4, "what has ended is not watched any more"
    assert late[0].done()
    assert core.steps == 6


def test_what_a_watch_raises_ends_its_call_and_no_other():
    stepper = Stepper(core := Counting())
    (other,) = stepper.submit([[3]])

    def watch(ended):
        raise UserError("seen enough")

    (watched,) = stepper.submit([[1, 9]], watch)
    with pytest.raises(UserError, match="seen enough"):
        watched.result()
    assert core.jobs == {0: 2}
    assert other.result() == [[0]]


def test_an_error_ends_its_own_call_and_no_other():
    stepper = Stepper(core := Counting())
    (other,) = stepper.submit([[4]])
    early, bad, with_it = stepper.submit([[1], [0], [9]])
    with pytest.raises(UserError, match="job 2"):
        bad.result()
    assert core.jobs == {0: 3}, "what was submitted with it has left"
    assert with_it.done()
    with pytest.raises(UserError, match="job 2"):
        with_it.result()
    assert early.result() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="too long"):
        stepper.submit([[1], [1, 1001]])
    assert core.jobs == {0: 3}
    assert other.result() == [[0]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone")])
def test_a_step_that_is_cut_off_costs_every_call_and_not_the_stepper(error):
    stepper = Stepper(core := Counting())
    (one,), (other,) = stepper.submit([[2]]), stepper.submit([[3]])

    def cut_off() -> None:
        core.jobs.clear()
        raise error

    core.before = cut_off
    with pytest.raises(type(error)):
        one.result()
    core.before = lambda: None
    with pytest.raises(RuntimeError if isinstance(error, KeyboardInterrupt) else OSError):
        other.result()
    assert stepper.unfinished == 0
    assert stepper.submit([[2]])[0].result() == [[2]]


def test_two_calls_that_end_in_one_step_leave_the_third_to_go_on():
    stepper = Stepper(core := Counting())
    started = threading.Event()

    def hold() -> None:
        # The first step waits for everybody, so that the first two end while the others wait.
        core.before = lambda: None
        started.set()
        until(lambda: len(stepper._waiting) == 2)

    core.before = hold
    futures = [stepper.submit([[steps]])[0] for steps in (1, 1, 4)]
    threads = [threading.Thread(target=future.result, daemon=True) for future in futures]
    threads[0].start()
    assert started.wait(PATIENCE_S)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert core.steps == 4


def test_who_claims_the_core_has_it_between_two_steps():
    stepper = Stepper(core := Counting())
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go.wait(PATIENCE_S)

    core.before = hold
    (long,), (given_up,) = stepper.submit([[3]]), stepper.submit([[2]])

    def drive() -> None:
        with pytest.raises(UserError, match="closed"):
            long.result()

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    assert inside.wait(PATIENCE_S)
    found: list[dict[int, int]] = []

    def claim() -> None:
        with stepper.exclusive():
            found.append(dict(core.jobs))
            stepper.fail(UserError("closed"))

    def wait() -> None:
        with pytest.raises(UserError, match="closed"):
            given_up.result()

    others = [threading.Thread(target=target, daemon=True) for target in (wait, claim)]
    for other in others:
        other.start()
    until(lambda: stepper._claims == 1 and len(stepper._waiting) == 1)
    assert not found
    go.set()
    for thread in (driver, *others):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert found == [{0: 2, 1: 1}]
    assert (core.jobs, core.steps) == ({}, 1)


def test_waiting_for_more_than_results_asks_between_any_two_steps():
    stepper = Stepper(core := Counting())
    (job,) = stepper.submit([[5]])
    asked: list[int] = []

    def enough() -> bool:
        asked.append(core.steps)
        if core.steps == 2 and len(asked) == 3:
            stepper.submit([[9]])  # nobody holds the lock
        return core.steps == 3

    stepper.wait(enough)
    assert (asked, job.done(), stepper.unfinished) == ([0, 1, 2, 3], False, 2)

    def fails() -> bool:
        raise UserError("a reward failed")

    with pytest.raises(UserError, match="a reward"):
        stepper.wait(fails)
    assert stepper.unfinished == 2
    stepper.wait(lambda: False)
    assert (job.result()[0][0], core.steps, stepper.busy_seconds > 0) == (0, 11, True)


def test_all_are_given_up_while_another_thread_steps():
    stepper = Stepper(core := Counting())
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go.wait(PATIENCE_S)

    core.before = hold
    futures = stepper.submit([[3], [1]])
    driver = threading.Thread(target=lambda: stepper.wait(lambda: False), daemon=True)
    driver.start()
    assert inside.wait(PATIENCE_S)
    stepper.cancel()
    for future in futures:
        with pytest.raises(Cancelled):
            future.result()
    assert core.jobs
    go.set()
    driver.join(PATIENCE_S)
    assert not driver.is_alive()
    assert (core.jobs, core.steps) == ({}, 1)
    assert stepper.submit([[1]])[0].result() == [[2]]


def test_nobody_steps_while_all_are_paused():
    stepper = Stepper(core := Counting())
    futures = stepper.submit([[50], [60]])
    core.before = lambda: time.sleep(0.001)
    polled = threading.Event()

    def enough() -> bool:
        polled.set()
        return False

    threads = [
        threading.Thread(target=target, daemon=True)
        for target in (futures[0].result, futures[1].result, lambda: stepper.wait(enough))
    ]
    for thread in threads:
        thread.start()
    until(lambda: core.steps > 2)
    with stepper.exclusive():
        stepper.paused = True
    steps = core.steps
    polled.clear()
    assert polled.wait(PATIENCE_S), "rewards under way are noticed all the same"
    with stepper.exclusive():
        assert core.steps == steps
    stepper.wait(lambda: True)
    with stepper.exclusive():
        stepper.paused = False
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert core.steps == 60


def test_whoever_has_waited_enough_leaves_the_others_to_go_on():
    stepper = Stepper(core := Counting())
    futures = stepper.submit([[40], [80], [120]])
    core.before = lambda: time.sleep(0.001)
    threads = [threading.Thread(target=future.result, daemon=True) for future in futures]
    threads += [threading.Thread(target=stepper.wait, args=(future.done,), daemon=True) for future in futures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert core.steps == 120
