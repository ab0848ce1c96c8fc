"""Engines in real Ray workers: they sample while nobody looks, are given up, die, and share processes with others."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.shared_ray import cluster_address
from helpers.telling import TOKENS, Telling, told
from helpers.worker_groups import groups

from tandem.engines.live.fitting import Fitting
from tandem.errors import Cancelled, RunFailure, UserError, WorkerDied
from tandem.futures import wait_all
from tandem.parallel.world import World
from tandem.roles import Engine
from tandem.sync.push import between_sequences
from tandem.types import Request, SamplingParams
from tandem.workers.engines import EngineGroup, RestartingOnce
from tandem.workers.process import Site
from tandem.workers.served import serve

__all__ = ["cluster_address"]
PATIENCE_S = 30.0


def asks(*lengths: int, seeds: int = 2) -> list[Request]:
    return [
        Request(
            prompt_ids=(5, 6, 7)[: 1 + i % 3],
            seeds=tuple(range(10 * i, 10 * i + seeds)),
            sampling=SamplingParams(max_new_tokens=length),
        )
        for i, length in enumerate(lengths)
    ]


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_engines_alone_sample_on_change_weights_are_given_up_and_die(cluster_address: str, tmp_path: Path) -> None:
    with groups(2, joined=False, concurrency=8) as (group,):
        seat = group.place("engine", lambda site: Telling(tmp_path, pace_s=0.004, max_slots=4))
        several = EngineGroup(group, alone=True)
        engine = RestartingOnce(several, several, lambda: seat.call("become", 5))
        assert isinstance(engine, Engine)

        # They sample while nobody asks, with weights that change in the middle, and each sample is told of once.
        heard: list[tuple[int, int]] = []
        start = time.monotonic()
        futures = engine.submit(asks(100, 100, 9, 9), lambda ended: heard.extend((i, j) for i, j, _ in ended))
        assert time.monotonic() - start < 0.2
        until(lambda: seat.submit_each("ended", [(), ()]).result() == [2, 2])
        seat.call("become", 1)
        assert heard == []
        engine.wait(lambda: futures[2].done() and futures[3].done(), 2)
        assert sorted(heard) == [(2, 0), (2, 1), (3, 0), (3, 1)]
        found = [c for cs in wait_all(futures) for c in cs]
        assert [c.versions for c in found] == [told(c, TOKENS) for c in found]
        assert [[v for v, _ in c.versions] for c in found] == [[0, 1]] * 4 + [[0]] * 4
        assert sorted(heard) == [(i, j) for i in range(4) for j in range(2)]
        assert engine.sampled_tokens == sum(len(c.token_ids) for c in found)
        assert 0.1 < engine.busy_seconds < time.monotonic() - start

        # Between sequences: what runs ends with its weights, what waits begins with the others.
        futures = engine.submit(asks(*[60] * 6))
        until(lambda: min(seat.submit_each("running", [(), ()]).result()) > 0)
        assert (
            0
            < between_sequences(several, lambda step: seat.call("become", step) or {})(2)["settling_seconds"]
            < PATIENCE_S
        )
        found = [c for cs in wait_all(futures) for c in cs]
        assert [c.versions for c in found] == [told(c, TOKENS) for c in found]
        assert {tuple(c.versions) for c in found} == {((1, 60),), ((2, 60),)}

        # A request that cannot be sampled is its own call's error.
        (good,) = engine.submit(asks(3))
        (bad,) = engine.submit([Request(prompt_ids=(5000,), seeds=(1,), sampling=SamplingParams())])
        with pytest.raises(UserError, match=r"home0 rank \d .*token id 5000"):
            bad.result()
        assert len(good.result()) == 2

        # All is given up, though the engines are in a step; what comes after is sampled.
        futures = engine.submit(asks(90, 90))
        engine.wait(iter([False, False, True]).__next__)
        (tmp_path / "hold").touch()
        start = time.monotonic()
        engine.cancel()
        assert time.monotonic() - start < 2
        for future in futures:
            with pytest.raises(Cancelled):
                future.result()
        later = engine.submit(asks(4, 4))
        (tmp_path / "hold").unlink()
        assert [len(c.token_ids) for cs in wait_all(later) for c in cs] == [4] * 4
        assert seat.call("sampled_tokens") < 800

        # One is killed with open samples: they are drawn anew, those that were told of stay.
        heard.clear()
        futures = engine.submit(asks(120, 120, 9, 9), lambda ended: heard.extend((i, j) for i, j, _ in ended))
        engine.wait(lambda: futures[2].done() and futures[3].done())
        os.kill(group.wheres[0].pid, signal.SIGKILL)
        found = [c for cs in wait_all(futures) for c in cs]
        assert sorted(heard) == [(i, j) for i in range(4) for j in range(2)]
        assert [len(c.token_ids) for c in found] == [120] * 4 + [9] * 4
        # The other one may have ended before the new weights came.
        assert sorted(c.versions[0][0] for c in found[:4]) == [2, 2, 5, 5]
        # And once more, which is once too often.
        futures = engine.submit(asks(60, 60))
        os.kill(group.wheres[1].pid, signal.SIGKILL)
        with pytest.raises(RunFailure, match="restarted once already"):
            wait_all(futures)
        start = time.monotonic()
        engine.cancel()
        assert time.monotonic() - start < 15


class OneCallAtATime:
    """Two processes of others, as far as an engine group sees of them: each makes its calls in order, one at a time."""

    name, deadline_s = "actor", 0.6

    def __init__(self, *engines: Telling, calls_at_a_time: int = 1) -> None:
        self.size = len(engines)
        self.sites = [Site(World(rank), {"engine": engine}) for rank, engine in enumerate(engines)]
        self.threads = [ThreadPoolExecutor(calls_at_a_time) for _ in engines]

    def place(self, role: str, build: Any) -> None:
        for site in self.sites:
            site.roles[role] = build(site)

    def submit_one(self, rank: int, role: str, verb: str, *arguments: Any) -> Any:
        call = self.threads[rank].submit(self.sites[rank].call, role, verb, arguments)
        call.first_rank = rank  # type: ignore[attr-defined]
        return call

    def ended_of(self, calls: list[Any], seconds: float, *, all_of_them: bool = False) -> list[Any]:
        return list(wait(calls, seconds, ALL_COMPLETED if all_of_them else FIRST_COMPLETED).done)

    def late(self, what: str, ranks: list[int]) -> RunFailure:
        return RunFailure(f"{what}: no answer from {ranks}")


def test_between_sequences_what_engines_said_before_they_were_held_does_not_count() -> None:
    """An answer that lies here unheard is of a time when samples began, and tells of none that run."""
    group: Any = OneCallAtATime(telling := Telling(pace_s=0.004, max_slots=4), calls_at_a_time=4)
    group.deadline_s = 5
    engine = EngineGroup(group, alone=True)
    futures = engine.submit(asks(3, 60, 60, 60))
    engine.look()
    until(lambda: all(answer.done() for answer in engine._takes.values()))
    assert engine._takes
    between_sequences(engine, lambda step: telling.become(step) or {})(1)  # type: ignore[func-returns-value]
    found = [c for cs in wait_all(futures) for c in cs]
    assert {tuple(c.versions) for c in found} == {((0, 3),), ((0, 60),), ((1, 60),)}
    group.sites[0].roles["sampling"].close()


def test_between_sequences_samples_that_nobody_wants_any_more_are_waited_for_and_end() -> None:
    group: Any = OneCallAtATime(*(Telling(pace_s=0.002, max_slots=2) for _ in range(2)), calls_at_a_time=4)
    group.deadline_s = 5
    engine = EngineGroup(group, alone=True)
    bad = engine.submit(asks(80, 80, seeds=3), lambda ended: 1 / 0)  # type: ignore[arg-type, return-value]
    engine.wait(lambda: bad[0].done())
    (good,) = engine.submit(asks(5))
    pushes: list[int] = []
    between_sequences(engine, lambda step: pushes.append(step) or {})(1)  # type: ignore[func-returns-value]
    assert pushes == [1]
    assert len(good.result()) == 2
    for site in group.sites:
        site.roles["sampling"].close()


def test_between_sequences_an_engine_that_was_started_again_gets_samples_after_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM refuses them before its adapters have come."""
    group: Any = OneCallAtATime(*(Telling(pace_s=0.002, max_slots=2) for _ in range(2)), calls_at_a_time=4)
    group.deadline_s = 5
    engine = EngineGroup(group, alone=True, slots=2)
    futures = engine.submit(asks(40, 40, 40, 40))
    engine.wait(iter([False, False, True]).__next__)
    dies, again = group.sites[0], Telling(max_slots=2)
    dies.roles["sampling"].close()
    dies.roles["engine"] = again
    dies.roles["sampling"] = serve(dies, alone=True)
    engine.forget(0)
    pushes: list[int] = []

    def submit(*given: Any) -> Any:
        if not pushes:
            raise UserError("push first")
        return Telling.submit(again, *given)

    monkeypatch.setattr(again, "submit", submit)
    between_sequences(engine, lambda step: pushes.append(step) or {})(1)  # type: ignore[func-returns-value]
    assert [len(samples) for samples in wait_all(futures)] == [2] * 4
    for site in group.sites:
        site.roles["sampling"].close()


@pytest.mark.parametrize("hung", [False, True])
def test_what_waits_while_engines_are_held_owes_no_progress_and_what_runs_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: bool
) -> None:
    """One engine is done with what runs and has more, which it may not begin; the other takes its time, or hangs."""
    monkeypatch.setattr("tandem.workers.engines.TAKE_S", 0.1)
    engines = Telling(max_slots=2), Telling(tmp_path, pace_s=0.02, max_slots=2)
    group: Any = OneCallAtATime(*engines, calls_at_a_time=4)
    engine = EngineGroup(group, alone=True)
    futures = engine.submit(asks(40, 40, 40, 40))
    engine.wait(iter([False] * 3 + [True]).__next__)
    pushes: list[int] = []
    push = between_sequences(engine, lambda step: pushes.append(step) or {})  # type: ignore[func-returns-value]
    if hung:
        hold, late = engine.hold, group.late

        def holds(held: bool) -> None:
            hold(held)
            (tmp_path / "hold").touch()

        def goes_on(what: str, ranks: list[int]) -> RunFailure:
            (tmp_path / "hold").unlink()
            return late(what, ranks)

        monkeypatch.setattr(engine, "hold", holds)
        monkeypatch.setattr(group, "late", goes_on)
        with pytest.raises(RunFailure, match=r"no answer from \[1\]"):
            push(1)
        (tmp_path / "hold").unlink()
    else:
        push(1)
        assert len(wait_all(futures)) == 4
    assert pushes == [1] * (not hung)
    for site in group.sites:
        site.roles["sampling"].close()


def test_what_fails_is_given_up_in_all_engines_and_costs_nothing_else() -> None:
    group: Any = OneCallAtATime(*(Telling(pace_s=0.002, max_slots=4) for _ in range(2)), calls_at_a_time=4)
    engine = EngineGroup(group, alone=True)
    (good,) = engine.submit(asks(40))
    bad = engine.submit(asks(3, 9000, 9000), lambda ended: 1 / 0)  # type: ignore[arg-type, return-value]
    ended = engine.ended
    engine.wait(lambda: bad[1].done())
    assert engine.ended == ended + 6, "whoever asks only when something has ended hears of it"
    assert len(good.result()) == 2
    until(lambda: all(site.roles["engine"].stepper.unfinished == 0 for site in group.sites))
    for site in group.sites:
        site.roles["sampling"].close()


def test_weights_that_a_push_did_not_come_to_send_are_not_called_by_an_older_step() -> None:
    group: Any = SimpleNamespace(name="engine", dead=lambda: [0], restart=lambda rank: None)
    engines: Any = SimpleNamespace(group=group, forget=lambda rank: None)
    refilled: list[int] = []

    def dies(step: int) -> dict[str, float]:
        raise WorkerDied("engine rank 0 died")

    engine = RestartingOnce(engines, engines, lambda: refilled.append(-1))

    def again(step: int) -> dict[str, float]:
        refilled.append(step)
        return {"sync_seconds": 0.5}

    assert engine.guard(dies, again)(7) == {"sync_seconds": 0.5}
    assert refilled == [7]
    with pytest.raises(RunFailure, match="restarted once already"):
        engine.guard(dies, again)(8)
    # Who sends may have died instead, and no engine is to be restarted.
    group.dead = list
    with pytest.raises(WorkerDied, match=r"^engine rank 0 died$"):
        engine.guard(dies, again)(9)


def test_an_engine_of_this_process_takes_weights_between_sequences() -> None:
    engine = Telling(max_slots=4)
    futures = engine.submit(asks(*[30] * 6))
    engine.wait(iter([False, False, True]).__next__)
    start = time.perf_counter()
    metrics = between_sequences(engine, lambda step: engine.become(step) or {"sync_seconds": 1.0})(1)  # type: ignore[func-returns-value]
    assert 0 < metrics["settling_seconds"] < time.perf_counter() - start
    assert metrics["sync_seconds"] == 1
    found = [c for cs in wait_all(futures) for c in cs]
    assert {tuple(c.versions) for c in found} == {((0, 30),), ((1, 30),)}


def test_a_large_cache_goes_after_the_last_slice_and_not_between_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who trains next has the memory: the first time, when nobody knows how much that takes."""
    monkeypatch.setattr(Fitting, "_is_large", lambda self: self.decoder is not None)
    monkeypatch.setattr("tandem.workers.engines.SLICE_S", 0.05)
    group: Any = OneCallAtATime(telling := Telling(way="captured", pace_s=0.06, max_slots=4))
    engine, fitting = EngineGroup(group, alone=False), telling.fitting
    assert fitting is not None
    engine.submit(asks(120, 120))
    slices = []
    for _ in range(2):
        group.submit_one(0, "sampling", "take", 99, 0.05).result()
        slices.append(fitting.decoder)
    assert slices[0] is slices[1] is not None
    waits = []
    for _ in range(3):
        engine.wait(iter([False, True]).__next__)
        waits.append(fitting.decoder)
    assert waits[0] is None
    assert waits[1] is waits[2] is not None


def test_engines_in_processes_of_others_sample_in_slices(tmp_path: Path) -> None:
    """Between slices the processes are free, and samples stay open."""
    engines = [Telling(tmp_path, pace_s=0.004, max_slots=4) for _ in range(2)]
    group: Any = OneCallAtATime(*engines)
    engine = EngineGroup(group, alone=False)
    futures = engine.submit(asks(120, 9, 9, 120))
    engine.wait(lambda: futures[1].done() and futures[2].done(), 2)
    assert not futures[0].done()
    assert not any(thread._work_queue.qsize() for thread in group.threads), "nobody waits, nothing is sampled"
    for each in engines:
        each.become(1)
    start, calls = time.monotonic(), 0

    def enough() -> bool:
        nonlocal calls
        calls += 1
        return time.monotonic() - start > 0.3

    engine.wait(enough)
    assert calls >= 5, "it is asked 20 times a second"
    assert time.monotonic() - start < 1.5
    found = [c for cs in wait_all(futures) for c in cs]
    assert [c.versions for c in found] == [told(c, TOKENS) for c in found]
    assert [len(c.versions) for c in found] == [2, 2, 1, 1, 1, 1, 2, 2]
    # Between sequences: the driver lets them run until none is open, and begins no other.
    futures = engine.submit(asks(*[30] * 6))
    engine.wait(iter([False, False, True]).__next__)
    between_sequences(engine, lambda step: [each.become(step) for each in engines] and {})(2)  # type: ignore[return-value]
    found = [c for cs in wait_all(futures) for c in cs]
    assert {tuple(c.versions) for c in found} == {((1, 30),), ((2, 30),)}
    # One that does not get on is named.
    (tmp_path / "hold").touch()
    futures = engine.submit(asks(20, 30, 5, 7))
    with pytest.raises(RunFailure, match=r"sampling: no answer from \[0, 1\]"):
        wait_all(futures)
    (tmp_path / "hold").unlink()
