"""The process in which a reward function is called, from inside: it answers calls (``rewards/process.py``)."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from tandem.errors import UserError
from tandem.rewards.calling import Fault, LocalFunction
from tandem.rewards.kinds import find_function

_LENGTH = 8
"""Bytes in front of a message that say how long it is."""
CHUNK = 1 << 20
"""Most bytes, 1 MiB, that are read at once."""


def packed(message: Any) -> bytes:
    """A message as it travels."""
    data = pickle.dumps(message)
    return len(data).to_bytes(_LENGTH, "big") + data


def unpacked(data: bytearray) -> Iterator[Any]:
    """The whole messages of what has come so far, which are taken out of it."""
    while len(data) >= _LENGTH and len(data) >= (end := _LENGTH + int.from_bytes(data[:_LENGTH], "big")):
        message = pickle.loads(memoryview(data)[_LENGTH:end].tobytes())
        del data[:end]
        yield message


def _received(connection: socket.socket) -> Iterator[Any]:
    """Messages as they come, until the other side is gone."""
    data = bytearray()
    while part := connection.recv(CHUNK):
        data += part
        yield from unpacked(data)


def serve(connection_fd: int, lifeline: int, trace: int) -> None:
    """The process's whole life: finds the function that the first message names, and judges until it is closed.

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
    messages = _received(connection)
    with contextlib.suppress(StopIteration, ConnectionError):  # the end, wherever it is noticed
        source, setting = next(messages)
        try:
            found = find_function(source, setting)
            function = LocalFunction(found.function)
        except UserError as error:
            connection.sendall(packed((0, str(error))))
            return
        connection.sendall(packed((0, (function.wants, found.files, found.version))))
        if function.wants.awaits:
            asyncio.run(_answer_side_by_side(connection, function))
            return
        for number, *call in messages:
            try:
                answer: Any = function(*call)
            except Fault as fault:
                answer = vars(fault)
            _send_printed()
            connection.sendall(packed((number, (answer, function.counted()))))


async def _answer_side_by_side(connection: socket.socket, function: LocalFunction) -> None:
    """Every call is begun as it comes. Returns when the other side is gone, with the calls that have not ended."""
    reader, writer = await asyncio.open_connection(sock=connection)
    calls: set[asyncio.Task[None]] = set()

    async def answer(number: int, *call: Any) -> None:
        try:
            found: Any = await function.judged(*call)
        except Fault as fault:
            found = vars(fault)
        _send_printed()
        writer.write(packed((number, (found, function.counted()))))

    data = bytearray()
    while part := await reader.read(CHUNK):
        data += part
        for message in unpacked(data):
            task = asyncio.create_task(answer(*message))
            calls.add(task)
            task.add_done_callback(calls.discard)


def _send_printed() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


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
