"""Reward functions that behave badly, each in its own way. For a process of their own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from pathlib import Path

import numpy

calls: list[int] = []
kept: list[object] = []


def length(completions):
    return [len(c) for c in completions]


def heavy(completions):
    return [float("torch" in sys.modules or "transformers" in sys.modules)] * len(completions)


def draws(completions):
    return [random.random(), *numpy.random.rand(len(completions) - 1)]


def fails_once(completions):
    calls.append(len(completions))
    if len(calls) == 1:
        raise ConnectionError("the server blinks")
    return [len(calls)] * len(completions)


def always_fails(completions):
    return [float(c) for c in completions]


def wrong(completions):
    return [1.0, float("nan")]


def asks(completions, answer):
    return answer


def prints(completions):
    print("a line of the reward's")
    print("an error of the reward's", file=sys.stderr)
    return length(completions)


def exits(completions):
    os._exit(3)


def crashes(completions):
    return [ctypes.string_at(0) for _ in completions]  # a segmentation fault


def killed(completions):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(completions):
    threading.Event().wait()  # for ever


def computes(completions):
    re.match(r"(a+)+$", "a" * 60 + "b")  # for years, and no other thread gets to run


def stops(completions):
    os.kill(os.getpid(), signal.SIGSTOP)


def pool(completions):
    """Writes down the ids of its processes and its own."""
    workers = multiprocessing.get_context("fork").Pool(2)
    kept.append(workers)
    Path(os.environ["PIDS"]).write_text(" ".join(map(str, (os.getpid(), *(worker.pid for worker in workers._pool)))))
    return workers.map(len, completions)


def pool_then_exits(completions):
    pool(completions)
    os._exit(4)


def pool_then_hangs(completions):
    pool(completions)
    hangs(completions)


def thread(completions):
    threading.Thread(target=threading.Event().wait).start()
    return length(completions)


def big(completions):
    return [float(sum(map(len, completions)))] * len(completions)
