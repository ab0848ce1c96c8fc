"""Real processes over gloo, one a rank, each running the same function."""

from __future__ import annotations

import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from helpers.processes import PROCESSES, child
from tandem.parallel.world import World, join

DEADLINE_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` on every rank of a new world; their results. Raises what a rank raised."""
    port = free_port()
    pipes = [PROCESSES.Pipe() for _ in range(size)]
    processes = [child(_rank, function, rank, size, port, pipes[rank][1], arguments) for rank in range(size)]
    for process in processes:
        process.start()
    results = []
    try:
        for rank, (mine, _) in enumerate(pipes):
            assert mine.poll(DEADLINE_S), f"rank {rank} gave no result within {DEADLINE_S} s"
            ok, value = pickle.loads(mine.recv_bytes())
            assert ok, f"rank {rank}: {value}"
            results.append(value)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return results


def _rank(function: Callable[..., Any], rank: int, size: int, port: int, pipe: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        if size == 1:
            _send(pipe, True, function(World(), *arguments))
            return
        with join(rank, size, device=torch.device("cpu"), host="127.0.0.1", port=port, deadline_s=60) as world:
            _send(pipe, True, function(world, *arguments))
    except BaseException:
        _send(pipe, False, traceback.format_exc())


def _send(pipe: Any, ok: bool, value: Any) -> None:
    # Plain pickle: multiprocessing's own would pass tensors as shared memory, which dies with this process.
    pipe.send_bytes(pickle.dumps((ok, value)))
