"""Seats of real homes: calls in one order on every rank, at the same time where homes differ, and how they fail."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.meeting_roles import PATIENCE_S, Role
from helpers.shared_ray import cluster_address
from helpers.worker_groups import groups

from tandem.errors import RunFailure, UserError, WorkerDied
from tandem.futures import wait_all
from tandem.parallel.world import World
from tandem.roles import Seat, call_all
from tandem.signals import stoppable
from tandem.workers import group as group_module
from tandem.workers.group import WorkerGroup
from tandem.workers.homes import Aside, Here, seat_of
from tandem.workers.process import Site

__all__ = ["cluster_address"]


def seats_in(group: WorkerGroup, *names: str) -> list[Seat]:
    return [group.place(name, lambda site, name=name: Role(site, name)) for name in names]


@pytest.fixture(scope="module")
def pair(cluster_address: str) -> Iterator[WorkerGroup]:
    """Two ranks, for tests that leave them alive."""
    with groups(2, name="pair") as (group,):
        yield group


def test_every_rank_sees_the_calls_of_two_seats_in_one_order(pair):
    actor, critic = seats_in(pair, "actor", "critic")
    asked = [(("actor", "critic", "critic")[n % 3], n) for n in range(30)]
    begun = [{"actor": actor, "critic": critic}[name].submit("meet", n) for name, n in asked]
    results = wait_all(begun)
    # Were the ranks at different calls, each would have met another one's.
    assert [met for met, _ in results] == [[call, call] for call in asked]
    assert results[-1][1] == asked
    assert all(future.done() for future in begun)
    everywhere = critic.submit_each("heard", [(), ()]).result()
    assert everywhere == [asked, asked]


@pytest.mark.parametrize("naive", [False, True])
def test_pushes_and_training_from_several_places_meet_in_one_order(pair, monkeypatch, naive):
    """Calls are begun by several threads, and reach each rank after a delay of its own. Without one order, ranks would
    be at different calls: a real collective would wait for ever."""
    rng = random.Random(3)
    left, overtaken = threading.Event(), threading.Event()

    class Delayed:
        """A rank whose calls take their time to leave: the source's first to the second rank until others overtake it,
        if they can."""

        def __init__(self, rank: int, actor: Any) -> None:
            self.call, self.rank, self.actor = self, rank, actor

        def remote(self, role: str, *call: Any) -> Any:
            time.sleep(rng.uniform(0, 0.01))
            if self.rank == 1 and role == "source":
                overtaken.wait(0.3)
            ref = self.actor.call.remote(role, *call)
            if role == "source":
                left.set()
            elif self.rank == 1:
                overtaken.set()
            return ref

    names = ("source", "trainer", "critic")
    seats = dict(zip(names, seats_in(pair, *names), strict=True))
    monkeypatch.setattr(pair, "actors", [Delayed(rank, actor) for rank, actor in enumerate(pair.actors)])
    if naive:
        monkeypatch.setattr(pair, "_one_order", nullcontext())
    begun: dict[str, list[Any]] = {name: [] for name in names}

    def call(name: str) -> None:
        if name != "source":
            left.wait(PATIENCE_S)
        for n in range(8):
            begun[name].append(seats[name].submit("meet", n))
            time.sleep(rng.uniform(0, 0.005))

    threads = [threading.Thread(target=call, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    met = [(name, n, future.result()[0]) for name in names for n, future in enumerate(begun[name])]
    alike = [calls == [(name, n), (name, n)] for name, n, calls in met]
    assert all(alike) is not naive


def test_a_rank_that_is_killed_while_two_seats_are_called(cluster_address, tmp_path):
    with groups(2) as (group,):
        actor, critic = seats_in(group, "actor", "critic")
        calls = {"actor": actor.submit("wait", tmp_path / "never", 1), "critic": critic.submit("meet", 1)}
        assert not calls["actor"].done()
        start = time.monotonic()
        os.kill(group.wheres[1].pid, signal.SIGKILL)
        with pytest.raises(
            WorkerDied, match=rf"home0 rank 1 \(pid {group.wheres[1].pid} on \S+\) died \(.*; in actor\.wait\)"
        ):
            wait_all([*calls.values()])
        with pytest.raises(WorkerDied, match=r"home0 rank 1 .* died \(.*; in critic\.meet\)"):
            calls["critic"].result()
        assert time.monotonic() - start < PATIENCE_S


def test_a_rank_that_never_answers_is_waited_for_once(cluster_address, tmp_path):
    with groups(2, deadline_s=2.0) as (group,):
        actor, critic = seats_in(group, "actor", "critic")
        late, behind = actor.submit("wait", tmp_path / "never", 1), critic.submit("meet", 1)
        # Rank 0 has waited for rank 1 before this process waits for both. It must not be the one to give up.
        late.wait(1.0)
        with pytest.raises(RunFailure, match=r"actor\.wait: no answer within 2 s from home0 rank 0 .*home0 rank 1 "):
            late.result()
        start = time.monotonic()
        with pytest.raises(RunFailure, match=r"critic\.meet: .*rank 1 .* still owes the answer to an earlier call"):
            behind.result()
        assert time.monotonic() - start < 1


def test_a_stopped_rank_is_not_waited_for_once_the_command_is_to_end(cluster_address, tmp_path, monkeypatch, caplog):
    """It was until its keeper killed it, after 30 s or ``--cluster.heartbeat``. One that runs may have much to save."""
    monkeypatch.setattr(group_module, "STOP_S", 1.0)
    with groups(1) as (group,), stoppable():
        (actor,) = seats_in(group, "actor")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        saved, pid = actor.submit("wait", tmp_path / "saved"), group.wheres[0].pid
        threading.Timer(2.5, (tmp_path / "saved").touch).start()
        assert saved.result() == "actor"
        assert re.search(rf"actor\.wait: home0 rank 0 \(pid {pid} .*\) is waited for, 1800 s at most", caplog.text)
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(RunFailure, match=rf"actor\.meet: home0 rank 0 \(pid {pid} on \S+\) is stopped \(SIGSTOP"):
            actor.call("meet", 1)
        with pytest.raises(RunFailure, match=r"rank 0 .* still owes the answer"):
            actor.call("meet", 2)
        assert time.monotonic() - start < 10
        os.kill(pid, signal.SIGCONT)


def test_what_ray_has_no_room_for_and_what_it_has_lost_is_a_line(pair, monkeypatch):
    import ray

    def fails(error: Exception) -> None:
        raise error

    full = ray.exceptions.OutOfDiskError("Local disk is full")
    role = SimpleNamespace(answer=lambda: fails(full), large=lambda *_: bytes(1 << 20))
    seat = pair.place("large", lambda site: role)
    with pytest.raises(
        RunFailure, match=r"^large\.answer: pair0 rank [01] \(pid \d+ on \S+\): Ray's object store is full"
    ):
        seat.call("answer")
    with monkeypatch.context() as patched:
        patched.setattr(ray, "put", lambda value: fails(full))
        with pytest.raises(RunFailure, match=r"^large\.large: Ray's object store is full, and so is the disk"):
            seat.submit("large", bytes(1 << 20))
        # As where its machine has left with it.
        lost = ray.exceptions.ObjectFetchTimedOutError("00ff", "", "")
        patched.setattr(ray, "get", lambda ref: fails(lost))
        with pytest.raises(RunFailure, match=r"^large\.large: the answer of pair0 rank [01] \(pid .* is lost: \w+"):
            seat.submit_each("large", [(), ()]).result()
    assert len(seat.call("large")) == 1 << 20


def test_different_homes_work_at_the_same_time(cluster_address, tmp_path):
    """One after the other, the first would wait in vain; this process, which makes its call at once, is the last."""
    with groups(1, 1) as (first, second):
        (actor,), (critic,) = seats_in(first, "actor"), seats_in(second, "critic")
        seats = {"driver": seat_of(Role(Site(World()), "driver")), "actor": actor, "critic": critic}
        assert list(call_all(seats, "come", tmp_path, *seats).items()) == [(name, name) for name in seats]
        # Nobody waits for what still loads where all is over: it was 5 s for each.
        for group in (first, second):
            group.begin("endless", lambda site: time.sleep(PATIENCE_S))
        start = time.monotonic()
        for group in (first, second):
            group.close()
        assert time.monotonic() - start < 4


def test_the_first_home_speaks_though_the_second_fails_first(cluster_address, tmp_path):
    with groups(1, 1) as (first, second):
        (actor,), (critic,) = seats_in(first, "actor"), seats_in(second, "critic")
        failed, done = tmp_path / "failed", tmp_path / "done"
        calls = {
            "actor": actor.submit("fail", failed, done),
            "critic": critic.submit("fail", None, failed),
        }
        with pytest.raises(UserError, match=r"home1 rank 0 \(pid \d+ on \S+\): critic has nothing to give"):
            calls["critic"].result()
        with pytest.raises(UserError, match=r"home0 rank 0 \(pid \d+ on \S+\): actor has nothing to give"):
            wait_all([*calls.values()])
        # What was begun has ended by then.
        calls = {"critic": critic.submit("fail"), "actor": actor.submit("come", tmp_path, done.name)}
        with pytest.raises(UserError, match="critic has nothing to give"):
            wait_all([*calls.values()])
        assert calls["actor"].done()


def test_this_process_is_called_at_once_or_aside(tmp_path):
    """A call that waits for somebody is made aside, and then in order too; an error comes with the result."""
    site = Site(World(), {"role": Role(Site(World()), "role")})
    with pytest.raises(UserError, match=r"^role has nothing to give$"):
        Seat(Here(site), "role").submit("fail")
    aside = Aside(site)
    seat = Seat(aside, "role")
    first, second = seat.submit("wait", tmp_path / "open"), seat.submit("fail")
    assert not first.done()
    assert not second.done()
    (tmp_path / "open").touch()
    with pytest.raises(UserError, match=r"^role has nothing to give$"):
        second.result()
    assert first.result() == "role"
    assert seat.call("name") == "role"
    assert seat.devices == Seat(Here(site), "role").devices
    aside.close()
