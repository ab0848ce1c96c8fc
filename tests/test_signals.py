"""Ctrl-C and SIGTERM in a command: once, twice, while something is held, and in a process that it forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

import pytest

from tandem import signals
from tandem.signals import SAME_S, Stop, held, stoppable

BOTH = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])


@BOTH
def test_a_signal_stops_at_once_or_after_what_is_held(signum):
    before = signal.getsignal(signum)
    done = []

    def inside() -> None:
        with held():
            with held():
                signal.raise_signal(signum)
                done.append("inner")
            done.append("outer")
        done.append("never")

    with stoppable() as stop:
        with pytest.raises(KeyboardInterrupt):
            inside()
        assert stop.signum == signum
    assert done == ["inner", "outer"]
    assert signal.getsignal(signum) is before
    with stoppable(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signum)


def test_outside_a_command_nothing_is_held():
    with held(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_one_that_follows_at_once_is_the_same():
    with stoppable():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)


def test_what_a_callback_swallows_is_raised_anew():
    """Python prints what is raised in a callback of a weak reference, and goes on: a Ctrl-C there stopped nothing."""

    class Thing:
        pass

    def run() -> None:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        assert reference() is None
        threading.Event().wait(20)

    hook = sys.unraisablehook
    with stoppable(), pytest.raises(KeyboardInterrupt):
        run()
    assert sys.unraisablehook is hook


def test_before_anything_has_begun_the_process_ends_at_once():
    ended = []
    with stoppable(ended.append), suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert ended == [signal.SIGINT]


def test_what_the_process_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert isinstance(signal.getsignal(signal.SIGTERM), Stop)
    finally:
        signal.signal(signal.SIGINT, before)


SECOND = """
import os, signal, sys, time
from tandem import signals
signals.SAME_S = 0.0
with signals.stoppable(), signals.held():
    signal.raise_signal(signal.SIGINT)
    print("held", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("never", flush=True)
"""


def test_a_second_one_ends_the_process_at_once():
    assert SAME_S == 1.0
    assert signals.STOPPING == (signal.SIGINT, signal.SIGTERM)
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "held\n")


@BOTH
def test_a_forked_process_dies_of_a_signal_as_any_other(signum):
    """One that had inherited the handler took SIGTERM for the command's, raised, and went on in the parent's code."""
    with stoppable():
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException), held():
                signal.raise_signal(signum)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signum
