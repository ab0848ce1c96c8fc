"""Saves in real processes that end by SIGKILL: at random moments, and at every single step of a save."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tandem.checkpoint.store import CheckpointStore

TOUCHING = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree"}
"""Audit events of the calls by which a save changes or reads the folder."""


def save(folder: Path, step: int, keep: int = 1) -> None:
    content = {"model": {f"w{i}": torch.full((64, 16), float(step)) for i in range(3)}}
    CheckpointStore(folder, keep=keep).save(step, {"actor": content}, {"of": step})


def check(folder: Path) -> int | None:
    """The step of the latest checkpoint, every number of which must be the one that was saved."""
    checkpoint = CheckpointStore(folder, keep=1).latest()
    if checkpoint is None:
        return None
    assert checkpoint.state == {"of": checkpoint.step}
    for tensor in checkpoint.load("actor")["model"].values():
        assert torch.equal(tensor, torch.full((64, 16), float(checkpoint.step)))
    return checkpoint.step


def fork(body: Callable[[], None]) -> int:
    """Runs the body in a forked process and returns its pid. Exit code 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_forever(folder: Path, first: int, saved: int) -> None:
    for step in range(first, 1_000_000):
        save(folder, step, keep=2)
        os.write(saved, f"{step}\n".encode())


def save_and_die(folder: Path, step: int, moment: int) -> None:
    """Kills itself before the ``moment``-th call that touches the disk; ends normally where there are fewer."""
    left = moment

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, _: count() if event in TOUCHING else None)
    sync = os.fsync
    os.fsync = lambda descriptor: (count(), sync(descriptor))[1]
    save(folder, step)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(0)
    step = 0
    for _ in range(15):
        receiver, sender = os.pipe()
        pid = fork(lambda first=step + 1, saved=sender: save_forever(tmp_path, first, saved))
        os.close(sender)
        said = os.read(receiver, 100)
        select.select([], [], [], draw.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        while rest := os.read(receiver, 10_000):
            said += rest
        os.close(receiver)
        acknowledged = int(said.split()[-1])
        found = check(tmp_path)
        # A save that had returned is there; the one after it may be.
        assert found in [acknowledged, acknowledged + 1]
        step = found


def test_killed_at_every_moment_of_a_save(tmp_path: Path) -> None:
    survivors = []
    for moment in range(1000):
        # With keep=1 in one folder: what the kill before left is no obstacle to this save, and is gone after it.
        old = 2 * moment
        save(tmp_path, old)
        assert [path.name for path in tmp_path.iterdir()] == [f"step_{2 * moment:08d}"]
        new = 2 * moment + 1
        code = exit_code(fork(lambda new=new, moment=moment: save_and_die(tmp_path, new, moment)))
        found = check(tmp_path)
        assert found in (old, new)
        survivors.append("old" if found == old else "new")
        if code == 0:
            break
        assert code == -signal.SIGKILL
    # The old one up to some moment, the new one from then on.
    change = survivors.index("new")
    assert 10 < change < len(survivors) - 5
    assert survivors == ["old"] * change + ["new"] * (len(survivors) - change)
