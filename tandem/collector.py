"""Python's collector of reference cycles, kept from going through a whole model again and again."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 50_000
"""Objects made, above those that are gone, until the young ones are gone through. By default it is 700: less than the
lists of one reading of 256 samples' tokens, and importing torch and transformers takes 0.6 s longer."""


def collect_rarely() -> None:
    """For a whole process, before it imports anything large."""
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])


def pause() -> None:
    """Until ``leave_out``, in a process that imports torch and transformers first.

    They make half a million objects, which stay: to go through them while they come takes 0.5 s of 4.
    """
    gc.disable()


def leave_out() -> None:
    """From now on the collector leaves out all that lives: models and libraries, which are there until the end.

    Going through them takes 0.1 to 0.3 s, and a step's samples are enough to begin it. What is garbage by now stays,
    so on a GPU, whose memory it may hold, it is collected first.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
    gc.freeze()
    gc.enable()
    collect_rarely()


@contextmanager
def leaving_out() -> Iterator[None]:
    """``leave_out`` until the end of the body; a collector that somebody has turned off stays off."""
    before, on = gc.get_threshold(), gc.isenabled()
    leave_out()
    if not on:
        gc.disable()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
