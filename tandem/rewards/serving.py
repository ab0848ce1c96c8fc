"""The process in which reward functions are judged, from inside: a loop that answers calls (``rewards/process.py``)."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
from typing import Any

from tandem.errors import UserError
from tandem.rewards.calling import Fault, LocalFunction
from tandem.rewards.loading import import_function, imported_module
from tandem.rewards.sources import source_files

_LENGTH = 8
"""Bytes in front of a message that say how long it is."""


def send(connection: socket.socket, message: Any) -> None:
    """Raises TimeoutError where the connection has a time-out, and the other side does not read."""
    data = pickle.dumps(message)
    connection.sendall(len(data).to_bytes(_LENGTH, "big") + data)


def receive(connection: socket.socket) -> Any:
    """The next message. Raises EOFError where the other side is gone, TimeoutError as ``send`` does."""
    return pickle.loads(_exactly(connection, int.from_bytes(_exactly(connection, _LENGTH), "big")))


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def serve(connection_fd: int, lifeline: int, trace: int) -> None:
    """The process's whole life: imports the functions that the first message names, and judges until it is closed.

    ``lifeline`` is a pipe that the parent keeps open as long as it lives. ``trace`` is a file for the lines of Python
    at which a crash (or SIGABRT) found the process.
    """
    for descriptor in (connection_fd, lifeline, trace):
        os.set_inheritable(descriptor, False)
    connection = socket.socket(fileno=connection_fd)
    _end_with_the_parent(connection, lifeline)
    faulthandler.enable(trace)
    # A pool that a function forks would hold the connection open after this process has died.
    os.register_at_fork(after_in_child=connection.close)
    os.register_at_fork(after_in_child=faulthandler.disable)
    with contextlib.suppress(EOFError, ConnectionError):  # the end, wherever it is noticed
        try:
            sources = receive(connection)
            functions = [LocalFunction(import_function(source)) for source in sources]
        except UserError as error:
            send(connection, str(error))
            return
        files = [source_files(imported_module(source)) for source in sources]
        send(connection, [(function.wants, its) for function, its in zip(functions, files, strict=True)])
        while True:
            index, arguments, samples, seed = receive(connection)
            try:
                answer: Any = functions[index](arguments, samples, seed)
            except Fault as fault:
                answer = vars(fault)
            sys.stdout.flush()
            sys.stderr.flush()
            send(connection, answer)


def _end_with_the_parent(connection: socket.socket, lifeline: int) -> None:
    """Leaves a process in this one's group that kills the group when the parent is gone, however it went.

    It is no child of this process: whoever waits for any child here waits for his own. That it is another process
    matters where this one computes without ever letting a thread of its own run.
    """
    if (child := os.fork()) != 0:
        os.waitpid(child, 0)
        return
    if os.fork() == 0:
        connection.close()
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)
    os._exit(0)
