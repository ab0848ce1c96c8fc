"""Where a start goes: seconds by stage, whatever thread they are spent in, and what is said of them."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from contextvars import copy_context

from tandem.stages import HERE, Stages, counting, longest, since, stage, told, told_start


def spend(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_stage_within_another_is_not_counted_twice_and_an_error_ends_both():
    stages = Stages()
    with stages.counted():
        for _ in range(2):
            with stage("loading"):
                spend(0.01)
                with stage("proof"):
                    spend(0.03)
        with suppress(ValueError), stage("loading"), stage("graphs"):
            raise ValueError
    found = stages.so_far()
    assert [*found] == ["proof", "loading", "graphs"]
    assert found["proof"] >= 0.06 > 0.04 > found["loading"] >= 0.02
    with stage("proof"):
        spend(0.01)
    assert stages.so_far() == found, "nobody counts here"


def test_a_thread_that_is_given_the_context_counts_and_another_does_not():
    def work() -> None:
        with stage("graphs"):
            spend(0.001)

    with counting() as stages, stage("set-up"):
        with counting() as same:
            assert same is stages
        for target in (work, copy_context().run):
            thread = threading.Thread(target=target, args=() if target is work else (work,))
            thread.start()
            thread.join()
            assert ("graphs" in stages.so_far()) == (target is not work)


def test_what_a_start_says_adds_up():
    of = {
        HERE: {"imports": 4.0, "Ray": 6.04, "weights": 0.02},
        "actor rank 0": {"imports": 9.0, "loading": 12.34},
        "engine rank 1": {"imports": 8.0, "loading": 11.0},
    }
    line = "imports 4.0, Ray 6.0; actor rank 0: imports 9.0, loading 12; other 2.6"
    assert told_start(of, 34.0) == line
    assert told_start({HERE: of[HERE]}, 10.06) == "imports 4.0, Ray 6.0"
    after = since(of, of | {"engine rank 1": of["engine rank 1"] | {"compiling": 20.0, "loading": 11.04}})
    assert after == {HERE: {}, "actor rank 0": {}, "engine rank 1": {"compiling": 20.0}}
    assert (longest(of), longest(after), longest({HERE: {}, "a": {}})) == ("actor rank 0", "engine rank 1", HERE)
    assert told(after["engine rank 1"]) == "compiling 20"
