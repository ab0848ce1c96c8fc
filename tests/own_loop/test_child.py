"""A real child process: called, failing, killed, and gone with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.errors import UserError, WorkerDied
from tandem.futures import wait_all
from tandem.roles import Seat
from tandem.workers.child import Child
from tandem.workers.group import WorkerFailed


class Role:
    """What the children of these tests hold."""

    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, amount: int, twice: bool = False) -> int:
        self.count += amount * (2 if twice else 1)
        return self.count

    def tensor(self) -> dict[str, torch.Tensor]:
        return {"a": torch.arange(3.0, requires_grad=True) * 2}

    def refuse(self) -> None:
        raise UserError("the cup is empty; fill it")

    def break_down(self) -> None:
        raise ValueError("a bug")

    def wait_for(self, path: str) -> str:
        while not Path(path).exists():
            time.sleep(0.01)
        return path

    def end(self, code: int) -> None:
        print("last words", flush=True)
        os._exit(code)

    def variables(self) -> dict[str, str]:
        return dict(os.environ)


def build(site: Any, start: int = 0) -> Role:
    return Role(start)


def build_badly(site: Any) -> Role:
    raise UserError("no such model; give another")


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child("the helper")
    yield child
    child.close()
    assert gone(child.process.pid)


@pytest.fixture
def role(child: Child) -> Seat:
    return child.place("role", build)


def gone(pid: int) -> bool:
    """Whether no process of this id runs (one that nobody has waited for yet does not run)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_calls_and_errors(child, role):
    assert role.call("add", 2) == 2
    assert role.call("add", 1, True) == 4
    assert role.call("count") == 4
    assert torch.equal(role.call("tensor")["a"], torch.tensor([0.0, 2.0, 4.0]))
    with pytest.raises(UserError, match=rf"the helper \(pid {child.process.pid}\): the cup is empty; fill it"):
        role.call("refuse")
    with pytest.raises(WorkerFailed, match=r"failed in role.break_down: ValueError: a bug\n(.|\n)*Traceback"):
        role.call("break_down")
    with pytest.raises(UserError, match="no such model"):
        child.place("other", build_badly)
    assert role.call("add", 0) == 4
    assert role.submit_each("add", [(1,)]).result() == [5]
    assert [gpu for _, gpu in role.devices] == [None]


def test_calls_that_are_under_way_together_end_in_their_order(child, role, tmp_path):
    other = child.place("other", partial(build, start=100))
    gate = tmp_path / "go"
    first = role.submit("wait_for", str(gate))
    second, third, fourth = role.submit("add", 1), other.submit("add", 1), role.submit("add", 1)
    assert not any(answer.done() for answer in (first, second, third, fourth))
    gate.touch()
    assert [fourth.result(), third.result(), second.result()] == [2, 101, 1]
    assert first.done()
    assert [first.result(), first.result()] == [str(gate)] * 2


def test_one_death_ends_every_wait(child, role, tmp_path):
    answers = [role.submit("wait_for", str(tmp_path / "never")), role.submit("add", 1)]
    os.kill(child.process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"died in role\.wait_for"):
        wait_all(answers)
    with pytest.raises(WorkerDied, match=r"died in role\.add"):
        answers[1].result()
    assert all(answer.done() for answer in answers)


def test_a_late_answer_is_not_taken_for_the_next(child, role, tmp_path):
    child.deadline_s = 0.2
    with pytest.raises(UserError, match=r"role.wait_for: no answer within 0 s from the helper"):
        role.call("wait_for", str(tmp_path / "go"))
    child.deadline_s = 60
    (tmp_path / "go").touch()
    assert role.call("add", 7) == 7


def test_the_end_does_not_wait_for_a_call_that_was_given_up(child, role, tmp_path):
    child.deadline_s = 0.1
    with pytest.raises(UserError, match="no answer"):
        role.call("wait_for", str(tmp_path / "never"))
    child.close()
    assert child.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("code", "how"), [(3, "exit code 3"), (0, "exit code 0")])
def test_a_child_that_ends_itself(role, code, how):
    with pytest.raises(
        WorkerDied, match=rf"the helper \(pid \d+\) died in role.end \({how}\); its output ends:\n.*words$"
    ):
        role.call("end", code)
    with pytest.raises(WorkerDied, match=r"died in role\.add"):
        role.call("add", 1)


def test_a_child_that_is_killed_while_it_works(child, role, tmp_path):
    timer = threading.Timer(0.3, os.kill, (child.process.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(WorkerDied, match=r"died in role.wait_for \(killed by SIGKILL\); it wrote nothing"):
        role.call("wait_for", str(tmp_path / "never"))
    timer.join()


def test_it_knows_nothing_of_the_parents_world(monkeypatch):
    world = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    for name, value in (world | {"TORCHELASTIC_RUN_ID": "x", "KEPT": "yes"}).items():
        monkeypatch.setenv(name, value)
    child = Child("the helper")
    try:
        role = child.place("role", build)
        variables = role.call("variables")
    finally:
        child.close()
    assert not variables.keys() & (world.keys() | {"TORCHELASTIC_RUN_ID"})
    assert variables["KEPT"] == "yes"


def test_it_outlives_the_thread_that_made_it():
    made: list[Child] = []
    thread = threading.Thread(target=lambda: made.append(Child("the helper")))
    thread.start()
    thread.join()
    (child,) = made
    try:
        assert child.place("role", build).call("add", 1) == 1
    finally:
        child.close()


def test_after_its_end():
    child = Child("the helper")
    role = child.place("role", build)
    child.close()
    child.close()
    with pytest.raises(UserError, match="the helper is closed"):
        role.call("add", 1)


PARENT = """
import sys, time
sys.path.insert(0, {tests!r})
from tandem.workers.child import Child
import test_child
child = Child("the helper")
role = child.place("role", test_child.build)
print(child.process.pid, flush=True)
role.call("wait_for", {never!r})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child notices at its next call only")
def test_it_dies_with_a_parent_that_is_killed(tmp_path):
    code = PARENT.format(tests=str(Path(__file__).parent), never=str(tmp_path / "never"))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while not gone(pid):
        assert time.monotonic() < end, f"{pid} still runs"
        time.sleep(0.01)
