"""Where the tests' own child processes come from."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any
from unittest.mock import patch

# Children are forked from a server that has imported everything but computed nothing: quick, and free of threads.
PROCESSES = multiprocessing.get_context("forkserver")
# One list, since a process has one such server: of two lists the one that is set last would be that of all children.
PROCESSES.set_forkserver_preload(["helpers.warm"])
UNCHANGED = dict(os.environ)
"""The environment before any test has changed it for itself."""


def child(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A child process, not started yet. Its environment is that of the server: the one with which the tests began."""
    # The server passes over what it cannot import, and looks for it where the environment says only.
    with patch.dict(os.environ, UNCHANGED | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, clear=True):
        forkserver.ensure_running()
    return PROCESSES.Process(target=_run, args=(target, *arguments))


def _run(target: Callable[..., None], *arguments: Any) -> None:
    assert "helpers.warm" in sys.modules, "nothing was imported before the fork"
    target(*arguments)
