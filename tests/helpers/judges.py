"""Reward functions that behave badly, each in its own way. For a process of their own."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy

from tandem.rewards.calling import judges

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


@judges("sample")
def one(prompt, completion, completion_ids, answer):
    assert isinstance(completion, str)
    return None if completion == "skip" else float(completion == answer) + 0.01 * len(completion_ids)


@judges("sample")
def one_draws(completion):
    return random.random() + numpy.random.rand()


@judges("group")
def best(prompts, completions):
    assert len(set(prompts)) == 1
    return [float(len(c) == max(map(len, completions))) for c in completions]


@judges("sample")
async def waits(completion):
    """A second for a completion that says so, and nothing for others."""
    await asyncio.sleep(1.0 if completion.startswith("slow") else 0.0)
    return time.monotonic()


@judges("sample")
def works(completion):
    time.sleep(1.0 if completion.startswith("slow") else 0.0)
    return time.monotonic()


@judges("sample")
def when(completion):
    return time.monotonic()


def when_all(completions):
    return [time.monotonic()] * len(completions)


@judges("sample")
def one_nan(completion):
    return float("nan") if completion == "bad" else 1.0


@judges("sample")
def too_large(completion):
    return 10**400


@judges("sample")
def one_hangs(completion):
    if completion == "hang":
        threading.Event().wait()  # one of them, for ever
    return 1.0


@judges("sample")
def one_fails(completion):
    return float(completion)


def counting(completions):
    counting.counts["odd"] += sum(len(c) % 2 for c in completions)
    return length(completions)


counting.counts = {"odd": 0, "even": 0}


@judges("sample")
def counting_one(completion):
    counting_one.counts["odd"] += numpy.int64(len(completion) % 2)
    return 1.0


counting_one.counts = {"odd": 0, "even": 0}
two = asyncio.Barrier(2)


@judges("sample")
async def counting_two(completion):
    counting_two.counts["letters"] += len(completion)
    await two.wait()
    counting_two.counts["letters"] += len(completion)
    return 1.0


counting_two.counts = {"letters": 0}
