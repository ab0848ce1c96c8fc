"""A command in a process that its parent looks after: how each end of it, and of what it stands on, is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from helpers.drivers import running, wait_until

SCRIPT = """
import ctypes, os, signal, subprocess, sys, threading, time
from tandem.errors import RunFailure
from tandem.workers.keeper import die_with
from tandem.workers.supervisor import stand_on, supervise

ray = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
try:
    code = supervise()
except RunFailure as error:
    print(error)
    code = 75
if code is None:
    print(os.getpid(), ray.pid, flush=True)
    stand_on({{"raylet": ray.pid}}, 1.0)
    {command}
ray.kill()
sys.exit(code)
"""
DEAF = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); time.sleep(1000)"
"""As in a call of Ray's that lets no signal through."""

DIES_WITH_FIRST_THREAD = """
mine = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, preexec_fn=lambda: die_with(os.getppid()))
stand_on({"raylet": mine.pid}, 1.0)
threading.Timer(1.0, os._exit, (7,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""
"""As where a command is killed that has many threads: the raylet ends first."""


def start(command: str) -> tuple[subprocess.Popen[str], int, int]:
    """The supervisor, and the numbers of the command and of what that stands on."""
    script = SCRIPT.format(command=textwrap.indent(command, "    ").strip())
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    command_pid, ray = map(int, process.stdout.readline().split())
    return process, command_pid, ray


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("sys.exit(3)", 3, ""),
        # It says so before it ends what it stood on.
        ("stand_on({}, 1.0); os.kill(ray.pid, 9); time.sleep(1); sys.exit(0)", 0, ""),
        ("stand_on({}, 1.0); os._exit(1)", 1, ""),
        # As Ray ends it where its raylet is gone.
        ("os._exit(1)", 75, "cluster: Ray's raylet (pid {ray}) died, and no worker can be reached without it"),
        (f"os.kill(ray.pid, 9); {DEAF}", 75, "cluster: Ray's raylet (pid {ray}) died"),
        (f"os.kill(ray.pid, signal.SIGSTOP); {DEAF}", 75, "cluster: Ray's raylet (pid {ray}) has been stopped for 1 s"),
        (DIES_WITH_FIRST_THREAD, 7, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); os.kill(os.getppid(), signal.SIGTERM); "
         "time.sleep(1000)", 9, ""),
    ],
)  # fmt: skip
def test_how_a_command_ends(command, code, said):
    process, command_pid, ray = start(command)
    # Not communicate(): what came with the first line is in the buffer of the file, past which it reads.
    process.wait(timeout=30)
    output = process.stdout.read()
    if code < 0:
        os.kill(ray, signal.SIGKILL)
    assert process.returncode == code
    assert output.startswith(said.format(ray=ray)) if said else not output
    assert command_pid not in running()


def test_a_supervisor_that_is_killed_takes_the_command_along():
    process, command_pid, ray = start(DEAF)
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: command_pid not in running(), "the command goes on")
    os.kill(ray, signal.SIGKILL)
